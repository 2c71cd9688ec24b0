"""Folders in block-wise FP8 read as plain ones; every contradiction in them is refused.

Oracles: a loop over blocks in float64, and transformers' own dequantisation where blocks divide (it takes no others).
Blind spot: a published folder; the format is that of transformers and of a server that reads the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from prism_megatron.conversion.hf.block_fp8 import BlockSize, DequantisedSource, dequantised_config, quantised_blocks
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.conversion.hf.reader import SINGLE
from prism_megatron.errors import ConversionError
from tests.unit.conversion.held import Held

BLOCK = BlockSize(4, 3)
SETTINGS: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [4, 3],
    "modules_to_not_convert": ["lm_head", "model.visual.merger"],
}
Q, FUSED, NORM = "layers.0.q_proj.weight", "layers.0.mlp.experts.gate_up_proj", "norm.weight"


def quantised(shape: tuple[int, ...], *, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight = (torch.randn(shape) * 50).to(torch.float8_e4m3fn)
    return weight, (torch.rand(BLOCK.grid(shape)) / 100 + 1e-4).to(scale_dtype)


def in_blocks(weight: Tensor, scales: Tensor) -> Tensor:
    """Block by block in float64."""
    made = torch.zeros(weight.shape, dtype=torch.float64)
    *lead, rows, columns = weight.shape
    for n in range(weight[..., 0, 0].numel()):
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(n), lead)) if lead else ()
        for i in range(rows):
            for j in range(columns):
                scale = scales[(*at, i // BLOCK.rows, j // BLOCK.columns)]
                made[(*at, i, j)] = weight[(*at, i, j)].double() * scale.double()
    return made


def stored() -> dict[str, Tensor]:
    torch.manual_seed(1)
    held = {NORM: torch.randn(5).to(torch.bfloat16)}
    for name, shape in ((Q, (9, 7)), (FUSED, (3, 8, 5))):
        held[name], held[f"{name}_scale_inv"] = quantised(shape)
    return held


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / SINGLE)
    return folder


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 13),
    columns=st.integers(1, 10),
    experts=st.sampled_from([None, 2]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_dequantised_as_block_by_block(
    *, rows: int, columns: int, experts: int | None, dtype: torch.dtype, scale_dtype: torch.dtype, seed: int
) -> None:
    """Claim: matrices and fused experts, with ragged last blocks, are the float64 products to one rounding of dtype
    (a product is rounded to float32 first), whole and in any range of rows."""
    torch.manual_seed(seed)
    shape = (rows, columns) if experts is None else (experts, rows, columns)
    weight, scales = quantised(shape, scale_dtype=scale_dtype)
    source = DequantisedSource(Held({"x": weight, "x_scale_inv": scales}), BLOCK, dtype)
    found, expected = source.get("x"), in_blocks(weight, scales)
    assert found.dtype == dtype
    assert source.shapes() == {"x": shape}
    tiny = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=tiny)
    for index in range(shape[0]):
        assert torch.equal(source.get_slice("x", index), found[index])
        for stop in range(index, shape[0] + 1):
            assert torch.equal(source.get_rows("x", index, stop), found[index:stop])


def test_dequantised_as_transformers_does() -> None:
    """Claim: bit for bit, in the dtype of the model."""
    torch.manual_seed(0)
    weight, scales = quantised((12, 9))
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=torch.bfloat16)
    source = DequantisedSource(Held({"x": weight, "x_scale_inv": scales}), BLOCK, torch.bfloat16)
    assert torch.equal(source.get("x"), expected)


def test_a_folder_opens_under_its_plain_names(tmp_path: Path) -> None:
    """Claim: no scale is left; what is not quantised is as stored; another folder opens as it is."""
    held = stored()
    config = {"dtype": "bfloat16", "quantization_config": SETTINGS}
    opened = open_weights(write(tmp_path / "fp8", held, config), dtype=torch.float32)
    assert sorted(opened.names()) == sorted([Q, FUSED, NORM])
    assert opened.shapes() == {NORM: (5,), Q: (9, 7), FUSED: (3, 8, 5)}
    assert opened.dtypes() == {NORM: torch.bfloat16, Q: torch.float32, FUSED: torch.float32}
    assert torch.equal(opened.get(NORM), held[NORM])
    expected = in_blocks(held[FUSED], held[f"{FUSED}_scale_inv"]).float()
    assert torch.equal(opened.get_slice(FUSED, 2), expected[2])
    for read in (opened.get, lambda name: opened.get_slice(name, 0)):
        with pytest.raises(ConversionError, match="no tensor 'nope'"):
            read("nope")
    plain = open_weights(write(tmp_path / "plain", {NORM: held[NORM]}, {"dtype": "bfloat16"}))
    assert torch.equal(plain.get(NORM), held[NORM])


def test_a_slice_of_fused_experts_reads_no_more() -> None:
    source = Held(stored())
    DequantisedSource(source, BLOCK, torch.bfloat16).get_slice(FUSED, 1)
    assert source.read_whole == []


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda held: held.pop(f"{Q}_scale_inv"), f"scales '{Q}_scale_inv' are missing"),
    "extra": (lambda held: held.update({f"{NORM}_scale_inv": torch.ones(1)}), f"scales '{NORM}', which is not"),
    "per tensor": (lambda held: held.update({f"{Q}_scale_inv": torch.ones(1)}), r"has shape \(1,\).*\(3, 3\)"),
    "transposed": (lambda held: held.update({f"{FUSED}_scale_inv": torch.ones(3, 2, 3)}), r"\(3, 2, 3\).*\(3, 2, 2\)"),
    "wrong type": (lambda held: held.update({f"{Q}_scale_inv": torch.ones(3, 3).half()}), "of type torch.float16"),
    "vector": (lambda held: held.update({NORM: torch.ones(5).to(torch.float8_e4m3fn), f"{NORM}_scale_inv":
               torch.ones(1)}), "neither a matrix nor a stack"),
    "e5m2": (lambda held: held.update({NORM: torch.ones(5).to(torch.float8_e5m2)}), "float8_e5m2.*does not use"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, change: str) -> None:
    held = stored()
    alter, message = CHANGES[change]
    alter(held)
    with pytest.raises(ConversionError, match=message):
        open_weights(write(tmp_path / "m", held, {"quantization_config": SETTINGS}))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, number: float) -> None:
    held = stored()
    held[f"{Q}_scale_inv"][1, 1] = number
    opened = open_weights(write(tmp_path / "m", held, {"quantization_config": SETTINGS}))
    with pytest.raises(ConversionError, match=f"'{Q}_scale_inv' holds numbers that are not finite"):
        opened.get(Q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"quant_method": name}, f"quantised by '{name}'") for name in ("awq", "gptq", "modelopt", "bitsandbytes")),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "quantised by 'compressed-tensors'"),
        ({"quant_method": None}, "quantised by None"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"weight_block_size": None}, "weight_block_size is None"),
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"weight_block_size": [128, True]}, "expected two positive sizes"),
        ({"weight_block_size": [0, 128]}, "expected two positive sizes"),
    ],
)
def test_other_quantisations_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Claim: by the config alone, with what to do."""
    folder = write(tmp_path / "m", stored(), {"quantization_config": SETTINGS | change})
    with pytest.raises(ConversionError, match=message + ".*give the model that it was made from"):
        open_weights(folder)


