"""Claim: a folder written by ``--quant fp8`` holds the model that ModelOpt calibrated, and nothing else was touched.

Oracle: ModelOpt's fake-quantised model of the same source and records, made here without ``round_weights`` and without
the export; and the source's own tensors. Our reading of the written folder has to reproduce both.
Blind spot: how inference engines read the folder; NVFP4, which needs a GPU; a forward pass of quantised experts (their
codes are compared).
"""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from prism_megatron.config.architecture.quant import QuantConfig
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.conversion.hf.quantised import DequantisedFolder
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.model_inputs import transformers_inputs
from prism_megatron.data.render import Renderer
from prism_megatron.errors import DataError, PrismError
from prism_megatron.jobs import quantise
from prism_megatron.jobs.quantise import calibration_rows, quantise_folder, quantise_from
from prism_megatron.parity.samples import sample_sets
from prism_megatron.parity.tiny import tiny_config, tiny_model
from prism_megatron.types import TokenSequence

CPU = torch.device("cpu")
CALIBRATE = QuantConfig(quant="fp8", calibration_records=8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Neighbouring codes are at least 1/16 apart, so these tell every code from its neighbours. ModelOpt divides by
# 448 / maximum where the folder has maximum / 448: a few roundings in float32, and one unit in bfloat16.
RELATIVE = {"float32": 2**-21, "bfloat16": 2**-7}


def quiet(_: str) -> None: ...


def mini(folder: Path, *, dtype: str) -> Path:
    """The mini stating ``dtype``, its vision tower trained on, as it were: none of its tensors is the shipped one any
    more. Tensors are stored in bfloat16."""
    shutil.copytree(MINI_FOLDER / "policy", folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("model.visual."):
            shipped = tensor.clone()
            tensor.add_(0.01 * torch.randn_like(tensor))
            assert not torch.equal(tensor, shipped)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}), encoding="utf-8")
    return folder


