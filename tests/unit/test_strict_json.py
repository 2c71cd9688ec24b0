"""JSON that can be read in one way only; every refusal is one reason that reads on after a file's name."""

from __future__ import annotations

import pytest

from prism_megatron.strict_json import parse_json

GOOD = '{"a": [1, 2.5, null, true, "é"], "b": {"a": 1e308}}'


def test_json_is_read() -> None:
    assert parse_json(GOOD) == parse_json(GOOD.encode()) == {"a": [1, 2.5, None, True, "é"], "b": {"a": 1e308}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "key 'a' stands twice in one object; leave one of them out"),
        ('[{"x": {"k\\u0065y": 1, "key": 2}}]', "key 'key' stands twice"),
        ('{"a": NaN}', "NaN is no JSON; write a number, or null"),
        ("[Infinity]", "Infinity is no JSON"),
        ("[-Infinity]", "-Infinity is no JSON"),
        ("[1e999]", "the number 1e999 is too large"),
        ("[-1e999]", "the number -1e999 is too large"),
        ("9" * 5000, "4300"),
        ("[" * 200_000, "it is nested too deeply"),
        ('{"a":' * 200_000, "it is nested too deeply"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        (GOOD.encode("utf-16"), "it is encoded in UTF-16; save it as UTF-8"),
        (GOOD.encode("utf-16-le"), "it is encoded in UTF-16-LE"),
        (GOOD.encode("utf-16-be"), "it is encoded in UTF-16-BE"),
        (GOOD.encode("utf-32"), "it is encoded in UTF-32"),
        (GOOD.encode("utf-8-sig"), "UTF-8 with a byte order mark, which JSON must not have; save it as UTF-8"),
        (GOOD.encode("latin-1"), "byte 0xe9 at position 29 is no UTF-8, as in latin-1"),
    ],
)
def test_what_two_readers_could_take_for_two_things_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_json(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
