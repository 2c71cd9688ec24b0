"""What keeps an answer from sympy: size, nesting, commands, powers and factorials, told from the text alone.

A refused answer is wrong unless it is the gold to the letter. What passes is cheap as a rule; what is not
after all ends by the worker's clock.
"""

from __future__ import annotations

import re

from prism_megatron.rewards.answers import closing_of
from prism_megatron.rewards.verdict import GuardedError

MAX_NESTING = 12
MAX_OPERATORS = 80
MAX_DIGITS = 40
MAX_EXPONENT = 10_000
MAX_POWER_PRODUCT = 10_000
MAX_FACTORIAL = 3000
MAX_FACTORIALS = 4
MAX_BINOMIAL = 1000
MAX_FUNCTIONS = 8

_COMMANDS = frozenset(
    [
        "frac",
        "sqrt",
        "pi",
        "cdot",
        "times",
        "div",
        "pm",
        "mp",
        "le",
        "ge",
        "ne",
        "infty",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "ln",
        "log",
        "exp",
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Sigma",
        "Phi",
        "Psi",
        "Omega",
        "circ",
        "cup",
        "cap",
        "in",
        "emptyset",
        "varnothing",
        "mathbb",
        "mathrm",
        "begin",
        "end",
        "binom",
        "lfloor",
        "rfloor",
        "lceil",
        "rceil",
        "lvert",
        "rvert",
        "vert",
        "text",
        "operatorname",
    ]
)
_FUNCTIONS = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|arc[a-z]+|sinh|cosh|tanh|ln|log|exp|sqrt|[lr]floor|[lr]ceil)")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_ENVIRONMENTS = re.compile(r"\\(?:begin|end)\s*\{((?:[pbvV]|small)?matrix)\}")
_BOARD = re.compile(r"\\mathbb\s*\{?\s*[RZNQC]\s*\}?")
_ROMAN = re.compile(r"\\(?:mathrm|text|operatorname)\s*\{\s*([A-Za-z]*)\s*\}")
_NUMBER = re.compile(r"[0-9]+")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*")
_ATOM = re.compile(r"[+-]?\s*(?:[0-9]+|\\?[A-Za-z]+)")
_WORDS = re.compile(r"[A-Za-z]{3,}|\b(?:or|and|if|is|of|to|no|so|as)\b")
# A letter but e in no command, or a Greek one: what stands for any number, and is no number itself.
_VARIABLE = re.compile(
    r"(?<![\\A-Za-z])[a-df-zA-Z](?![A-Za-z])|\\(?:alpha|beta|gamma|theta|lambda|mu|sigma|tau|phi|omega)"
)
# Dates, scores, ranges and ordinals: 3-5 is not -2.
_NO_EXPRESSION = re.compile(r"[0-9]+(?:\s*-\s*[0-9]+)+|[0-9]+(?:[/.][0-9]+){2,}|[0-9]+(?:st|nd|rd|th)")
_PLAIN_FUNCTIONS = frozenset({"sin", "cos", "tan", "sqrt", "log", "exp"})


def check_expression(text: str) -> None:
    """Raise GuardedError for an expression that a parser and sympy must not see."""
    _check_size(text)
    _check_commands(text)
    _check_powers(text)
    _check_factorials(text)


def is_expression(text: str) -> bool:
    """Whether the text reads as mathematics: no words beside names of functions, and something to compute."""
    bare = _COMMAND.sub(" ", _ENVIRONMENTS.sub(" ", _ROMAN.sub(" ", text)))
    if any(word not in _PLAIN_FUNCTIONS for word in _WORDS.findall(bare)) or _NO_EXPRESSION.fullmatch(text):
        return False
    return bool(re.search(r"[0-9+\-*/^=<>|\\()_!]", text))


