"""What never reaches sympy, told from the text alone, and what must not be refused."""

from __future__ import annotations

import pytest

from prism_megatron.rewards.answers import plain
from prism_megatron.rewards.guards import check_expression, is_expression
from prism_megatron.rewards.kinds.numbers import quantity_of
from prism_megatron.rewards.verdict import GuardedError


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("9^{9^{9^9}}", "a tower"),
        ("9^9^9", "a tower"),
        ("9**9**9", "a tower"),
        ("x^{9^9}", "a tower"),
        ("e^{e^{e^x}}", "a tower"),
        ("9^{99999999}", "an exponent above"),
        (r"9^{999\cdot 999}", "an exponent above"),
        ("((9^{9999})^{9999})^{9999}", "powers of powers"),
        ("10000000!", "a factorial above"),
        ("9!!!!!!", "more than 4 factorials"),
        ("3!!", "a factorial of an expression"),
        ("(9!)!", "a factorial of an expression"),
        ("2^{1000!}", "a factorial in an exponent"),
        ("2^9!", "a factorial"),
        (r"\prod_{k=1}^{10^7} k", r"the command \\prod"),
        (r"\sum_{k=1}^{9} k", r"the command \\sum"),
        (r"\int_0^1 x", r"the command \\int"),
        (r"\lim_{x\to 0} x", r"the command \\lim"),
        (r"\binom{100000}{50000}", "beside a binomial"),
        ("(" * 13 + "1" + ")" * 13, "nested"),
        ("1+" * 81 + "1", "more than 80 operators"),
        ("9" * 41, "digits"),
        ("1, 2, ...", "dots"),
        (r"\sin(" * 9 + "1" + ")" * 9, "functions"),
        (r"\text{ or } 3", "words"),
        (r"\begin{verbatim}x\end{verbatim}", "an environment"),
        (r"\input{file}", r"the command \\input"),
    ],
)
def test_what_is_refused(text: str, why: str) -> None:
    with pytest.raises(GuardedError, match=why):
        check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        r"\frac{1}{2006!}", r"\frac{2^{2005}+1}{3\cdot 2^{2006}}", "e^{x^2}", r"e^{-\theta^2}", r"x^{y^z}",
        "(x+1)^{10}",
        r"\sqrt{2+\sqrt{2+\sqrt{2}}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"(-\infty,1)\cup(2,3]",
        "n!", r"\binom{10}{3}",
        r"\frac{-b+\sqrt{b^2-4ac}}{2a}", r"\log_{2} 8", r"x\in\mathbb{R}", r"\mathrm{e}^{2}", r"\sin x\cos y", "2**10",
    ],
)  # fmt: skip
def test_what_is_let_pass(text: str) -> None:
    check_expression(plain(text))
    assert is_expression(plain(text))


@pytest.mark.parametrize(
    "text", ["blue", "no solution", "2021-05-03", "3-2", "1/2/2020", "3rd", "a or b", "well-known", "x"]
)
def test_what_is_no_expression(text: str) -> None:
    assert not is_expression(text)


@pytest.mark.parametrize("text", ["1e401", "1e-401", "1.2e9999", "10^{401}", "1.2e10000"])
def test_powers_of_ten_are_bounded_before_they_are_worked_out(text: str) -> None:
    assert quantity_of(text) is None
    assert quantity_of("1e400") is not None
