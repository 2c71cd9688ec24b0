"""A Hugging Face folder of a policy becomes a quantised one, through NVIDIA ModelOpt.

The language model's linears are quantised, experts included; the vision tower with its mergers, embeddings, lm_head,
norms and routers are not, and keep every bit of the source. ModelOpt holds the whole model in memory, in its dtype.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_megatron.config.architecture.quant import QuantConfig, Recipe, check_quant
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.conversion.hf.quantised import QUANT_CONFIG, DequantisedFolder
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.conversion.hf.writer import write_hf_folder
from prism_megatron.conversion.resumable import check_space, flush
from prism_megatron.data.model_inputs import transformers_inputs
from prism_megatron.errors import ConfigError, ConversionError
from prism_megatron.types import TokenSequence

Say = Callable[[str], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER = "tokenizer.json"

_CODES = (torch.float8_e4m3fn, torch.uint8)  # of FP8, and of NVFP4 two to a byte
_QUANTISED = (".weight", ".weight_scale", ".weight_scale_2", ".input_scale")
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_LANGUAGE_LINEAR = re.compile(r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(?!gate\.weight$).*")


def check_installed(recipe: Recipe) -> None:
    """Raise ConfigError where ModelOpt, or the device that the recipe needs, is missing."""
    if find_spec("modelopt") is None:
        raise ConfigError(f'--quant {recipe} needs NVIDIA ModelOpt: pip install "prism-megatron[quant]"')
    if recipe == "nvfp4" and not torch.cuda.is_available():
        raise ConfigError(
            "--quant nvfp4 needs a CUDA device, because ModelOpt calibrates it in CUDA kernels and there is none here; "
            "use --quant fp8"
        )


def check_records(config: QuantConfig, files: Path) -> None:
    """Raise ConfigError where records are not named and the model, whose tokenizer is in ``files``, is not the mini."""
    if config.calibrate is None and not _is_mini(files):
        raise ConfigError(
            "--quant measures the range of every linear's input on records: name a folder of them with --calibrate"
        )


def quantise_from(config: QuantConfig, source: Path, target: Path, say: Say) -> None:
    """Quantise the plain folder ``source`` into ``target`` as ``config`` asks, which must name a recipe.

    Raises ConfigError, DataError or ConversionError; ``target`` then does not exist.
    """
    assert config.quant is not None
    check_quant(config)
    check_installed(config.quant)
    rows = calibration_rows(config, source, say)
    quantise_folder(source, target, recipe=config.quant, rows=rows, say=say)


def calibration_rows(config: QuantConfig, source: Path, say: Say) -> Iterator[TokenSequence]:
    """Questions with their reference answers, rendered by the tokenizer of ``source``; images are read one by one.

    Without ``--calibrate`` the mini world's scenes serve the mini, told by its tokenizer. Raises ConfigError for any
    other model, and DataError for records that cannot be used.
    """
    from prism_megatron.data.admission import Checks
    from prism_megatron.data.loader import RecordSource, SceneSource
    from prism_megatron.data.render import Renderer

    wanted = config.calibration_records
    records: RecordSource | SceneSource
    if config.calibrate is not None:
        data = DataConfig()
        records = RecordSource(
            config.calibrate,
            Renderer.from_folder(source, system_prompt=data.system_prompt),
            part="train",
            seed=0,
            batch_size=1,
            max_prompt_tokens=data.max_prompt_tokens,
            max_response_tokens=data.max_response_tokens,
            checks=Checks(has_flags=False),
        )
        say(f"data: {records.counts.text()}")
        kept = records.counts.kept
        if kept < wanted:
            say(f"{config.calibrate} holds {kept} records that can be used: calibrating on all of them")
            wanted = kept
    else:
        check_records(config, source)
        renderer = Renderer.from_folder(source, system_prompt=MINI_ALIGN.data.system_prompt)
        records = SceneSource(renderer, split="align", seed=0, batch_size=1)
    return (
        TokenSequence((*example.prompt.token_ids, *example.reference.token_ids), example.prompt.images)
        for example in (records.example(number) for number in range(wanted))
    )


def quantise_folder(source: Path, target: Path, *, recipe: Recipe, rows: Iterable[TokenSequence], say: Say) -> None:
    """Write ``source`` (plain, experts as transformers 5 keeps them) quantised to ``target``.

    ``rows`` calibrate the inputs of the linears. The folder is written beside ``target`` and renamed into place; an
    older model folder there is replaced then. Raises ConfigError for a dtype that is not computed in, and
    ConversionError where the result would not be the source: a tensor lost, changed or left unquantised, no room.
    """
    if target.exists() and not (target / "config.json").is_file():
        raise ConversionError(f"{target} exists and is not a model folder; choose another place")
    shape = Qwen3VLShape.from_folder(source)
    if shape.dtype not in DTYPES:
        raise ConfigError(f"--quant: {source} is in {shape.dtype}; quantise a model in bfloat16 or float32")
    dtype = DTYPES[shape.dtype]
    folder = HFFolder(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        # The export and, beside it for a moment, the folder made of it.
        check_space(aside, 2 * sum(path.stat().st_size for path in source.glob("*.safetensors")))
        model = calibrated(load(source, folder, dtype), shape, recipe=recipe, rows=rows, say=say)
        if recipe == "fp8":
            round_weights(model)
        export(model, aside / "exported")
        del model
        finished = aside / "finished"
        write_hf_folder(finished, final_tensors(folder, HFFolder(aside / "exported")), like=source)
        _write_configs(finished, source, aside / "exported")
        if recipe == "fp8":
            num = len(DequantisedFolder(finished, dtype=dtype).quantised)
            say(f"{num} weights in float8, {len(folder.names())} tensors of the source accounted for")
        if target.exists():
            target.rename(aside / "replaced")
        finished.rename(target)
        flush(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load(source: Path, folder: HFFolder, dtype: torch.dtype) -> Any:
    """transformers' model of ``source`` in evaluation mode, on a CUDA device where there is one.

    Raises ConversionError unless it holds exactly the tensors of the folder, each with the folder's values.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(
        source, dtype=dtype, local_files_only=True, use_safetensors=True, attn_implementation="sdpa"
    )
    # ModelOpt's export asks for it, and a config need not have it.
    model.config.architectures = [type(model).__name__]
    held = model.state_dict()
    for name in folder.names():
        if name not in held or not torch.equal(held[name], folder.get(name).to(dtype)):
            raise ConversionError(
                f"{source}: transformers' {type(model).__name__} does not hold {name!r} as the folder does; "
                "quantise a policy, with fused experts in the order of transformers 5"
            )
    if lost := sorted(held.keys() - set(folder.names()) - set(model.all_tied_weights_keys)):
        raise ConversionError(f"{source} lacks {lost[0]!r}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def calibrated(
    model: Any, shape: Qwen3VLShape, *, recipe: Recipe, rows: Iterable[TokenSequence], say: Say = lambda _: None
) -> Any:
    """ModelOpt's fake-quantised ``model``: scales from the maxima of weights, and of inputs over ``rows``.

    Raises ConversionError for a linear without a positive maximum, which no scale fits.
    """
    with _quiet():
        import modelopt.torch.quantization as mtq
    tokens = []

    def forward_loop(quantised: Any) -> None:
        for row in rows:
            quantised(**transformers_inputs(row, shape, quantised.device), use_cache=False)
            tokens.append(len(row.token_ids))

    configs: Mapping[Recipe, Any] = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}
    with _quiet():
        model = mtq.quantize(model, configs[recipe], forward_loop)
    for name, module in model.named_modules():
        if getattr(module, "is_enabled", False):
            maximum = module.amax
            if maximum is None or not (torch.isfinite(maximum) & (maximum > 0)).all():
                raise ConversionError(
                    f"{name} measured no maximum above zero, so it has no scale; give more or other records"
                )
    say(f"calibrated on {len(tokens)} records, {sum(tokens):,} tokens")
    return model


