"""The SGLang client against a server that speaks the protocol but samples nothing real.

Oracles: the policy's own patches, the weights that were handed over, the calls that arrived. Blind to the real server's
numerics and timing, for which ``tests/sglang`` is there.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.distributed import HashStore  # type: ignore[attr-defined]  # offered, not in __all__

from prism_megatron.data.pictures.images import ImagePreprocessor
from prism_megatron.data.render import Renderer
from prism_megatron.errors import DataError, RolloutError, WeightSyncError
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.sglang import requests as sglang_requests
from prism_megatron.rollout.sglang.board import Board
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.http import Patience
from prism_megatron.types import ImageInput, Prompt
from tests.counting import Counting
from tests.unit.rollout.attached import IMPATIENT
from tests.unit.rollout.fake_sglang import CONTEXT, FOLDER, KEY, FakeSGLang, read_picture, running
from tests.unit.rollout.tiny_qwen import NoSegments
from tests.unit.rollout.weights import mini_weights
from tests.waiting import wait_for

SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer.from_folder(FOLDER)


@pytest.fixture
def fakes(renderer: Renderer) -> Iterator[list[FakeSGLang]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(renderer.image_token_id)) for _ in range(2)]


def engine_on(
    fakes: list[FakeSGLang], renderer: Renderer, spool: Path, *, board: Board | None = None, **options: Any
) -> SGLangRollout:
    settings: dict[str, Any] = {"seconds": 20.0, "patience": IMPATIENT} | options
    return SGLangRollout(
        FOLDER,
        NoSegments(),
        urls=[fake.url for fake in fakes],
        api_key=KEY,
        end_token_ids=[renderer.end_token_id],
        spool=spool,
        board=board,
        options=SGLangOptions(**settings),
    )


@pytest.fixture
def engine(fakes: list[FakeSGLang], renderer: Renderer, tmp_path: Path) -> Iterator[SGLangRollout]:
    engine = engine_on(fakes, renderer, tmp_path)
    engine.update_weights(mini_weights(), version=3)
    yield engine
    engine.close()


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompts(renderer: Renderer, count: int = 1) -> list[Prompt]:
    return [renderer.prompt(f"p{i}", f"How many circles? {i}", [picture(i, 70, 100)]) for i in range(count)]


def generated(fakes: list[FakeSGLang]) -> list[dict[str, Any]]:
    return [body for fake in fakes for path, body in fake.calls if path == "/generate"]


def generate(engine: SGLangRollout, asked: list[Prompt], n: int = 2) -> Any:
    return engine.generate(SampleRequest(asked, n, SAMPLING, seed=0, step=0))


def test_the_server_sees_the_policys_pixels_once_for_all_samples(
    engine: SGLangRollout, fakes: list[FakeSGLang], renderer: Renderer
) -> None:
    """Bit for bit, with one pad an image: images of two sizes, which the processor resized."""
    prompt = renderer.prompt("two", "Which is larger?", [picture(1, 333, 100), picture(2, 50, 61)])
    (group,) = generate(engine, [prompt], n=3)
    (body,) = generated(fakes)
    (ids,), (urls,) = body["input_ids"], body["image_data"]
    assert ids.count(renderer.image_token_id) == len(urls) == 2 and body["sampling_params"]["n"] == len(group) == 3
    for url, image in zip(urls, prompt.images, strict=True):
        seen = renderer.preprocessor(read_picture(url))
        assert seen.grid_thw == image.grid_thw
        assert np.array_equal(seen.pixel_values_P_D, image.pixel_values_P_D)
    assert [token for token in ids if token != renderer.image_token_id] == [
        token for token in prompt.token_ids if token != renderer.image_token_id
    ]


def test_the_server_samples_as_it_is_told(engine: SGLangRollout, fakes: list[FakeSGLang], renderer: Renderer) -> None:
    """Claim: every setting reaches it; the log-probs that it gives are those under the temperature it was told."""
    sampling = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=7)
    engine.generate(SampleRequest(prompts(renderer), 2, sampling, seed=0, step=0))
    (body,) = generated(fakes)
    asked = {name: body["sampling_params"][name] for name in ("temperature", "top_p", "max_new_tokens", "n")}
    assert asked == {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7, "n": 2}
    assert body["return_logprob"] is True


def test_answers_become_rollouts_in_the_order_of_the_prompts(
    engine: SGLangRollout, fakes: list[FakeSGLang], renderer: Renderer
) -> None:
    asked = [*prompts(renderer, 5), renderer.prompt("text", "No image", [])]
    groups = generate(engine, asked, n=4)
    assert [len(group) for group in groups] == [4] * 6
    for group in groups:
        for number, rollout in enumerate(group):
            tokens = (number + 5, number + 6, renderer.end_token_id)
            assert rollout.token_ids == tokens
            assert rollout.logprobs == pytest.approx([-token / 1000 for token in tokens])
            assert rollout.finish_reason == "stop" and rollout.policy_version == 3
            assert rollout.segments.problem == "3 tokens"
    assert len(generated(fakes)) == 6


def test_every_answer_is_counted_when_it_has_come(engine: SGLangRollout, renderer: Renderer) -> None:
    engine.activity = activity = Counting()
    generate(engine, prompts(renderer, 5), n=4)
    assert activity.counted == [("answers", 20, 20)]


def test_logprobs_are_those_of_the_whole_softmax(
    engine: SGLangRollout, fakes: list[FakeSGLang], renderer: Renderer
) -> None:
    """The server lowers the logits of image and video pads, so that they are never drawn; we undo it in the log-probs.

    Oracle: a softmax over four logits, two of them lowered by what the request asks for.
    """
    temperature = 0.5
    logits = np.array([1.0, 2.0, -1.0, 0.5])
    (body,) = [engine._format.request(prompts(renderer)[0], 1, Sampling(temperature=temperature))]
    (bias,) = set(body["sampling_params"]["logit_bias"].values())
    lowered = (logits + np.array([0.0, 0.0, bias, bias])) / temperature
    served = lowered - np.log(np.exp(lowered).sum())
    whole = logits / temperature - np.log(np.exp(logits / temperature).sum())
    share = sglang_requests._barred_share([[served[2], 0, None], [served[3], 0, None]])
    assert served[0] - share == pytest.approx(whole[0], abs=1e-9)
    assert served[0] - whole[0] > 0.01, "blind: the barred tokens have no weight"


def test_scores_of_a_given_response_are_those_of_its_tokens(engine: SGLangRollout) -> None:
    """SGLang scores the last id of the vocabulary, and reports it as 0; other ids must be the response's."""
    prompt, response = Prompt("p", (5, 6), (), ""), (7, 511)

    def answer(*tokens: int) -> list[dict[str, Any]]:
        scored = [[-0.5 * i, token, None] for i, token in enumerate((5, 6, *tokens))]
        return [{"meta_info": {"prompt_tokens": 4, "input_token_logprobs": scored}}]

    assert engine._format.scores(prompt, response, answer(7, 0)) == (-1.0, -1.5)
    with pytest.raises(RolloutError, match="has 4 tokens and the server read 4"):
        engine._format.scores(prompt, response, answer(8, 0))


