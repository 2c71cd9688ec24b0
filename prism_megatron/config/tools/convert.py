"""The configurations of ``prism-convert``, and what can be refused before a file is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from prism_megatron.config.architecture.quant import QuantConfig, check_quant
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, check_fields
from prism_megatron.config.stages.discriminator import Modality, Routing, check_kind
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class TargetLayout:
    """The layout whose ranks read whole chunks of a converted checkpoint; any other loads it too."""

    tp: Annotated[int, AT_LEAST_ONE] = 1
    """tensor-parallel size"""
    pp: Annotated[int, AT_LEAST_ONE] = 1
    """pipeline-parallel size"""
    vpp: Annotated[int, AT_LEAST_ONE] = 1
    """virtual pipeline stages (model chunks) per rank"""
    ep: Annotated[int, AT_LEAST_ONE] = 1
    """expert-parallel size of models with experts"""
    etp: Annotated[int | None, AT_LEAST_ONE] = None
    """tensor-parallel size of experts; by default tp at --ep 1, else 1"""
    first_stage_layers: int | None = None
    """language layers of the first pipeline stage, where they do not divide evenly"""
    last_stage_layers: int | None = None
    """language layers of the last pipeline stage, where they do not divide evenly"""

    @property
    def parallel(self) -> ParallelConfig:
        """The same layout as a run has it."""
        return ParallelConfig(
            tp=self.tp,
            pp=self.pp,
            vpp=self.vpp,
            ep=self.ep,
            etp=self.etp,
            first_stage_layers=self.first_stage_layers,
            last_stage_layers=self.last_stage_layers,
        )


@dataclass(frozen=True)
class UpcyclingConfig:
    """How a dense model becomes a discriminator; used with ``--as discriminator`` only."""

    routing: Routing = "segment"
    """segment: a tower of experts for perception, one for reasoning; learned: one pool for both; dense: no experts"""
    modality: Modality = "multimodal"
    """text: the discriminator is not to be shown images"""
    experts_per_tower: Annotated[int, AT_LEAST_ONE] = 4
    """experts in each of the two towers, or in the one pool of --routing learned"""
    top_k: int = 2
    """experts per token, picked inside the token's tower"""
    upcycle_noise: Annotated[float, NOT_NEGATIVE] = 0.01
    """standard deviation added to each expert's copy of the dense MLP"""
    router_std: Annotated[float, NOT_NEGATIVE] = 0.02
    """standard deviation of the fresh router and scalar head"""
    seed: int = 42
    """keys the noise, the router and the head"""


@dataclass(frozen=True)
class ToMegatronConfig:
    """A model, in whichever form -> torch_dist checkpoint."""

    layout: tyro.conf.OmitArgPrefixes[TargetLayout] = field(default_factory=TargetLayout)
    upcycling: tyro.conf.OmitArgPrefixes[UpcyclingConfig] = field(default_factory=UpcyclingConfig)
    hf: str | None = None
    """a Qwen3-VL or a discriminator: model folder, hub id (org/name@revision), run folder or checkpoint"""
    save: str | None = None
    """checkpoint folder to write"""
    as_role: Annotated[Literal["policy", "discriminator"] | None, tyro.conf.arg(name="as")] = None
    """what the model becomes, by default what it is, or the policy of a checkpoint with both roles; a dense Qwen3-VL
    becomes a discriminator by upcycling"""
    weights_only: bool = False
    """convert a folder without tokenizer, chat template or image settings too; what comes out of it cannot train"""
    bucket_mb: Annotated[int, AT_LEAST_ONE] = 512
    """most MB in one data file"""
    workers: Annotated[int, AT_LEAST_ONE] = 2
    """threads that convert at the same time; each holds up to about 200 MB"""
    overwrite: bool = False
    """replace a finished checkpoint at --save"""


@dataclass(frozen=True)
class ToHFConfig:
    """torch_dist checkpoint, of training or converted -> Hugging Face folder."""

    quantisation: tyro.conf.OmitArgPrefixes[QuantConfig] = field(default_factory=QuantConfig)
    load: str | None = None
    """run folder or checkpoint, of training or converted; also a model folder or hub id, to write it in another form"""
    save: str | None = None
    """Hugging Face folder to write"""
    role: Literal["policy", "discriminator"] | None = None
    """whose weights; by default the only role's, or the policy's"""
    expert_layout: Literal["as-it-came", "transformers", "hub", "per_expert"] = "as-it-came"
    """how experts are stored: fused as transformers 5 has them, fused as they are published, or one by one"""
    dtype: Literal["as-is", "bf16", "fp16", "fp32"] = "as-is"
    """number format to write; as-is keeps every bit"""
    shard_mb: Annotated[int, AT_LEAST_ONE] = 4096
    """most MB in one safetensors file, except for a larger single tensor"""
    workers: Annotated[int, AT_LEAST_ONE] = 2
    """threads that convert at the same time; each holds up to about 200 MB"""
    overwrite: bool = False
    """replace a finished model folder at --save"""


@dataclass(frozen=True)
class MakeRandomConfig:
    """A Hugging Face folder of random weights."""

    config: str | None = None
    """a config.json, or a published size such as 4B"""
    save: str | None = None
    """folder to write"""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """number format of all weights"""
    expert_layout: Literal["transformers", "hub", "per_expert"] = "transformers"
    """how experts are stored"""
    seed: int = 0
    """keys the weights"""
    shard_mb: Annotated[int, AT_LEAST_ONE] = 4096
    """most MB in one safetensors file, except for a larger single tensor"""


def check_to_megatron(config: ToMegatronConfig) -> None:
    """Raise ConfigError, naming the flag, for what no model could make work."""
    _check_named("--hf", config.hf, config.save)
    check_fields(config)
    upcycling = config.upcycling
    if config.as_role != "discriminator" and upcycling != UpcyclingConfig():
        raise ConfigError("flags of upcycling make a dense model a discriminator; add --as discriminator")
    check_kind(upcycling)


def check_to_hf(config: ToHFConfig) -> None:
    """Raise ConfigError, naming the flag, for what no checkpoint could make work."""
    _check_named("--load", config.load, config.save)
    check_fields(config)
    check_quant(config.quantisation)
    if config.quantisation.quant is None:
        return
    asked = f"--quant {config.quantisation.quant}"
    if config.role == "discriminator":
        raise ConfigError(f"{asked} is for policies, which are served; leave it out for --role discriminator")
    if config.expert_layout != "as-it-came":
        raise ConfigError(f"{asked} writes experts one by one; leave --expert-layout out")
    if config.dtype == "fp16":
        raise ConfigError(f"{asked} takes a model in bf16 or fp32; leave out --dtype fp16")


def _check_named(flag: str, source: str | None, target: str | None) -> None:
    if source is None or target is None:
        raise ConfigError(f"name the model to read with {flag} and the folder to write with --save")