def test_quantised_weights_that_no_config_explains_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"stored in float8_e4m3fn, which config.json has no quantization_config"):
        open_weights(write(tmp_path / "a", stored(), {}))
    with pytest.raises(ConversionError, match=r"stored in uint8, which config.json has no quantization_config"):
        open_weights(write(tmp_path / "b", {"x": torch.zeros(2, dtype=torch.uint8)}, {}))
    folder = write(tmp_path / "c", {NORM: torch.ones(5)}, {})
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ConversionError, match="quantised by modelopt"):
        open_weights(folder)
    with pytest.raises(ConversionError, match="expected a JSON object"):
        quantised_blocks({"quantization_config": "fp8"}, "config.json")
    for number, text in enumerate(("[]", "{")):
        folder = write(tmp_path / f"d{number}", {NORM: torch.ones(5)}, {})
        (folder / "config.json").write_text(text)
        with pytest.raises(ConversionError, match=r"expected a JSON object|cannot be read as JSON"):
            open_weights(folder)


def test_the_config_of_what_was_dequantised() -> None:
    """Claim: the quantisation is gone, the dtype stands under the key the folder used, the original is untouched."""
    config: dict[str, Any] = {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "x": 1},
        "quantization_config": SETTINGS,
    }
    before = json.dumps(config)
    assert dequantised_config(config) == {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "x": 1}}
    assert json.dumps(config) == before
    assert quantised_blocks(config, "config.json") == BLOCK
