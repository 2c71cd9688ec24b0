"""Converts between Hugging Face folders and checkpoints: which model a folder holds, and the work in its order.

No process group and no Megatron: a plan is made from headers, threads write its units, and one rename publishes them.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from model_providers.moe_discriminator.folder import is_discriminator, read_variant, write_config
from model_providers.moe_discriminator.mapping import expert_layout as discriminator_layout
from model_providers.moe_discriminator.mapping import weight_mappings as discriminator_mappings
from model_providers.moe_discriminator.upcycle import UpcycledSource
from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.architecture.quant import QuantConfig
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.validate_layout import check_layout
from prism_megatron.config.merge import to_plain
from prism_megatron.config.tools.convert import (
    ToHFConfig,
    ToMegatronConfig,
    UpcyclingConfig,
    check_to_hf,
    check_to_megatron,
)
from prism_megatron.conversion.checkpoints.folder import companions_folder, is_checkpoint, write_state
from prism_megatron.conversion.checkpoints.model_names import folder_of
from prism_megatron.conversion.checkpoints.source import CheckpointSource
from prism_megatron.conversion.checkpoints.to_hf import plan_hf
from prism_megatron.conversion.checkpoints.to_megatron import plan_megatron, record
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.checkpoints.torch_dist_writer import write_index
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.hf.stored_tensor import DTYPES
from prism_megatron.conversion.hf.writer import CONFIG, read_companions, stating
from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.conversion.resumable import WorkFolder, check_target, fingerprint_of, run_units
from prism_megatron.conversion.verify import check_names
from prism_megatron.data.reading.model_files import check_model_files
from prism_megatron.errors import ConfigError, ConversionError
from prism_megatron.jobs.model_folder import mappings_of, open_model_folder
from prism_megatron.jobs.quantise import check_installed, check_records, quantise_from

MB = 10**6
_NO_PROGRESS = {"steps_taken": 0, "adam_step": 0}
_BYTES_VERSION = 1
"""Raised whenever the same source and flags would give other bytes: work of an older version is then dropped."""

Role = Literal["policy", "discriminator"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Model:
    """A folder's model: its tensors and the mappings that name them. ``variant`` is a discriminator's kind.

    ``files`` is where its config and tokenizer lie; those of one that is ``upcycled`` are a policy's.
    """

    role: Role
    files: Path
    source: TensorSource
    shape: Qwen3VLShape
    mappings: Sequence[WeightMapping]
    expert_layout: ExpertLayout | None
    variant: Variant | None
    upcycled: bool = False

    @property
    def aliases(self) -> list[str]:
        """Tied repeats that the folder has."""
        held = set(self.source.names())
        return [m.optional_alias for m in self.mappings if m.optional_alias in held and m.optional_alias is not None]


def to_megatron(config: ToMegatronConfig, *, say: Say) -> None:
    """Write ``config.save`` from ``config.hf``. Raises PrismError; what was written then waits for the same command."""
    check_to_megatron(config)
    hf, save = folder_of(str(config.hf), flag="--hf", fetch=True), Path(str(config.save))
    check_target(save, source=hf, is_kind=is_checkpoint, kind="checkpoint", overwrite=config.overwrite)
    parallel = config.layout.parallel
    model = _open_model(hf, config.as_role, config.upcycling)
    towers = None if model.variant is None else model.variant.towers
    check_layout(parallel, model.shape, experts_per_tower=0 if towers is None else towers.experts_per_tower)
    if model.upcycled or is_checkpoint(hf):
        check_names(model.mappings, model.source, where=hf)
    if not config.weights_only:
        check_model_files(model.files, model.shape)
    plan = plan_megatron(
        model.mappings, model.source, role=model.role, parallel=parallel, bucket_bytes=config.bucket_mb * MB
    )
    fingerprint = _fingerprint(config, fingerprint_of(hf, [] if model.files == hf else [model.files]))
    with WorkFolder(save, fingerprint, overwrite=config.overwrite, say=say) as work:
        lengths = run_units(plan.files, work, workers=config.workers, label="to-megatron")
        companions = companions_folder(work.folder, model.role)
        _copy_companions(model.files, companions)
        if model.upcycled and model.variant is not None:
            write_config(companions, dense_folder=companions, variant=model.variant)
        write_index(work.folder, plan.tensors, plan.written(lengths))
        write_state(
            work.folder,
            engines={model.role: _NO_PROGRESS},
            models={model.role: record(model.expert_layout, model.aliases)},
            state={},
        )
        work.publish()


def to_hf(config: ToHFConfig, *, say: Say) -> None:
    """Write ``config.save`` from ``config.load``, quantised where asked. Raises PrismError, as ``to_megatron``."""
    check_to_hf(config)
    load, save = folder_of(str(config.load), flag="--load", fetch=True), Path(str(config.save))
    check_target(save, source=load, is_kind=_is_model_folder, kind="model folder", overwrite=config.overwrite)
    if not is_checkpoint(load):
        folder_of(str(load), config.role, flag="--load")  # refuses the other role
        _rewrite(config, load, save, say=say)
        return
    config = dataclasses.replace(config, load=str(load))
    folder = TorchDistFolder(load)
    role = role_of(folder, config.role)
    if config.quantisation.quant is None:
        _write_hf(config, folder, role, say=say)
        return
    if role != "policy":
        raise ConfigError(f"--quant {config.quantisation.quant} is for policies, but {load} holds a {role}")
    check_installed(config.quantisation.quant)
    check_records(config.quantisation, companions_folder(load, role))
    plain = save.with_name(f".{save.name}.plain")
    in_one_piece: ExpertLayout | None = folder.document["models"][role]["expert_layout"] and "transformers"
    unquantised = dataclasses.replace(
        config, save=str(plain), quantisation=QuantConfig(), expert_layout=in_one_piece or "as-it-came"
    )
    try:
        if plain.exists():
            shutil.rmtree(plain)
        _write_hf(unquantised, folder, role, say=say)
        quantise_from(config.quantisation, plain, save, say)
    finally:
        shutil.rmtree(plain, ignore_errors=True)


def _rewrite(config: ToHFConfig, load: Path, save: Path, *, say: Say) -> None:
    """A model folder in another form, by way of a checkpoint beside it, which takes as much space for that long."""
    aside = save.with_name(f".{save.name}.checkpoint")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        to_megatron(ToMegatronConfig(hf=str(load), save=str(aside), workers=config.workers, weights_only=True), say=say)
        to_hf(dataclasses.replace(config, load=str(aside)), say=say)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_hf(config: ToHFConfig, folder: TorchDistFolder, role: Role, *, say: Say) -> None:
    load, save = Path(str(config.load)), Path(str(config.save))
    companions = companions_folder(load, role)
    kept = folder.document["models"][role]
    layout = kept["expert_layout"] if config.expert_layout == "as-it-came" else config.expert_layout
    if layout is not None and kept["expert_layout"] is None:
        raise ConfigError(f"--expert-layout {layout}: the {role} of {load} has no experts; leave it out")
    source = CheckpointSource(folder, role, mappings_of(companions, layout), aliases=kept["aliases"])
    dtype = DTYPES.get(config.dtype)  # none is as-is
    plan = plan_hf(source, dtype=dtype, shard_bytes=config.shard_mb * MB)
    fingerprint = _fingerprint(config, fingerprint_of(load, [companions]))
    with WorkFolder(save, fingerprint, overwrite=config.overwrite, say=say) as work:
        if not work.done:
            plan.prepare(work.folder)
        run_units(plan.parts, work, workers=config.workers, label="to-hf")
        _copy_companions(companions, work.folder)
        if dtype is not None:
            path = work.folder / CONFIG
            path.write_bytes(stating(path.read_bytes(), dtype))
        work.publish()


def _open_model(folder: Path, as_role: Role | None, upcycling: UpcyclingConfig) -> _Model:
    """What ``to-megatron`` writes of a model folder or a checkpoint, which may hold both roles."""
    files = folder
    source: TensorSource
    if is_checkpoint(folder):
        stored = TorchDistFolder(folder)
        role = role_of(stored, as_role if as_role in stored.document["models"] else None)
        files, layout = companions_folder(folder, role), stored.document["models"][role]["expert_layout"]
        aliases = stored.document["models"][role]["aliases"]
        source = CheckpointSource(stored, role, mappings_of(files, layout), aliases=aliases)
        shape = Qwen3VLShape.from_folder(files)
    else:
        opened = open_model_folder(folder)
        source, layout, shape = opened.source, opened.expert_layout, opened.shape
    if is_discriminator(files):
        if as_role == "policy" or (as_role is not None and files == folder) or upcycling != UpcyclingConfig():
            raise ConfigError(f"--hf {folder} is a discriminator already; leave --as and flags of upcycling out")
        return _discriminator(files, source, shape, read_variant(files))
    if as_role == "discriminator":
        if shape.text.experts is not None:
            raise ConfigError(f"--as discriminator upcycles a dense Qwen3-VL, but --hf {folder} has experts")
        variant = Variant.of(upcycling)
        upcycled = UpcycledSource(
            source,
            shape,
            variant.towers,
            seed=upcycling.seed,
            expert_std=upcycling.upcycle_noise,
            init_std=upcycling.router_std,
        )
        return dataclasses.replace(_discriminator(files, upcycled, shape, variant), upcycled=True)
    return _Model("policy", files, source, shape, mappings_of(files, layout), layout, None)


def _discriminator(files: Path, source: TensorSource, shape: Qwen3VLShape, variant: Variant) -> _Model:
    mappings, layout = discriminator_mappings(shape, variant.towers), discriminator_layout(variant.towers)
    return _Model("discriminator", files, source, shape, mappings, layout, variant)


def role_of(folder: TorchDistFolder, asked: Role | None) -> Role:
    """Whose weights are meant: ``asked``, else the only role's or the policy's.

    Raises ConfigError for a role that the checkpoint does not hold, ConversionError where none is meant.
    """
    roles = sorted(folder.document["models"])
    if asked is not None:
        if asked not in roles:
            raise ConfigError(f"--role {asked}: {folder.folder} holds {', '.join(roles) or 'no model'}")
        return asked
    if len(roles) != 1 and "policy" not in roles:
        raise ConversionError(f"{folder.folder} holds {', '.join(roles) or 'no model'}; name one with --role")
    return cast(Role, roles[0] if len(roles) == 1 else "policy")


def _is_model_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _copy_companions(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name, content in read_companions(source).items():
        (target / name).write_bytes(content)


def _fingerprint(config: ToMegatronConfig | ToHFConfig, files: Sequence[Any]) -> Mapping[str, Any]:
    """Everything that decides the bytes; the number of workers does not."""
    flags = to_plain(dataclasses.replace(config, workers=1, overwrite=False))
    return {"version": _BYTES_VERSION, "torch": torch.__version__, "flags": flags, "files": files}
