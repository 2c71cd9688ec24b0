"""Reads what ``--quant fp8`` wrote (ModelOpt's form of a Hugging Face folder) back into plain weights.

A quantised linear keeps ``weight`` (float8_e4m3fn codes), ``weight_scale`` and ``input_scale`` (one float32 number
each); its weight is codes times ``weight_scale``. ``config.json`` says which modules are *not* quantised. The rounding
to codes cannot be undone: the weights read here are the ones the quantised model computes with, not those it came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.errors import ConversionError

QUANT_METHOD = "modelopt"
"""``quantization_config.quant_method`` of the folders read here."""
QUANT_CONFIG = "hf_quant_config.json"
"""The file beside ``config.json`` that says the same to inference engines."""
SCALE, INPUT_SCALE = "weight_scale", "input_scale"

_CODES = torch.float8_e4m3fn


@dataclass(frozen=True)
class Quantisation:
    """``quant_algo`` (``FP8``, ``NVFP4``) and the patterns of the modules that are left as they are."""

    algo: str
    ignore: tuple[str, ...]

    def covers(self, module: str) -> bool:
        """Whether an inference engine takes this linear to be quantised."""
        return not any(fnmatchcase(module, pattern) for pattern in self.ignore)


def read_quantisation(folder: Path) -> Quantisation:
    """What ``config.json`` of ``folder`` says. Raises ConversionError where that is nothing, or of another method."""
    path = folder / "config.json"
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read as a model's config: {error}") from error
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        raise ConversionError(f"{path}: quantization_config with quant_method {QUANT_METHOD!r} expected")
    algo, ignore = found.get("quant_algo"), found.get("ignore")
    if not isinstance(algo, str) or not isinstance(ignore, list) or not all(isinstance(one, str) for one in ignore):
        raise ConversionError(f"{path}: quantization_config needs quant_algo, a text, and ignore, a list of texts")
    return Quantisation(algo, tuple(ignore))


class DequantisedFolder(TensorSource):
    """The weights of a quantised folder in ``dtype``; what was not quantised is given as it is stored.

    Scales are no weights and have no names here. The scales of the inputs are left out: they change no weight.
    """

    def __init__(self, folder: str | Path, *, dtype: torch.dtype) -> None:
        """Opens and checks the whole folder.

        Raises ConversionError as HFFolder does, for other quantisations than FP8 with one scale a tensor, and where
        the tensors are not what ``config.json`` claims: a linear it calls quantised without codes or a scale, codes or
        a scale that it does not cover, a scale that is no positive number.
        """
        self._folder = HFFolder(folder)
        self._dtype = dtype
        quantisation = read_quantisation(self._folder.folder)
        if quantisation.algo != "FP8":
            raise ConversionError(
                f"{folder}: quant_algo {quantisation.algo!r} is not read back; convert the folder it was made from"
            )
        self._scales = self._checked_scales(quantisation)

    @property
    def quantised(self) -> frozenset[str]:
        """Names of the weights that are stored as codes."""
        return frozenset(self._scales)

    def names(self) -> Sequence[str]:
        """All weights, sorted."""
        return [name for name in self._folder.names() if not name.endswith((f".{SCALE}", f".{INPUT_SCALE}"))]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every weight, from the file headers."""
        shapes = self._folder.shapes()
        return {name: shapes[name] for name in self.names()}

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype that ``get`` returns for every weight."""
        stored = self._folder.dtypes()
        return {name: self._dtype if name in self._scales else stored[name] for name in self.names()}

    def get(self, name: str) -> Tensor:
        """One full weight; codes times scale, multiplied in float32 and rounded to ``dtype`` once."""
        return self._plain(name, self._folder.get(name))

    def get_slice(self, name: str, index: int) -> Tensor:
        """One entry of dimension 0, read without the rest."""
        return self._plain(name, self._folder.get_slice(name, index))

    def get_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of dimension 0, read without the rest."""
        return self._plain(name, self._folder.get_rows(name, start, stop))

    def _plain(self, name: str, stored: Tensor) -> Tensor:
        if name not in self._scales:
            return stored
        return (stored.to(torch.float32) * self._scales[name]).to(self._dtype)

    def _checked_scales(self, quantisation: Quantisation) -> dict[str, Tensor]:
        where, dtypes, shapes = self._folder.folder, self._folder.dtypes(), self._folder.shapes()
        scaled = {name.removesuffix(SCALE) + "weight" for name in dtypes if name.endswith(f".{SCALE}")}
        coded = {name for name, dtype in dtypes.items() if dtype == _CODES}
        inputs = {name.removesuffix(INPUT_SCALE) + "weight" for name in dtypes if name.endswith(f".{INPUT_SCALE}")}
        claimed = {
            name
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) > 1 and quantisation.covers(name.removesuffix(".weight"))
        }
        for held, what in ((coded, "float8 codes"), (scaled, SCALE), (inputs, INPUT_SCALE)):
            if missing := sorted(claimed - held):
                raise ConversionError(f"{where}: config.json calls {missing[0]!r} quantised, but it has no {what}")
            if unclaimed := sorted(held - claimed):
                raise ConversionError(f"{where}: {unclaimed[0]!r} has {what}, but config.json does not cover it")
        return {name: self._scale(name) for name in sorted(claimed)}

    def _scale(self, name: str) -> Tensor:
        scale = self._folder.get(name.removesuffix("weight") + SCALE)
        if scale.numel() != 1 or not (torch.isfinite(scale) & (scale > 0)).all():
            raise ConversionError(f"{self._folder.folder}: {name!r} needs one positive {SCALE}")
        return scale.to(torch.float32).reshape(())
