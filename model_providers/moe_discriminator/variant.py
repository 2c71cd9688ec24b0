"""Which kind of discriminator: how its tokens find experts, and whether it sees images. No torch, no Megatron."""

from __future__ import annotations

from dataclasses import dataclass

from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.stages.discriminator import KindFlags, Modality, Routing, check_kind

NUM_TOWERS = {"segment": 2, "learned": 1}


@dataclass(frozen=True)
class Variant:
    """``towers`` is None for a discriminator whose MLPs stay dense.

    With ``modality`` text the prompt is judged without its image tokens (see ``training.batches.segment_row``), and the
    vision tower, which never sees a picture, stays as loaded.
    """

    towers: Towers | None
    modality: Modality = "multimodal"

    @classmethod
    def of(cls, flags: KindFlags) -> Variant:
        """What ``--routing --modality --experts-per-tower --top-k`` ask for. Raises ConfigError for what cannot be."""
        check_kind(flags)
        if flags.routing == "dense":
            return cls(None, flags.modality)
        num_towers = NUM_TOWERS[flags.routing]
        return cls(Towers(num_towers, experts_per_tower=flags.experts_per_tower, top_k=flags.top_k), flags.modality)

    @property
    def routing(self) -> Routing:
        """The value of ``--routing``."""
        if self.towers is None:
            return "dense"
        return "learned" if self.towers.num_towers == NUM_TOWERS["learned"] else "segment"

    def as_flags(self) -> str:
        """The flags that ask for it."""
        flags = f"--routing {self.routing} --modality {self.modality}"
        if self.towers is None:
            return flags
        return f"{flags} --experts-per-tower {self.towers.experts_per_tower} --top-k {self.towers.top_k}"
