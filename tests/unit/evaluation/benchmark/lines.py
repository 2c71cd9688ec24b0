"""Lines of an evaluation as tests make them."""

from __future__ import annotations

from collections.abc import Sequence

from prism_megatron.evaluation.benchmark.answers import Answered


def line(
    name: str = "q-0",
    *,
    mode: str = "greedy",
    sample: int = 0,
    right: bool = True,
    valid: bool = True,
    answer: str = "3",
    tokens: int | None = 10,
    text: str = "<answer>3</answer>",
    failure: str = "",
    digest: str = "d",
    of: str = "made",
) -> Answered:
    """An answer, which counts where it is right and valid."""
    return Answered(
        of,
        name,
        digest,
        mode,
        sample,
        counts=right and valid and not failure,
        right=right and not failure,
        valid=valid and not failure,
        truncated=False,
        tokens=None if failure else tokens,
        kind="number",
        answer="" if failure else answer,
        problem="" if valid else "<think> appears 0 times",
        text="" if failure else text,
        failure=failure,
    )


def lines(rights: Sequence[Sequence[bool]]) -> list[Answered]:
    """Of each question a greedy answer, which is the first, and all as samples."""
    found = []
    for number, own in enumerate(rights):
        name = f"q-{number}"
        found.append(line(name, right=own[0]))
        found += [line(name, mode="sampled", sample=i, right=right) for i, right in enumerate(own)]
    return found
