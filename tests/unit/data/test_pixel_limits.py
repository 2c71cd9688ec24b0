"""Other limits of images' areas give what transformers' processor gives with them, pixel for pixel."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prism_megatron.data.loader import RecordSource
from prism_megatron.data.pictures.files import open_image
from prism_megatron.data.pictures.images import ImagePreprocessor
from prism_megatron.data.pictures.pixel_limits import check_served_limits, with_pixel_limits
from prism_megatron.data.reading.intake import LONG_PROMPT
from prism_megatron.data.render import Renderer
from prism_megatron.errors import ConfigError
from prism_megatron.rollout.base import Sampling
from prism_megatron.rollout.sglang.requests import RequestFormat
from prism_megatron.types import Prompt
from tests.unit.data.transformers_oracle import Oracle

SIZES = [(96, 96), (20, 30), (333, 100), (700, 31), (1200, 900)]


@pytest.mark.parametrize(("least", "most"), [(None, 64 * 64), (96 * 96, None), (40_000, 50_000), (1024, 1024)])
@pytest.mark.parametrize("size", SIZES)
def test_limits_are_those_of_transformers(
    least: int | None, most: int | None, size: tuple[int, int], mini_folder: Path
) -> None:
    plain = ImagePreprocessor.from_folder(mini_folder)
    limited = with_pixel_limits(plain, min_pixels=least, max_pixels=most)
    of_folder = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    wanted = {name: value or of_folder[name] for name, value in (("shortest_edge", least), ("longest_edge", most))}
    oracle = Qwen2VLImageProcessorPil.from_pretrained(mini_folder, local_files_only=True, size=wanted)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    expected = oracle(images=[picture], return_tensors="np")
    found = limited(picture)
    assert np.array_equal(found.pixel_values_P_D, expected["pixel_values"])
    assert found.grid_thw == tuple(expected["image_grid_thw"][0])
    assert limited.num_tokens_of_size(size) == limited.num_tokens(found.grid_thw)
    assert limited.picture(found).size == (found.grid_thw[2] * 16, found.grid_thw[1] * 16)


def test_the_folders_own_limits_stay_as_they_are(mini_folder: Path) -> None:
    """Claim: the preprocessor that was given does not change, and none given changes nothing."""
    plain = ImagePreprocessor.from_folder(mini_folder)
    before = plain.num_tokens_of_size((500, 500))
    assert with_pixel_limits(plain, min_pixels=None, max_pixels=64 * 64).num_tokens_of_size((500, 500)) == 4 != before
    assert plain.num_tokens_of_size((500, 500)) == before
    assert with_pixel_limits(plain, min_pixels=None, max_pixels=None) is plain


def test_limits_that_no_image_meets_are_refused(mini_folder: Path) -> None:
    plain = ImagePreprocessor.from_folder(mini_folder)
    with pytest.raises(ConfigError, match="--max-pixels 1000 must be at least 1024"):
        with_pixel_limits(plain, min_pixels=None, max_pixels=1000)
    with pytest.raises(ConfigError, match="--min-pixels 20000 must be at most --max-pixels 16384"):
        with_pixel_limits(plain, min_pixels=20_000, max_pixels=None)


LARGE, LIMIT = (2400, 1800), 1_003_520
"""A photograph's size, and the area at which it has 980 tokens."""


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two records: about a large photograph and about a small picture."""
    folder = tmp_path_factory.mktemp("album")
    (folder / "images").mkdir()
    lines = []
    for name, size in (("large", LARGE), ("small", (64, 64))):
        noise = np.random.default_rng(1).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(folder / "images" / f"{name}.jpg")
        lines.append({
            "id": name, "image": f"images/{name}.jpg", "question": "What?", "choices": None, "answer": "2",
            "answer_type": "integer", "solution": "s", "caption": "c", "source": "album",
        })  # fmt: skip
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def source_of(album: Path, renderer: Renderer) -> RecordSource:
    return RecordSource(album, renderer, part="train", seed=0, batch_size=2, max_prompt_tokens=2048,
                        max_response_tokens=100, validation_share=0.0)  # fmt: skip


def test_a_large_photograph_is_kept_with_a_limit(shared_dir: Path, album: Path) -> None:
    """Claim: with the limits of the published model it is left out as too long; with --max-pixels its prompt is what
    transformers' processor makes of it under the same limit, id for id and pixel for pixel."""
    folder = shared_dir / "qwen3_vl"
    plain = source_of(album, Renderer.from_folder(folder))
    assert plain.counts.kept == 1 and plain.counts.left_out == {LONG_PROMPT: 1}
    limited = source_of(album, Renderer.from_folder(folder, max_pixels=LIMIT))
    assert limited.counts.kept == 2
    (prompt,) = (one.prompt for one in limited.batch(0) if one.prompt.id == "large")
    size = {"shortest_edge": 256 * 256, "longest_edge": LIMIT}
    oracle = Oracle(folder, images=Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True, size=size))
    shown = [{"type": "image", "image": open_image(album / "images/large.jpg")}, {"type": "text", "text": "What?"}]
    ids, features = oracle([{"role": "user", "content": shown}], add_generation_prompt=True)
    assert list(prompt.token_ids) == ids and len(ids) < 1000
    assert np.array_equal(prompt.images[0].pixel_values_P_D, features["pixel_values"])


@pytest.mark.parametrize(("least", "most"), [(None, 64 * 64), (96 * 96, None), (5000, 9000)])
@pytest.mark.parametrize("size", [(20, 30), (333, 100), (1200, 900)])
def test_servers_see_what_the_run_sees(
    least: int | None, most: int | None, size: tuple[int, int], mini_folder: Path
) -> None:
    """Claim: the picture that is sent has the run's size, and a server, whose limits are the folder's, cuts it into the
    very patches that the policy is trained on (within a level of 8-bit colours, to which they are exact)."""
    server = ImagePreprocessor.from_folder(mini_folder)
    run = with_pixel_limits(server, min_pixels=least, max_pixels=most)
    check_served_limits(run, server)
    image = run(Image.fromarray(np.random.default_rng(2).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)))
    form = RequestFormat(server, image_token_id=498, end_token_ids=[488], never_sampled=[498])
    prompt = Prompt("p", (5, *[498] * run.num_tokens(image.grid_thw), 6), (image,), "")
    ((sent,),) = form.request(prompt, 1, Sampling(max_new_tokens=8))["image_data"]
    seen = server(Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2]))))
    assert seen.grid_thw == image.grid_thw
    assert np.array_equal(seen.pixel_values_P_D, image.pixel_values_P_D)


def test_limits_that_servers_would_not_keep_are_refused(mini_folder: Path) -> None:
    """Claim: beyond the folder's limits a server would resize a picture that the run has resized already."""
    server = ImagePreprocessor.from_folder(mini_folder)
    for least, most, message in (
        (None, 128 * 128 + 1, "--max-pixels 16385 must be at most 16384 with --rollout sglang"),
        (1023, None, "--min-pixels 1023 must be at least 1024 with --rollout sglang"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_served_limits(with_pixel_limits(server, min_pixels=least, max_pixels=most), server)
    check_served_limits(with_pixel_limits(server, min_pixels=1024, max_pixels=128 * 128), server)
