"""A run in which nothing trains says so at once, and does not go on for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

_FIRST_STEPS = 3


class Idleness:
    """Counts, role by role, the steps on end that ought to have trained it and did not."""

    def __init__(self, limit: int) -> None:
        """``limit`` is the number of such steps that end a run; 0 ends none."""
        self._limit = limit
        self._on_end: Counter[str] = Counter()
        self._ever: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._seen = 0

    def see(self, learned: Collection[str], idle: Mapping[str, str]) -> list[str]:
        """Take note of a step: roles that ``learned``, and those that were to and did not, each with the reason.

        Returns what to tell the reader: of a role's first idle steps every one, later ever fewer.
        """
        self._seen += 1
        for role in learned:
            self._on_end[role] = 0
            self._ever.add(role)
        roles_of: dict[tuple[int, str], list[str]] = {}
        for role, reason in idle.items():
            self._on_end[role] += 1
            self._reasons[role] = reason
            roles_of.setdefault((self._on_end[role], reason), []).append(role)
        return [
            f"WARNING: the {' and the '.join(roles)} learned nothing in {_steps(count)}: {reason}"
            for (count, reason), roles in roles_of.items()
            if self._seen <= _FIRST_STEPS or count & (count - 1) == 0
        ]

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it, for :meth:`restore`: a run that goes on counts on."""
        return {"on_end": dict(self._on_end), "ever": sorted(self._ever), "reasons": dict(self._reasons)}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """The inverse of :meth:`to_plain`; of an older version nothing is known."""
        self._on_end = Counter({str(role): int(count) for role, count in plain.get("on_end", {}).items()})
        self._ever = {str(role) for role in plain.get("ever", ())}
        self._reasons = {str(role): str(reason) for role, reason in plain.get("reasons", {}).items()}

    @property
    def verdict(self) -> str | None:
        """Why the run must end; None while it may go on."""
        for role, count in self._on_end.items():
            if self._limit and count >= self._limit:
                return f"the {role} learned nothing in {_steps(count)} (--max-idle-steps): {self._reasons[role]}"
        return None

    @property
    def never_trained(self) -> Mapping[str, str]:
        """Roles that were to learn and never did, with the last reason."""
        return {role: reason for role, reason in self._reasons.items() if role not in self._ever}


def _steps(count: int) -> str:
    return "this step" if count == 1 else f"the last {count} steps"
