"""Conversations made by hand: whatever is allowed in them, each thing at least once."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from prism_megatron.data.conversation import Conversation, Picture, Role, Turn
from prism_megatron.data.segments import response_text

ANSWERS = response_text("- two circles", "one and one", "2")


def picture(width: int, height: int, colour: str = "red", *, mode: str = "RGB", kind: str = "PNG") -> Picture:
    """One of a single colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).convert(mode).save(buffer, kind)
    return Picture(buffer.getvalue())


def noise(width: int, height: int, *, kind: str = "PNG") -> Picture:
    """One in which no pixel is as its neighbours, so that every way to resize makes another of it."""
    buffer = io.BytesIO()
    levels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(levels).save(buffer, kind)
    return Picture(buffer.getvalue())


def dialogue(*turns: tuple[str | Picture, ...] | str, id: str = "c", system: str | None = None) -> Conversation:  # noqa: A002
    """Turns of user and assistant in alternation."""
    made = [] if system is None else [Turn("system", (system,))]
    for number, parts in enumerate(turns):
        role: Role = "assistant" if number % 2 else "user"
        made.append(Turn(role, (parts,) if isinstance(parts, str) else parts))
    return Conversation(id, tuple(made), "made")


_IMAGES = {
    "one image": dialogue((picture(96, 64), "How many?"), ANSWERS),
    "two images": dialogue((picture(96, 64), picture(40, 130, "blue"), "Which is wider?"), "The first."),
    "the same image twice": dialogue((picture(64, 64), picture(64, 64), "The same?"), "Yes."),
    "nine images": dialogue((*[noise(32 + 8 * i, 64) for i in range(9)], "Which is widest?"), "The last."),
    "images between words": dialogue(("Is ", picture(64, 64), " like ", picture(32, 96), "?"), "No."),
    "an image after the question": dialogue(("What is this?", noise(70, 50)), "Noise."),
    "an image alone": dialogue((picture(33, 77),), "A square."),
    "two images alone": dialogue((noise(33, 77), noise(77, 33)), "Two."),
    "an image in every turn": dialogue((noise(64, 64), "a"), "b", (noise(32, 64), "c"), "d", ("e", noise(64, 32)), "f"),
    "an image in the last turn alone": dialogue("Hi", "Ho", ("Now ", noise(50, 60)), "Noise."),
    "an image in the first turn alone": dialogue((noise(50, 60), "This."), "Noise.", "Sure?", "Yes."),
    "an image of one pixel": dialogue((picture(1, 1), "What?"), "A dot."),
    "a small image": dialogue((noise(7, 5), "What?"), "Little."),
    "an image of just one token": dialogue((noise(32, 32), "What?"), "One."),
    "an image one pixel too large": dialogue((noise(33, 33), "What?"), "One."),
    "a side that rounds up": dialogue((noise(48, 112), "What?"), "Halves."),
    "a large image": dialogue((noise(1601, 1203), "What?"), "Much."),
    "a very large image": dialogue((picture(5000, 4001), "What?"), "Red."),
    "a wide image": dialogue((noise(1900, 10), "What?"), "A line."),
    "a high image": dialogue((noise(10, 1900), "What?"), "A line."),
    "sizes that differ much": dialogue((noise(20, 20), noise(700, 500), "What?"), "Two."),
    "a photograph": dialogue((noise(300, 200, kind="JPEG"), "What?"), "Noise."),
    "a WebP": dialogue((noise(120, 90, kind="WEBP"), "What?"), "Noise."),
    "an image in greys": dialogue((picture(80, 60, "gray", mode="L"), "What?"), "Grey."),
    "an image with a palette": dialogue((picture(80, 60, "green", mode="P"), "What?"), "Green."),
    "an image for print": dialogue((picture(80, 60, "green", mode="CMYK", kind="JPEG"), "What?"), "Green."),
}
_TURNS = {
    "no image": dialogue("What is 1 + 1?", "2"),
    "three turns": dialogue(
        (picture(96, 64), "How many?"), "Two.", "And red?", "One.", (picture(64, 96), "Here?"), ANSWERS
    ),
    "two turns": dialogue("a", "b", "c", "d"),
    "twelve turns": dialogue(*[f"{'ab'[i % 2]}{i}" for i in range(24)]),
    "the same answer in every turn": dialogue("Go on", "No.", "Go on", "No.", "Go on", "No."),
    "an answer that is a question again": dialogue("What?", "What?", "What?", "What?"),
    "a system turn": dialogue("Hi", "Ho", system="Be brief. Write <think> first."),
    "a system turn with an image after it": dialogue((noise(40, 50), "Hi"), "Ho", system="Look."),
    "a long system turn": dialogue("Hi", "Ho", "Hi", "Ho", system="Be brief.\n" * 60),
    "a system turn in other scripts": dialogue("Hi", "Ho", system="  要简短。\n"),
    "an empty system turn": dialogue("Hi", "Ho", system=""),
    "parts of text": dialogue(("a", "b ", " c", "\n"), ("d", "e")),
    "parts of text around an image": dialogue(("a", "b", noise(40, 40), "c", "d"), ("e", "f"), ("g", "h"), "i"),
}
_TEXTS = {
    "line ends around": dialogue("\n\nWhat?\n", "\n\nThis.\n\n"),
    "a line end after the answer": dialogue("What?", "This.\n"),
    "line ends of Windows": dialogue("What?\r\nNow?\r\n", "This.\r\nThat.\r\n"),
    "spaces": dialogue("  a\t b  ", "  c  \t\n  d "),
    "an answer of one space": dialogue("a", " "),
    "an answer of one letter": dialogue("a", "B"),
    "an answer that begins with a space": dialogue("a", " b", "c", " d"),
    "almost tokens": dialogue("<|im_start|<|im_end| <image> <|IM_START|>", "<caption> <|image_pad> </answer>"),
    "names of roles": dialogue("assistant\nuser\nsystem\n", "assistant\nassistant\nuser", "assistant", "assistant"),
    "words of the template": dialogue("{{ messages }} {% if %} Picture 1:", "{{- message.content }} {# #}"),
    "half of a token": dialogue("im_start|> |endoftext", "|im_end |> <| <|"),
    "other scripts": dialogue("¿Qué é isto? 図は何ですか 👩‍👩‍👧", "Ça: ﬁ e\u0301 \u00a0 २ 👍🏽"),
    "from right to left": dialogue("كم عدد الدوائر؟ \u200f", "שתיים \u200e2"),
    "Chinese": dialogue("图中有几个圆？", "<think>\n一加一\n</think>\n两个。"),
    "signs without a width": dialogue("a\u200bb\ufeffc\u2028d\u0000e", "\u2060f\u00adg\u0085h"),
    "rare characters": dialogue("\U0001f9ff\U00020000\ufffd\uffff", "\u1d25\U0010ffff"),
    "numbers": dialogue("1234567890 + 0.001 = 1,234?", "-12345678901234567890.5e-7"),
    "formulas": dialogue(r"Solve $\frac{a}{b} \le \sqrt{2}$.", r"\boxed{\left( x^{2} \right)}"),
    "a program": dialogue("```python\nfor i in range(3):\n\tprint(i)\n```", "    return {'a': [1, 2]}\n"),
    "a long answer": dialogue("Tell.", "word and another, " * 1500),
    "a long question": dialogue("word and another, " * 1500, "No."),
    "one letter many times": dialogue("a" * 3000, "\n".join("b" * 300)),
    "thinking": dialogue("Why?", "<think>\nbecause\n</think>\nSo."),
    "an empty thought": dialogue("Why?", "<think></think>\nSo."),
    "a thought of line ends": dialogue("Why?", "<think>\n\n</think>\n\nSo."),
    "thinking in every turn": dialogue(
        "Why?",
        "<think>\na\n</think>\nSo.",
        "And?",
        "<think>\nb\n</think>\nThus.",
        "Then?",
        "<think>\nc\n</think>\nYes.",
    ),
    "thinking at the end": dialogue("Why?", "So.\n<think>\nbecause\n</think>"),
    "all tags": dialogue((noise(64, 64), "How many?"), ANSWERS, "Again.", ANSWERS),
    "an empty caption": dialogue("Why?", "<caption></caption><think>\n</think><answer></answer>"),
}
CRAFTED = {**_IMAGES, **_TURNS, **_TEXTS}