def test_requests_are_bounded_and_shared_by_load(fakes: list[FakeSGLang], renderer: Renderer, tmp_path: Path) -> None:
    engine = engine_on(fakes, renderer, tmp_path, max_in_flight=4)
    engine.update_weights(mini_weights(), version=0)
    together = threading.Barrier(4, timeout=20.0)
    for fake in fakes:
        fake.together = together
    generate(engine, prompts(renderer, 12))
    engine.close()
    assert [len(generated([fake])) for fake in fakes] == [6, 6]
    assert [fake.most_running for fake in fakes] == [2, 2]


@pytest.mark.parametrize("failures", [[0], [503], [500, 0], [0, 503, 429]], ids=str)
def test_what_breaks_off_is_asked_again_and_counted_once(
    failures: list[int], engine: SGLangRollout, fakes: list[FakeSGLang], renderer: Renderer
) -> None:
    """Four failures in all: five of them may not befall one prompt, and on a busy machine they do."""
    asked = [failures, failures[:1]]
    for fake, statuses in zip(fakes, asked, strict=True):
        fake.answer_status = list(statuses)
    groups = generate(engine, prompts(renderer, 6))
    assert [len(group) for group in groups] == [2] * 6
    broken_off = sum(map(len, asked)) - sum(len(fake.answer_status) for fake in fakes)
    assert broken_off > 0 and len(generated(fakes)) == 6 + broken_off


