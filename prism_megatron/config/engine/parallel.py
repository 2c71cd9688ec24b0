"""How a model is split over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from prism_megatron.config.fields import AT_LEAST_ONE, OnResume
from prism_megatron.errors import ConfigError, listed


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes; data parallelism takes the ranks that are left."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    tp: Annotated[int, AT_LEAST_ONE] = 1
    """tensor-parallel size"""
    pp: Annotated[int, AT_LEAST_ONE] = 1
    """pipeline-parallel size"""
    vpp: Annotated[int, AT_LEAST_ONE] = 1
    """virtual pipeline stages (model chunks) per rank"""
    cp: Annotated[int, AT_LEAST_ONE] = 1
    """context-parallel size: ranks that share each sequence"""
    ep: Annotated[int, AT_LEAST_ONE] = 1
    """expert-parallel size of models with experts"""
    etp: Annotated[int | None, AT_LEAST_ONE] = None
    """tensor-parallel size of experts; by default tp at --ep 1, else 1"""
    sp: Literal["auto", "on", "off"] = "auto"
    """sequence parallelism; auto turns it on for a model with experts at tp > 1, which Megatron requires"""
    cp_comm: Literal["all_gather", "a2a"] = "all_gather"
    """what context parallelism sends for attention: all keys and values, or heads for tokens (Ulysses)"""
    first_stage_layers: int | None = None
    """language layers of the first pipeline stage, where they do not divide evenly"""
    last_stage_layers: int | None = None
    """language layers of the last pipeline stage, where they do not divide evenly"""
    distributed_optimizer: bool = True
    """shard optimizer state over data-parallel ranks"""
    distributed_timeout_minutes: Annotated[int, AT_LEAST_ONE] = 30
    """how long ranks wait for one another, as while another one samples or hands weights over, before all give up"""

    deterministic: bool = False
    """the same bits from every run of the same layout on the same GPUs: no kernel and no reduction in an order of
    chance. Slower, and refused where NCCL_ALGO, CUBLAS_WORKSPACE_CONFIG or NVTE_ALLOW_NONDETERMINISTIC_ALGO say
    otherwise"""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of a dense model and share its sequences."""
        return self.tp * self.cp * self.pp

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size of experts."""
        if self.etp is not None:
            return self.etp
        return self.tp if self.ep == 1 else 1

    @property
    def length_multiple(self) -> int:
        """What sequence lengths are padded to: each context-parallel rank takes two chunks that divide over tp."""
        return self.tp * (2 * self.cp if self.cp > 1 else 1)

    @property
    def microbatches_of_a_rank(self) -> int:
        """Megatron's interleaved schedule takes whole rounds of pp micro-batches, the plain one any number."""
        return self.pp if self.vpp > 1 else 1

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Language layers of each pipeline stage. ConfigError, naming what would do, where they do not divide."""
        ends = (self.first_stage_layers, self.last_stage_layers)
        if self.pp == 1 and ends != (None, None):
            raise ConfigError("--first-stage-layers and --last-stage-layers need --pp of at least 2; leave them out")
        stages, layers = self.pp, num_layers
        for end in ends:
            if end is not None:
                stages, layers = stages - 1, layers - end
        middle = layers // stages if stages else 0
        counts = [middle] * self.pp
        for index, end in zip((0, -1), ends, strict=True):
            if end is not None:
                counts[index] = end
        if sum(counts) == num_layers and all(count > 0 and count % self.vpp == 0 for count in counts):
            return tuple(counts)
        named = zip(("first", "last"), ends, strict=True)
        stated = "".join(f" --{name}-stage-layers {end}" for name, end in named if end is not None)
        even = [pp for pp in range(1, num_layers + 1) if num_layers % (pp * self.vpp) == 0]
        raise ConfigError(
            f"--pp {self.pp} --vpp {self.vpp}{stated} does not divide the model's {num_layers} layers; "
            + (f"at --vpp {self.vpp} use --pp {listed(even)}, " if even else "use a smaller --vpp, ")
            + "or give the ends their own --first-stage-layers and --last-stage-layers "
            f"(the stages between share the rest evenly, each stage a multiple of --vpp {self.vpp})"
        )

    def sequence_parallel(self, *, experts: bool) -> bool:
        """Whether a model runs with sequence parallelism; ``experts`` says whether it has expert layers."""
        if self.tp == 1:
            return False
        return self.sp == "on" or (self.sp == "auto" and experts)


@dataclass(frozen=True)
class DiscriminatorLayoutConfig:
    """How a discriminator's experts are split over the ranks, beside a policy that splits its own otherwise."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    discriminator_ep: Annotated[int | None, AT_LEAST_ONE] = None
    """expert-parallel size of the discriminator; by default --ep, and beside a policy with experts the largest divisor
    of --ep that divides a tower's experts"""
    discriminator_etp: Annotated[int | None, AT_LEAST_ONE] = None
    """tensor-parallel size of the discriminator's experts; by default --etp, or what follows for it where that is left
    out"""

    def of(self, parallel: ParallelConfig, *, experts_per_tower: int, beside_experts: bool) -> ParallelConfig:
        """The discriminator's layout on the ranks of ``parallel``, the policy's; ``beside_experts``: that has some."""
        ep = self.discriminator_ep
        if ep is None:
            ep = math.gcd(parallel.ep, experts_per_tower) if beside_experts and experts_per_tower else parallel.ep
        return replace(parallel, ep=ep, etp=self.discriminator_etp or parallel.etp)


SAME_LAYOUT = DiscriminatorLayoutConfig()