def _check_size(text: str) -> None:
    depth = deepest = 0
    for character in text:
        depth += 1 if character in "([{" else -1 if character in ")]}" else 0
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        raise GuardedError(f"brackets nested more than {MAX_NESTING} deep")
    if sum(text.count(sign) for sign in "+-*/^=,&|<>") + text.count(r"\cdot") + text.count(r"\times") > MAX_OPERATORS:
        raise GuardedError(f"more than {MAX_OPERATORS} operators")
    if any(len(number) > MAX_DIGITS for number in _NUMBER.findall(text)):
        raise GuardedError(f"a number of more than {MAX_DIGITS} digits")
    if "..." in text or "\u2026" in text:
        raise GuardedError("dots for what is left out")
    if len(_FUNCTIONS.findall(text)) > MAX_FUNCTIONS:
        raise GuardedError(f"more than {MAX_FUNCTIONS} functions")


def _check_commands(text: str) -> None:
    for name in _COMMAND.findall(text):
        if name not in _COMMANDS:
            raise GuardedError(f"the command \\{name[:20]}")
    if text.count(r"\begin") + text.count(r"\end") != len(_ENVIRONMENTS.findall(text)):
        raise GuardedError("an environment that is no matrix")
    if text.count(r"\mathbb") != len(_BOARD.findall(text)):
        raise GuardedError("\\mathbb of something else than a set of numbers")
    if any(len(name) != 1 for name in _ROMAN.findall(text)) or len(_ROMAN.findall(text)) != sum(
        text.count(name) for name in (r"\mathrm", r"\text", r"\operatorname")
    ):
        raise GuardedError("words in an expression")


def _check_powers(text: str) -> None:
    product, has_compound = 1, False
    for found in _EXPONENT.finditer(text):
        exponent = _group(text, found.end())
        has_compound = has_compound or text[: found.start()].rstrip()[-1:] in (")", "}", "]", "!")
        if _EXPONENT.search(exponent):
            inner = [_group(exponent, one.end()) for one in _EXPONENT.finditer(exponent)]
            if any(_EXPONENT.search(one) for one in inner) or not _VARIABLE.search(exponent):
                raise GuardedError("a tower of powers")
        if "!" in exponent:
            raise GuardedError("a factorial in an exponent")
        numbers = [int(number) for number in _NUMBER.findall(exponent)]
        if any(number > MAX_EXPONENT for number in numbers):
            raise GuardedError(f"an exponent above {MAX_EXPONENT}")
        product *= max([1, *numbers])
        if len(numbers) > 1 and _product(numbers) > MAX_EXPONENT:
            raise GuardedError(f"an exponent above {MAX_EXPONENT}")
    if has_compound and product > MAX_POWER_PRODUCT:
        raise GuardedError(f"powers of powers above {MAX_POWER_PRODUCT}")


def _product(numbers: list[int]) -> int:
    product = 1
    for number in numbers:
        product *= max(number, 1)
    return product


def _check_factorials(text: str) -> None:
    places = [place for place, character in enumerate(text) if character == "!"]
    if len(places) > MAX_FACTORIALS:
        raise GuardedError(f"more than {MAX_FACTORIALS} factorials")
    for place in places:
        before = re.search(r"([0-9]+|[A-Za-z])\s*$", text[:place])
        if before is None:
            raise GuardedError("a factorial of an expression")
        if before[1].isdigit() and int(before[1]) > MAX_FACTORIAL:
            raise GuardedError(f"a factorial above {MAX_FACTORIAL}")
        if text[:place].rstrip()[: -len(before[1])].rstrip().endswith(("^", ".")):
            raise GuardedError("a factorial of a power")
    if r"\binom" in text and any(int(number) > MAX_BINOMIAL for number in _NUMBER.findall(text)):
        raise GuardedError(f"numbers above {MAX_BINOMIAL} beside a binomial")


def _group(text: str, start: int) -> str:
    """What an exponent that begins at ``start`` covers."""
    if text[start : start + 1] == "{":
        end = closing_of(text, start)
        return text[start:] if end < 0 else text[start + 1 : end]
    if text[start : start + 1] == "(":
        depth = 0
        for position in range(start, len(text)):
            depth += {"(": 1, ")": -1}.get(text[position], 0)
            if depth == 0:
                return text[start : position + 1]
        return text[start:]
    found = _ATOM.match(text, start)
    atom = found[0] if found else text[start : start + 1]
    # 9^9^9 without braces is a tower as well.
    after = _EXPONENT.match(text, start + len(atom))
    return atom + (text[start + len(atom) : after.end()] + _group(text, after.end()) if after else "")