def test_an_answer_of_another_version_is_not_used(
    engine: SGLangRollout, fakes: list[FakeSGLang], renderer: Renderer
) -> None:
    fakes[0].version = "2"
    groups = generate(engine, prompts(renderer, 4))
    assert {rollout.policy_version for group in groups for rollout in group} == {3}
    fakes[1].version = "4"
    with pytest.raises(RolloutError, match="other weights than version 3"):
        generate(engine, prompts(renderer))


def test_a_supervised_server_is_waited_for(fakes: list[FakeSGLang], renderer: Renderer, tmp_path: Path) -> None:
    """Lost, back with its folder's weights, and at last with the policy's: more failures than a stranger is allowed.

    The process that hands weights over, and the supervisor, are others.
    """
    fake = fakes[0]
    engine = engine_on([fake], renderer, tmp_path, board=Board(HashStore()))
    engine.follow(3)
    fake.answer_status = [0] * 5
    fake.version = "default"

    def restored() -> None:
        wait_for(lambda: len(generated([fake])) > 5)
        fake.version = "3"

    thread = threading.Thread(target=restored)
    thread.start()
    groups = generate(engine, prompts(renderer))
    thread.join()
    assert [rollout.policy_version for rollout in groups[0]] == [3, 3]
    engine.close()


def test_an_answer_broken_off_by_an_abort_is_not_used(
    engine: SGLangRollout, fakes: list[FakeSGLang], renderer: Renderer
) -> None:
    for fake in fakes:
        fake.finish_reason = "abort"
    with pytest.raises(RolloutError, match="broke off"):
        generate(engine, prompts(renderer))


def test_a_refused_request_is_not_repeated(engine: SGLangRollout, fakes: list[FakeSGLang], renderer: Renderer) -> None:
    for fake in fakes:
        fake.answer_status = [400]
    with pytest.raises(RolloutError, match=r"prompt 'p0'.*HTTP 400: no room"):
        generate(engine, prompts(renderer))
    assert len(generated(fakes)) == 1


def test_a_wrong_token_count_is_an_error(engine: SGLangRollout, fakes: list[FakeSGLang], renderer: Renderer) -> None:
    (prompt,) = prompts(renderer)
    for fake in fakes:
        fake.extra_prompt_tokens = 2
    length = len(prompt.token_ids)
    with pytest.raises(RolloutError, match=f"has {length} tokens and the server read {length + 2}"):
        generate(engine, [prompt])


def test_pads_that_are_not_the_images_are_refused(engine: SGLangRollout, renderer: Renderer) -> None:
    (prompt,) = prompts(renderer)
    at = prompt.token_ids.index(renderer.image_token_id)
    one_less = (*prompt.token_ids[:at], *prompt.token_ids[at + 1 :])
    for token_ids, images in ((one_less, prompt.images), (prompt.token_ids, prompt.images * 2)):
        with pytest.raises(DataError, match="render it again"):
            generate(engine, [Prompt("wrong", token_ids, images, "")])


def test_neighbouring_images_keep_a_pad_each(
    engine: SGLangRollout, fakes: list[FakeSGLang], renderer: Renderer
) -> None:
    """No template renders it so, but nothing in a prompt forbids it."""
    images = tuple(renderer.preprocessor(picture(seed, 64, 96)) for seed in (1, 2))
    generate(engine, [Prompt("close", (5, *[renderer.image_token_id] * 12, 6), images, "")])
    assert generated(fakes)[0]["input_ids"] == [[5, renderer.image_token_id, renderer.image_token_id, 6]]