def plain_model(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def fake_quantised(folder: Path, dtype: torch.dtype, rows: Sequence[TokenSequence], shape: Qwen3VLShape) -> Any:
    """The oracle: ModelOpt's own call, with its own recipe."""
    import modelopt.torch.quantization as mtq

    def forward(model: Any) -> None:
        for row in rows:
            logits(model, row, shape)

    return mtq.quantize(plain_model(folder, dtype), mtq.FP8_DEFAULT_CFG, forward)


@torch.no_grad()
def logits(model: Any, row: TokenSequence, shape: Qwen3VLShape) -> Tensor:
    """``[S, V]`` float32."""
    scores: Tensor = model(**transformers_inputs(row, shape, CPU), use_cache=False).logits[0].float()
    return scores


def fake_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every weight that the oracle's forward pass uses in place of the stored one."""
    for name, module in model.named_modules():
        for number, (weight, quantizer) in enumerate(getattr(module, "iter_weights_for_calibration", tuple)()):
            if not quantizer.is_enabled:
                continue
            if not name.endswith(".experts"):
                yield f"{name}.weight", quantizer(weight)
                continue
            projection, expert = divmod(number, module.num_experts)
            parts = ("gate_proj", "up_proj") if projection == 0 else ("down_proj",)
            for part, values in zip(parts, quantizer(weight).chunk(len(parts)), strict=True):
                yield f"{name}.{expert}.{part}.weight", values


def as_written(folder: Path, source: Path) -> Any:
    """A plain transformers model with our reading of the written weights, and inputs rounded by the written scales."""
    model = plain_model(source, torch.float32)
    ours, stored, held = DequantisedFolder(folder, dtype=torch.float32), HFFolder(folder), model.state_dict()
    for name in ours.names():
        held[name].copy_(ours.get(name))
    for name in ours.quantised:
        scale = stored.get(name.removesuffix("weight") + "input_scale")

        def rounded(_: Any, inputs: tuple[Tensor], scale: Tensor = scale) -> Tensor:
            return (inputs[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(rounded)
    return model


def check_untouched(folder: Path, source: Path) -> None:
    """Every tensor that is not quantised is the source's, bit by bit and in its dtype; the whole vision tower is."""
    written, original = HFFolder(folder), HFFolder(source)
    quantised = DequantisedFolder(folder, dtype=torch.float32).quantised
    scales = {name for name in written.names() if name.endswith("_scale")}
    plain = set(written.names()) - quantised - scales
    assert plain == {name for name in original.names() if name not in quantised and ".experts." not in name}
    assert any(name.startswith("model.visual.") for name in plain)
    for name in plain:
        mine, theirs = written.get(name), original.get(name)
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), name


def check_codes(folder: Path, oracle: Any, dtype: str) -> None:
    """Our reading of the written weights is what the oracle's forward pass uses, for exactly its quantised weights."""
    ours = DequantisedFolder(folder, dtype=DTYPES[dtype])
    expected = dict(fake_weights(oracle))
    assert ours.quantised == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(ours.get(name), values, rtol=RELATIVE[dtype], atol=0.0, msg=name)


def check_linears(folder: Path, oracle: Any, rows: Sequence[TokenSequence], shape: Qwen3VLShape, dtype: str) -> None:
    """Every quantised linear, on the inputs that it has in the oracle's forward pass, does with the written weights and
    scales what it does there: its inputs become the same codes, and its outputs agree to the rounding of ``dtype``.

    Where an input lies on a border between codes, the last bit of the scale decides: one in 100,000 may differ.
    """
    ours, stored = DequantisedFolder(folder, dtype=DTYPES[dtype]), HFFolder(folder)
    inputs_seen = other_codes = 0
    worst = 0.0
    for name in sorted(ours.quantised):
        weight, scale = ours.get(name), stored.get(name.removesuffix("weight") + "input_scale")

        def compare(
            linear: Any, inputs: tuple[Tensor], output: Tensor, weight: Tensor = weight, scale: Tensor = scale
        ) -> None:
            nonlocal inputs_seen, other_codes, worst
            rounded = linear.input_quantizer(inputs[0])
            mine, theirs = ((values.float() / scale).clamp(-448, 448) for values in (inputs[0], rounded))
            other_codes += int((mine.to(torch.float8_e4m3fn) != theirs.to(torch.float8_e4m3fn)).sum())
            inputs_seen += rounded.numel()
            error = torch.nn.functional.linear(rounded, weight) - output
            worst = max(worst, float(error.abs().max() / output.abs().max()))

        oracle.get_submodule(name.removesuffix(".weight")).register_forward_hook(compare)
    for row in rows:
        logits(oracle, row, shape)
    print(f"{dtype}: {other_codes} of {inputs_seen:,} inputs have another code; outputs differ by {worst:.1e} at most")
    assert inputs_seen > 0
    assert other_codes <= 1e-5 * inputs_seen
    assert worst <= 4 * RELATIVE[dtype]


def check_forward(folder: Path, source: Path, oracle: Any, rows: Sequence[TokenSequence], shape: Qwen3VLShape) -> None:
    """The written folder alone gives the oracle's logits up to a fifth of what FP8 changes, in root mean square.

    Not closer, because scales differ in their last bit (``RELATIVE``): an input that then falls on the other side of a
    border moves by a whole code, and moves others. ``check_linears`` compares without that.
    """
    original, written = plain_model(source, torch.float32), as_written(folder, source)
    error = change = 0.0
    for row in rows:
        expected = logits(oracle, row, shape)
        error += (logits(written, row, shape) - expected).square().sum().item()
        change += (logits(original, row, shape) - expected).square().sum().item()
    print(f"the written folder's logits differ from the oracle's by {(error / change) ** 0.5:.3f} of FP8's own change")
    assert error < 0.2**2 * change


def logprob_change(folder: Path, source: Path, *, num_scenes: int) -> Tensor:
    """``[T]``: written minus original log-prob of every token of the references of held-out scenes."""
    shape, renderer = Qwen3VLShape.from_folder(source), Renderer.from_folder(source)
    models = as_written(folder, source), plain_model(source, torch.float32)
    scenes, changes = SceneSource(renderer, split="heldout", seed=0, batch_size=1), []
    for number in range(num_scenes):
        example = scenes.example(number)
        answer = example.reference.token_ids
        row = TokenSequence((*example.prompt.token_ids, *answer), example.prompt.images)
        written, original = (
            logits(model, row, shape)[-len(answer) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            for model in models
        )
        changes.append((written - original)[:, 0])
    return torch.cat(changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mini(tmp_path: Path, dtype: str) -> None:
    """Claims: codes and forward pass are the fake-quantised model's; the rest, vision tower included, is the source's
    bit by bit; reference answers of 32 held-out scenes keep their log-probs to 0.05 a token on average (printed)."""
    source, target = mini(tmp_path / "source", dtype=dtype), tmp_path / "target"
    quantise_from(CALIBRATE, source, target, quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}
    assert {path.name for path in target.iterdir()} == {p.name for p in source.iterdir()} | {"hf_quant_config.json"}
    check_untouched(target, source)
    shape = Qwen3VLShape.from_folder(source)
    rows = list(calibration_rows(CALIBRATE, source, quiet))
    oracle = fake_quantised(source, DTYPES[dtype], rows, shape)
    check_codes(target, oracle, dtype)
    check_linears(target, oracle, rows, shape, dtype)
    if dtype == "bfloat16":
        return
    check_forward(target, source, oracle, rows, shape)
    change = logprob_change(target, source, num_scenes=32)
    print(
        f"log-probs of {len(change)} tokens of 32 held-out references: mean change {change.mean():+.5f}, "
        f"mean absolute {change.abs().mean():.5f}, largest {change.abs().max():.4f}"
    )
    assert 0.0 < change.abs().mean() < 0.05


def test_experts(tmp_path: Path) -> None:
    """Claim: fused experts are quantised one by one, each with its own scale; routers are not."""
    source, target = tmp_path / "source", tmp_path / "target"
    tiny_model(tiny_config(taps=(0, 1, 2), tied=False, vocab=301, num_experts=8)).save_pretrained(source)
    shape = Qwen3VLShape.from_folder(source)
    rows = [sample.row for sample in sample_sets()["three sizes"]]
    quantise_folder(source, target, recipe="fp8", rows=rows, say=quiet)
    check_untouched(target, source)
    check_codes(target, fake_quantised(source, torch.float32, rows, shape), "float32")
    names = HFFolder(target).names()
    assert sum(".experts." in name and name.endswith(".weight") for name in names) == shape.text.num_layers * 8 * 3
    assert "model.language_model.layers.0.mlp.gate.weight_scale" not in names


@pytest.mark.slow
def test_2b_widths(shared_dir: Path, tmp_path: Path) -> None:
    """Claim: as in ``test_mini``, for four layers of the published 2B widths with random weights in float32, the real
    vocabulary and tokenizer, and two vision blocks."""
    source, target = tmp_path / "source", tmp_path / "target"
    config = json.loads((shared_dir / "qwen3_vl" / "configs" / "2B.json").read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = 4
    config["vision_config"] |= {"depth": 2, "deepstack_visual_indexes": [0, 1]}
    config["dtype"] = "float32"
    model = Qwen3VLForConditionalGeneration._from_config(Qwen3VLConfig.from_dict(config), dtype=torch.float32)
    model.save_pretrained(source)
    del model
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copyfile(shared_dir / "qwen3_vl" / name, source / name)
    shape, scenes = (
        Qwen3VLShape.from_folder(source),
        SceneSource(Renderer.from_folder(source), split="align", seed=0, batch_size=1),
    )
    assert (shape.text.hidden, shape.text.vocab, shape.text.num_layers) == (2048, 151936, 4)
    examples = [scenes.example(number) for number in range(4)]
    rows = [TokenSequence((*one.prompt.token_ids, *one.reference.token_ids), one.prompt.images) for one in examples]
    started = time.monotonic()
    quantise_folder(source, target, recipe="fp8", rows=rows, say=print)
    print(f"{time.monotonic() - started:.0f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    check_untouched(target, source)
    oracle = fake_quantised(source, torch.float32, rows, shape)
    check_codes(target, oracle, "float32")
    check_linears(target, oracle, rows, shape, "float32")


@pytest.mark.parametrize("problem", ["data", "export", "taken"])
def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    """Claim: records that fail, an export unlike the source, and a place that is taken leave the target as it was."""
    source, target = mini(tmp_path / "source", dtype="bfloat16"), tmp_path / "target"

    def rows() -> Iterator[TokenSequence]:
        yield from itertools.islice(calibration_rows(CALIBRATE, source, quiet), 1)
        if problem == "data":
            raise DataError("record 2 is broken")

    def lossy(model: Any, folder: Path) -> None:
        model.model.visual.pos_embed.weight.data += 1
        plain_export(model, folder)

    plain_export = quantise.export
    if problem == "export":
        monkeypatch.setattr(quantise, "export", lossy)
    if problem == "taken":
        target.mkdir()
    expected = {"data": "record 2", "export": r"changed 'model\.visual\.pos_embed\.weight'", "taken": "another place"}
    with pytest.raises(PrismError, match=expected[problem]):
        quantise_folder(source, target, recipe="fp8", rows=rows(), say=quiet)
    left = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert left == ({"source", "target"} if problem == "taken" else {"source"})
