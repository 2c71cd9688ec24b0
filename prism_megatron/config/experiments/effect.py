"""What ``make effect`` measures: arms, sizes, seeds and the primary comparison, written down before a seed is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from prism_megatron.config.architecture.model import FAITHFUL_SHARE, MiniWorld
from prism_megatron.config.fields import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    ZERO_IS_OFF,
    ExistingFolder,
    check_fields,
)
from prism_megatron.config.merge import merge
from prism_megatron.config.stages.algorithms import algorithm
from prism_megatron.config.yaml_file import read_yaml
from prism_megatron.errors import ConfigError

Variant = Literal["segment", "learned", "dense", "text"]
Control = Literal["length", "random", "shuffled", "lr0"]
RegimeName = Literal["guessable", "informative"]
Mode = Literal["greedy", "T=1"]

BASE, SFT, ALIGN, REFERENCES = "base", "sft", "align", "references"


@dataclass(frozen=True)
class Regime:
    """The scenes that RLVR asks about, again and again; the same for every arm of a seed."""

    seeds: Annotated[int, NOT_NEGATIVE] = 0
    """how many of the seeds are run in it, the first ones"""
    prompts: Annotated[int, AT_LEAST_ONE] = 64
    """scenes"""
    comparisons: Annotated[float | None, SHARE] = None
    """share of questions that are answered by yes or no; by default as the world draws them"""
    keep_from: Annotated[float, SHARE] = 0.0
    """least share of right answers by the fine-tuned policy, of 16, that a scene may have"""
    keep_to: Annotated[float, SHARE] = 1.0
    """greatest such share"""

    @property
    def is_filtered(self) -> bool:
        """Whether the fine-tuned policy has to be asked first."""
        return (self.keep_from, self.keep_to) != (0.0, 1.0)


@dataclass(frozen=True)
class Primary:
    """What decides: one comparison for each algorithm, all of which have to come out; others are reported beside."""

    regime: RegimeName | None = "guessable"
    """null: the arms are compared as they are, before RLVR"""
    mode: Mode = "greedy"
    measure: Literal["answer right", "caption exact", "reasoning exact"] = "answer right"
    above: str = ALIGN
    """arm whose policy is expected to be better: after RLVR, by each algorithm"""
    than: str = SFT


@dataclass(frozen=True)
class Registration:
    """An experiment as it is registered. Every arm of a seed takes ``policy_steps`` policy steps after fine-tuning,
    those without RLVR the first ``align_steps`` of them.
    """

    title: str = "One seed: no claim"
    world: MiniWorld = "drift"
    """whose scenes are asked"""
    seeds: tuple[int, ...] = (0,)
    """each is a fine-tuned policy, its discriminators, and all arms from there"""
    warm_start_steps: Annotated[int, AT_LEAST_ONE] = 120
    """steps of every discriminator before the game"""
    align_steps: Annotated[int, AT_LEAST_ONE] = 40
    """policy steps of alignment, and of supervised training on its references"""
    policy_steps: Annotated[int, AT_LEAST_ONE] = 80
    """policy steps of an arm that ends in RLVR"""
    faithful_share: Annotated[float, SHARE] = FAITHFUL_SHARE
    """of the scenes that fine-tuning learns from, those that are written about without a fault"""
    align_prompts: Annotated[int, ZERO_IS_OFF] = 0
    """scenes that warm-start, alignment and training on its references see again every epoch; 0: none is seen twice,
    and the warm-start has references of its own"""
    align_comparisons: Annotated[float | None, SHARE] = None
    """share of those scenes' questions that are answered by yes or no; by default as the world draws them"""
    align_lr: Annotated[float, POSITIVE] = 1e-4
    """learning rate of the policy in alignment and on its references"""
    scenes: Annotated[int, AT_LEAST_ONE] = 1024
    """held-out scenes, the same for every arm and seed"""
    scenes_seed: Annotated[int, NOT_NEGATIVE] = 0
    """which held-out scenes: others than those that were looked at before"""
    samples: Annotated[int, AT_LEAST_ONE] = 4
    """answers to each of them at temperature 1"""
    variants: tuple[Variant, ...] = ("segment",)
    """discriminators; the first is that of the arm ``align``"""
    controls: tuple[Control, ...] = ("length",)
    """of alignment: scores by length, a random frozen discriminator, scores shuffled within groups, no learning"""
    algorithms: tuple[str, ...] = ("grpo",)
    """of RLVR"""
    reinforced: tuple[str, ...] = (SFT, ALIGN, REFERENCES)
    """arms that go on with RLVR, by every algorithm in every regime"""
    reinforced_once: tuple[str, ...] = ()
    """further ones, by the first algorithm in the primary regime alone"""
    guessable: Regime = field(default_factory=lambda: Regime(seeds=1, comparisons=0.9))
    informative: Regime = field(default_factory=lambda: Regime(keep_from=0.2, keep_to=0.8))
    primary: Primary = field(default_factory=Primary)

    @property
    def regimes(self) -> dict[RegimeName, Regime]:
        """Both by name."""
        return {"guessable": self.guessable, "informative": self.informative}

    @property
    def aligned(self) -> dict[str, tuple[Variant, Control | None]]:
        """Arms of alignment: name, discriminator and control."""
        first, *others = self.variants
        return {
            ALIGN: (first, None),
            **{f"{ALIGN} {variant}": (variant, None) for variant in others},
            **{f"{ALIGN} {control}": (first, control) for control in self.controls},
        }

    def reinforced_in(self, regime: RegimeName) -> list[tuple[str, str]]:
        """Arms that go on with RLVR in this regime, each with its algorithm."""
        every = [(arm, algo) for algo in self.algorithms for arm in self.reinforced]
        if regime != self.primary.regime:
            return every
        return [*every, *((arm, self.algorithms[0]) for arm in self.reinforced_once)]