def test_images_that_the_server_would_see_differently_are_refused(
    engine: SGLangRollout, renderer: Renderer, tmp_path: Path
) -> None:
    """Too narrow for the size limits, too large for them, and patches of no picture."""
    with pytest.raises(DataError, match=r"prompt 'narrow': an image of .* outside the size limits"):
        generate(engine, [renderer.prompt("narrow", "?", [picture(1, 700, 31)])])
    settings = json.loads((FOLDER / "preprocessor_config.json").read_text())
    settings["size"]["longest_edge"] *= 4
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    large = ImagePreprocessor.from_folder(tmp_path)(picture(1, 256, 256))
    with pytest.raises(DataError, match="prompt 'large': an image of 256x256 pixels is outside the size limits"):
        generate(engine, [Prompt("large", (5, *[renderer.image_token_id] * 64), (large,), "")])
    noise = ImageInput(np.random.default_rng(0).standard_normal((16, 1536), dtype=np.float32), (1, 4, 4))
    with pytest.raises(DataError, match="8-bit colours"):
        generate(engine, [Prompt("noise", (5, *[renderer.image_token_id] * 4), (noise,), "")])


def test_a_prompt_over_the_context_is_refused(engine: SGLangRollout, fakes: list[FakeSGLang]) -> None:
    with pytest.raises(DataError, match=f"exceeds the servers' {CONTEXT}"):
        generate(engine, [Prompt("long", (5,) * (CONTEXT - 7), (), "")])
    assert not generated(fakes)
    generate(engine, [Prompt("full", (5,) * (CONTEXT - 8), (), "")])
    assert len(generated(fakes)) == 1


def test_a_prompt_must_fit_each_of_the_servers(fakes: list[FakeSGLang], renderer: Renderer, tmp_path: Path) -> None:
    for small, large in (fakes, reversed(fakes)):
        small.context, large.context = 50, CONTEXT
        engine = engine_on(fakes, renderer, tmp_path)
        engine.update_weights(mini_weights(), version=0)
        with pytest.raises(DataError, match="exceeds the servers' 50"):
            generate(engine, [Prompt("long", (5,) * 43, (), "")])
        engine.close()


def test_a_rank_draws_its_own_samples_only(engine: SGLangRollout, fakes: list[FakeSGLang], renderer: Renderer) -> None:
    groups = engine.generate(
        SampleRequest(prompts(renderer, 3), 4, SAMPLING, seed=0, step=0, samples=[range(3, 4), range(4), range(1, 3)])
    )
    assert [len(group) for group in groups] == [1, 4, 2]
    assert sorted(body["sampling_params"]["n"] for body in generated(fakes)) == [1, 2, 4]


def test_set_up_refuses_what_cannot_serve(fakes: list[FakeSGLang], renderer: Renderer, tmp_path: Path) -> None:
    def attach(url: str, key: str) -> SGLangRollout:
        end = [renderer.end_token_id]
        options = SGLangOptions(patience=Patience(first_pause=0.02, attach=0.2))
        return SGLangRollout(
            FOLDER, NoSegments(), urls=[url], api_key=key, end_token_ids=end, spool=tmp_path, options=options
        )

    with pytest.raises(RolloutError, match="refuses the API key"):
        attach(fakes[0].url, "a wrong key")
    fakes[0].tp_size = 2
    with pytest.raises(RolloutError, match=r"has 2 workers.*--rollout-sync disk or group"):
        attach(fakes[0].url, KEY)
    fakes[0].num_layers = 28
    with pytest.raises(RolloutError, match=r"another model.*28 layers and 3 vision blocks.*4 layers and 3"):
        attach(fakes[0].url, KEY)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(RolloutError, match=f"http://127.0.0.1:{port} cannot be reached"):
        attach(f"http://127.0.0.1:{port}", KEY)


def test_nothing_is_generated_before_the_first_weights(
    fakes: list[FakeSGLang], renderer: Renderer, tmp_path: Path
) -> None:
    engine = engine_on(fakes, renderer, tmp_path)
    with pytest.raises(WeightSyncError, match="call update_weights first"):
        generate(engine, prompts(renderer))
    engine.close()
