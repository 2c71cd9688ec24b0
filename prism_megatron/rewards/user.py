"""A reward of one's own: ``--reward package.module:function``. ``examples/rewards/short_answers.py`` is one.

Example::

    def reward(sample: RewardInput) -> float:
        return 1.0 if sample.answer == sample.gold else 0.0
"""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prism_megatron.errors import RewardError


@dataclass(frozen=True)
class RewardInput:
    """One rollout, as a function of a user's sees it.

    Example: ``RewardInput("q7", "How many?", "<caption>…", True, "3", "3", "integer")``.
    """

    id: str
    """of the record"""
    question: str
    response: str
    """all that was sampled, without the end token"""
    valid: bool
    """whether the response has the form that it has to have"""
    answer: str
    """what stands in its answer tags; empty where there is not one pair of them"""
    gold: str
    """the record's answer"""
    answer_type: str | None = None
    """choice, integer, float, text or bool, where the record says it"""


RewardFunction = Callable[[RewardInput], float]


def load(name: str) -> RewardFunction:
    """The function that ``package.module:function`` names. Raises RewardError, in one line, where there is none."""
    module_name, colon, attribute = name.partition(":")
    if not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise RewardError(f"--reward {name}: write it as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = "it" if error.name and module_name.startswith(error.name) else f"{error.name}, which it imports,"
        raise RewardError(
            f"--reward {name}: {missing} is not found; install it, or start where Python sees it (PYTHONPATH)"
        ) from error
    except Exception as error:
        raise RewardError(f"--reward {name}: importing it failed: {_told(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        wrong = "is not in the module" if function is None else "is not a function"
        raise RewardError(f"--reward {name}: {attribute} {wrong}")
    return function  # type: ignore[no-any-return]  # what it returns is checked at every call


def call(function: RewardFunction, item: dict[str, Any]) -> tuple[float, str]:
    """The number that the function gives, and what is wrong with it, as the end of a sentence about the record."""
    try:
        value: Any = function(RewardInput(**item))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # it is the user's, and whatever it raises is told with its place
        return 0.0, f"raised {_told(error)}"
    if hasattr(value, "item") and not isinstance(value, int | float):  # a number of numpy's or torch's
        with suppress(TypeError, ValueError, RuntimeError):
            value = value.item()
    if not isinstance(value, int | float):
        return 0.0, f"returned {type(value).__name__}; it has to return a number"
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return (number, "") if math.isfinite(number) else (0.0, f"returned {number}; it has to return a finite number")


def _told(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({place.filename}:{place.lineno})"
