"""Claim: quantising is refused, with the flag, where it cannot work; calibration reads what was asked for.

Blind spot: the quantisation itself (``tests/parity/test_quantise.py``).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from prism_megatron.config.architecture.quant import QuantConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.data.render import Renderer
from prism_megatron.errors import ConfigError, ConversionError
from prism_megatron.jobs import quantise
from prism_megatron.jobs.quantise import (
    calibration_rows,
    check_installed,
    final_tensors,
    quantise_folder,
    quantised_modules,
)

MINI = MINI_FOLDER / "policy"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The mini's companions with another tokenizer: a model that the mini world's scenes are not for."""
    folder = tmp_path / "other"
    shutil.copytree(MINI, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "tokenizer.json").write_text((MINI / "tokenizer.json").read_text(encoding="utf-8") + "\n")
    return folder


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Six records with references."""
    folder = tmp_path / "records"
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(6):
        Image.new("RGB", (64, 32), (number, 0, 0)).save(folder / "images" / f"{number}.png")
        line = {"id": f"r-{number}", "image": f"images/{number}.png", "question": "How many?", "choices": None}
        line |= {"answer": "1", "answer_type": "integer", "solution": "One.", "caption": "- red", "source": "set"}
        lines.append(json.dumps(line))
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'pip install "prism-megatron\[quant\]"'):
        check_installed("fp8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_nvfp4_needs_cuda() -> None:
    check_installed("fp8")
    with pytest.raises(ConfigError, match=r"--quant nvfp4 needs a CUDA device.* use --quant fp8"):
        check_installed("nvfp4")


def test_scenes_serve_the_mini_only(other: Path) -> None:
    """Claim: as many scenes as asked, question and reference; another model needs ``--calibrate``."""
    config = QuantConfig(quant="fp8", calibration_records=3)
    rows = list(calibration_rows(config, MINI, print))
    end = Renderer.from_folder(MINI).end_token_id
    assert [(len(row.images), row.token_ids[-1]) for row in rows] == [(1, end)] * 3
    assert len({row.token_ids for row in rows}) == 3
    with pytest.raises(ConfigError, match="--calibrate"):
        calibration_rows(config, other, print)


def test_records_are_used_once(other: Path, records: Path) -> None:
    """Claim: where fewer records can be used than asked, each is used once, and that is said."""
    said: list[str] = []
    config = QuantConfig(quant="fp8", calibrate=records, calibration_records=50)
    rows = list(calibration_rows(config, other, said.append))
    assert 0 < len(rows) <= 6
    assert len({row.images[0].pixel_values_P_D.tobytes() for row in rows}) == len(rows)
    assert said[0].startswith(f"data: {len(rows)} of 6 lines are used")
    assert f"holds {len(rows)} records" in said[1]


LAYER = "model.language_model.layers.0"
SOURCE = {
    f"{LAYER}.self_attn.q_proj.weight": torch.tensor([[1.0, 2.0]]),
    f"{LAYER}.mlp.experts.down_proj": torch.ones(2, 3, 4),
    f"{LAYER}.mlp.gate.weight": torch.tensor([[0.1, 0.2]]),
    "model.language_model.norm.weight": torch.tensor([0.3]),
    "model.visual.fc.weight": torch.tensor([[0.7, 0.1]]),
    "lm_head.weight": torch.tensor([[0.5, 0.9]]),
}
LINEARS = (f"{LAYER}.self_attn.q_proj", *(f"{LAYER}.mlp.experts.{expert}.down_proj" for expert in (0, 1)))
CODES = {f"{name}.weight": torch.ones(2, 2).to(torch.float8_e4m3fn) for name in LINEARS}
SCALES = {f"{name}.{kind}": torch.tensor(2.0) for name in LINEARS for kind in ("weight_scale", "input_scale")}
PLAIN = {name: t.bfloat16() for name, t in SOURCE.items() if not name.startswith((f"{LAYER}.self", f"{LAYER}.mlp.e"))}


def finals(folder: Path, change: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """What is written of ``SOURCE`` where ModelOpt exported codes, scales and the rest in bfloat16, changed so."""
    exported = {name: t for name, t in (CODES | SCALES | PLAIN | change).items() if t is not None}
    for name, tensors in (("source", SOURCE), ("exported", exported)):
        (folder / name).mkdir(exist_ok=True)
        save_file(tensors, folder / name / "model.safetensors")
    return dict(final_tensors(HFFolder(folder / "source"), HFFolder(folder / "exported")))


def test_what_is_not_quantised_keeps_every_bit(tmp_path: Path) -> None:
    """Claim: codes and scales as exported, all else as the source has it, router and vision tower included; a tied
    output layer may be missing from the export."""
    changes: tuple[dict[str, Tensor | None], ...] = ({}, {"lm_head.weight": None})
    for change in changes:
        found = finals(tmp_path, change)
        assert found.keys() == CODES.keys() | SCALES.keys() | PLAIN.keys()
        for name in PLAIN:
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], SOURCE[name])
        for name, tensor in (CODES | SCALES).items():
            assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LINEARS[0]}.weight": torch.ones(1, 2)}, f"left '{LINEARS[0]}' unquantised"),
        ({f"{LINEARS[2]}.weight_scale": None}, f"left '{LINEARS[2]}' unquantised"),
        ({f"{LINEARS[1]}.weight": None}, f"left '{LINEARS[1]}' unquantised"),
        ({"model.visual.fc.weight": torch.tensor([[0.7, 0.2]]).bfloat16()}, "changed 'model.visual.fc.weight'"),
        ({"model.language_model.norm.weight": None}, "lost 'model.language_model.norm.weight'"),
        ({"model.visual.fc.weight_scale": torch.ones(1)}, "exported 'model.visual.fc.weight_scale', which belongs to"),
    ],
)
def test_an_export_that_is_not_the_source_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    """Claim: a tensor left, changed, lost or added by ModelOpt is named."""
    with pytest.raises(ConversionError, match=message.replace(".", r"\.")):
        finals(tmp_path, change)


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConversionError, match="exists and is not a model folder"):
        quantise_folder(MINI, tmp_path, recipe="fp8", rows=[], say=print)


def test_sources_that_cannot_be_quantised(tmp_path: Path) -> None:
    """Claim: a discriminator, and a model in a dtype that is not computed in, are refused with the reason."""
    target = tmp_path / "target"
    with pytest.raises(ConversionError, match=r"does not hold .*experts.* quantise a policy"):
        quantise_folder(MINI_FOLDER / "discriminator", target, recipe="fp8", rows=[], say=print)
    half = tmp_path / "half"
    shutil.copytree(MINI, half)
    config = json.loads((half / "config.json").read_text(encoding="utf-8"))
    (half / "config.json").write_text(json.dumps(config | {"dtype": "float16"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"float16.*bfloat16 or float32"):
        quantise_folder(half, target, recipe="fp8", rows=[], say=print)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_fused_experts_become_linears() -> None:
    layer = "model.language_model.layers.0"
    assert quantised_modules(f"{layer}.mlp.up_proj.weight", (8, 4)) == [f"{layer}.mlp.up_proj"]
    experts = f"{layer}.mlp.experts"
    assert quantised_modules(f"{experts}.down_proj", (2, 4, 8)) == [f"{experts}.{e}.down_proj" for e in (0, 1)]
    assert quantised_modules(f"{experts}.gate_up_proj", (1, 16, 4)) == [
        f"{experts}.0.gate_proj",
        f"{experts}.0.up_proj",
    ]
