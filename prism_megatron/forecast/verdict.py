"""What a rank needs at its worst, from what was counted of its roles, and what would make it fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from prism_megatron.engine.dry.counted import Counted
from prism_megatron.errors import ConfigError

GIB = 2**30
OFFLOAD = {"policy": "--policy.offload", "discriminator": "--discriminator.offload"}


@dataclass(frozen=True)
class RankNeed:
    """Bytes of one rank. ``beside`` has what lies there beside the roles that train: a reference, a sampling copy."""

    rank: int
    roles: Mapping[str, Counted]
    offloaded: Collection[str] = ()
    """roles whose gradients and optimizer state leave the device while another one trains"""
    beside: int = 0

    def at_worst(self, *, offloaded: Collection[str] | None = None) -> tuple[str, int]:
        """The role whose step needs most, and the bytes held then."""
        resting = {
            name: counted.parameters if name in (self.offloaded if offloaded is None else offloaded) else held(counted)
            for name, counted in self.roles.items()
        }
        needs = {
            name: self.beside
            + held(counted)
            + max(counted.pass_peak, counted.step_peak)
            + sum(size for other, size in resting.items() if other != name)
            for name, counted in self.roles.items()
        }
        worst = max(needs, key=needs.__getitem__)
        return worst, needs[worst]


def held(counted: Counted) -> int:
    """What a role holds from step to step."""
    return counted.parameters + counted.gradients + counted.optimizer


def table(needs: Sequence[RankNeed]) -> list[str]:
    """Lines for people, in GiB: a row for each role of each played rank, and each rank's most."""
    columns = ("parameters", "gradients", "optimizer", "pass_peak", "step_peak")
    lines = [f"{'rank':>5}  {'role':<14}" + "".join(f"{name.replace('_', ' '):>12}" for name in columns)]
    for need in needs:
        for role, counted in need.roles.items():
            sizes = "".join(f"{getattr(counted, name) / GIB:>12.2f}" for name in columns)
            lines.append(f"{need.rank:>5}  {role:<14}{sizes}")
        worst, size = need.at_worst()
        beside = f", {need.beside / GIB:.2f} of it of models that only read" if need.beside else ""
        lines.append(f"{need.rank:>5}  at most {size / GIB:.2f} GiB, in the step of the {worst}{beside}")
    return lines


def neediest(needs: Sequence[RankNeed]) -> RankNeed:
    """The rank that needs most at its worst."""
    return max(needs, key=lambda one: one.at_worst()[1])


def room_of(*, device_gib: float, reserve_gib: float) -> float:
    """Bytes of a device beside the reserve."""
    return (device_gib - reserve_gib) * GIB


def check_fits(
    needs: Sequence[RankNeed],
    *,
    device_gib: float,
    reserve_gib: float,
    recompute: str,
    rows_flag: str,
    anyway: str = "--forecast off",
) -> None:
    """Raise ConfigError where a rank needs more than the device has beside the reserve; the message says what helps.

    What an offload saves is counted. Of other flags only the part that they act on is known, and its size is named.
    ``rows_flag`` bounds the tokens of a micro-batch; the flags of ``anyway`` start the run in spite of the counts.
    """
    need = neediest(needs)
    worst, size = need.at_worst()
    room = room_of(device_gib=device_gib, reserve_gib=reserve_gib)
    if size <= room:
        return
    advice = _advice(need, room, recompute=recompute, rows_flag=rows_flag)
    raise ConfigError(
        f"rank {need.rank} needs {size / GIB:.2f} GiB in the step of the {worst}, and a device of {device_gib:g} GiB "
        f"has {room / GIB:.2f} beside --device-reserve-gib {reserve_gib:g}; {advice}; or start it all the same by "
        f"{anyway}"
    )


def _advice(need: RankNeed, room: float, *, recompute: str, rows_flag: str) -> str:
    counted = need.roles[need.at_worst()[0]]
    parts = []
    more = [name for name in need.roles if name not in need.offloaded]
    if len(need.roles) > 1 and more:
        _, left = need.at_worst(offloaded=list(need.roles))
        flags = " ".join(OFFLOAD[name] for name in more)
        parts.append(f"{flags} brings this down to {left / GIB:.2f} GiB{', which fits' if left <= room else ''}")
    if counted.pass_peak > counted.step_peak:
        helps = (
            f"a smaller {rows_flag} is" if recompute == "full" else f"--recompute full and a smaller {rows_flag} are"
        )
        parts.append(
            f"{helps} for the {counted.pass_peak / GIB:.2f} GiB of its pass (a row longer than that runs alone)"
        )
    whole = sum(held(one) for one in need.roles.values())
    parts.append(f"a larger --tp or --pp is for the {whole / GIB:.2f} GiB that are held")
    return "; ".join(parts)