@dataclass(frozen=True)
class EffectConfig:
    """Does alignment help, and more than what it is compared with? Runs a registration's arms on its seeds."""

    registration: Path | None = None
    """YAML file of what is measured; by default one seed, which claims nothing (12 minutes)"""
    output: Path = Path("runs/effect")
    """folder for every arm's figures, effect.json and effect.md; the same command goes on where it was stopped"""
    archive: Path | None = None
    """folder with a file for each whole seed: those found there are not run again, and those that end are put there"""
    embeddings: Annotated[Path | None, ExistingFolder()] = None
    """folder of static embeddings for distances of words, as prism-drift takes it; by default those of the installed
    wordllama, if it is there"""
    workers: Annotated[int, AT_LEAST_ONE] = 2
    """seeds that run at a time, each in a process with one thread, and whose distances are computed at a time"""
    seed: int | None = None
    """run this seed of the registration alone, in this process"""


def read_registration(path: Path | None) -> Registration:
    """What the file registers. Raises ConfigError for one that cannot be run."""
    registration = merge(Registration(), read_yaml(path)) if path is not None else Registration()
    check_registration(registration)
    return registration


def check_registration(registration: Registration) -> None:
    """Raise ConfigError for arms, sizes or a primary comparison that cannot be."""
    check_fields(registration)
    for name in registration.algorithms:
        algorithm(name)
    _check_lists(registration)
    _check_arms(registration)
    for regime_name, regime in registration.regimes.items():
        _check_regime(regime_name, regime, len(registration.seeds))
    if registration.align_comparisons is not None and not registration.align_prompts:
        raise ConfigError("align_comparisons is a share of align_prompts; say how many there are")
    primary = registration.primary.regime
    if primary is not None and not registration.regimes[primary].seeds:
        raise ConfigError(f"primary: no seed is run in the regime {primary!r}")
    if registration.policy_steps <= registration.align_steps:
        raise ConfigError(
            f"policy_steps {registration.policy_steps} must be more than align_steps {registration.align_steps}: the "
            "rest are RLVR's"
        )


def _check_lists(registration: Registration) -> None:
    for name in ("seeds", "variants", "controls", "algorithms", "reinforced", "reinforced_once"):
        values = getattr(registration, name)
        if len(set(values)) < len(values):
            raise ConfigError(f"{name}: {' '.join(map(str, values))}: one stands there twice; leave it out")
        if not values and name in {"seeds", "variants", "algorithms"}:
            raise ConfigError(f"{name}: there must be one at least")


def _check_arms(registration: Registration) -> None:
    """Of all arms that are named."""
    arms, primary = {SFT, REFERENCES, *registration.aligned}, registration.primary
    for arm in (*registration.reinforced, *registration.reinforced_once):
        if arm not in arms:
            raise ConfigError(f"{arm!r} is no arm of this registration; there are {', '.join(sorted(arms))}")
    if doubled := set(registration.reinforced) & set(registration.reinforced_once):
        raise ConfigError(f"reinforced_once: {min(doubled)!r} stands in reinforced too; leave it out of one of them")
    if registration.reinforced_once and (primary.regime is None or ALIGN not in registration.reinforced):
        raise ConfigError("reinforced_once is compared with 'align' in the primary regime; name both, or leave it out")
    if primary.above == primary.than:
        raise ConfigError(f"primary: {primary.above!r} is compared with itself; name another arm")
    known = sorted(arms) if primary.regime is None else registration.reinforced
    for arm in (primary.above, primary.than):
        if arm not in known:
            raise ConfigError(f"primary: {arm!r} is not among {', '.join(known)}")


def _check_regime(name: str, regime: Regime, seeds: int) -> None:
    if regime.seeds > seeds:
        raise ConfigError(f"{name}: seeds {regime.seeds} are more than the {seeds} that there are")
    if regime.is_filtered and regime.comparisons is not None:
        raise ConfigError(
            f"{name}: comparisons {regime.comparisons:g} and keep_from or keep_to do not go together: what a filter "
            "leaves of a mix is another one; leave one of them out"
        )
    if regime.keep_from > regime.keep_to:
        raise ConfigError(f"{name}: keep_from {regime.keep_from:g} is more than keep_to {regime.keep_to:g}")