@torch.no_grad()
def round_weights(model: Any) -> None:
    """Replace the weights of a model calibrated for FP8 by what its forward pass makes of them, in place.

    ModelOpt's export divides by the scale in the model's dtype, which in bfloat16 gives a few codes in a hundred other
    values than the forward pass has. Weights that lie on codes already leave it no choice.
    """
    for module in model.modules():
        for weight, quantizer in getattr(module, "iter_weights_for_calibration", tuple)():
            if quantizer.is_enabled:
                weight.copy_(quantizer(weight))


def export(model: Any, folder: Path) -> None:
    """Write what ModelOpt exports of a calibrated model to ``folder``. The model is of no use afterwards."""
    with _quiet():
        from modelopt.torch.export import export_hf_checkpoint

        export_hf_checkpoint(model, export_dir=folder)


def final_tensors(source: HFFolder, exported: HFFolder) -> Iterator[tuple[str, Tensor]]:
    """The quantised linears as exported; every other tensor from ``source``, as it is stored there.

    Raises ConversionError unless the export holds codes and scales for all language linears and for nothing else, and
    every other tensor with the source's values. A tied ``lm_head.weight`` may be missing there.
    """
    held, shapes = exported.dtypes(), source.shapes()
    linears = {name for name, shape in shapes.items() if len(shape) > 1 and _LANGUAGE_LINEAR.fullmatch(name)}
    modules = {module for name in linears for module in quantised_modules(name, shapes[name])}
    for module in sorted(modules):
        if held.get(f"{module}.weight") not in _CODES or f"{module}.weight_scale" not in held:
            raise ConversionError(f"ModelOpt left {module!r} unquantised")
    quantised = [name for name in sorted(held) if name.rpartition(".")[0] in modules and name.endswith(_QUANTISED)]
    plain = [name for name in source.names() if name not in linears]
    if strange := sorted(held.keys() - set(quantised) - set(plain)):
        raise ConversionError(f"ModelOpt exported {strange[0]!r}, which belongs to no language linear")
    for name in quantised:
        yield name, exported.get(name)
    for name in plain:
        tensor = source.get(name)
        if name in held:
            kept = exported.get(name)
            if not torch.equal(kept, tensor.to(kept.dtype)):
                raise ConversionError(f"ModelOpt changed {name!r}, which was not to be quantised")
        elif name != "lm_head.weight":
            raise ConversionError(f"ModelOpt lost {name!r}")
        yield name, tensor


def quantised_modules(name: str, shape: tuple[int, ...]) -> list[str]:
    """The linears that a tensor of the source becomes: its own module, or each expert's of a fused tensor."""
    prefix, _, leaf = name.rpartition(".")
    if leaf == "weight":
        return [prefix]
    return [f"{prefix}.{expert}.{part}" for expert in range(shape[0]) for part in _FUSED[leaf]]


def _write_configs(finished: Path, source: Path, exported: Path) -> None:
    """The source's ``config.json`` with ModelOpt's ``quantization_config``, and the file that engines read."""
    config, theirs = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (source, exported))
    config["quantization_config"] = theirs["quantization_config"]
    (finished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(exported / QUANT_CONFIG, finished / QUANT_CONFIG)
    for path in (finished / "config.json", finished / QUANT_CONFIG, finished):
        flush(path)


def _is_mini(folder: Path) -> bool:
    mine, minis = (path / TOKENIZER for path in (folder, MINI_FOLDER / "policy"))
    return mine.is_file() and mine.read_bytes() == minis.read_bytes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints what it detects and warns of versions; what it made is checked here, tensor by tensor."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
