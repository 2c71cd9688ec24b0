"""PRISM's released columns: verl's prompt and images, and the teacher's caption and reasoning beside them.

``teacher_caption`` is the description, with its tag or without; ``teacher_cot`` is ``<think>…</think>
<answer>…</answer>``, or reasoning alone beside ``reward_model.ground_truth``; ``teacher_response`` is a whole response.

Example: ``{"prompt": [{"role": "user", "content": "<image>How many circles?"}], "images": [{"bytes": …}],
"teacher_caption": "<caption>\\nTwo circles.\\n</caption>", "teacher_cot": "<think>\\nI count.\\n</think>\\n
<answer>2</answer>"}``.
"""

from __future__ import annotations

import re

from prism_megatron.data.conversation import Conversation
from prism_megatron.data.formats.files.reading import Reading, Row, demonstration, text_in
from prism_megatron.data.formats.turns import assistant_text
from prism_megatron.data.formats.verl import answered, ground_truth
from prism_megatron.data.segments import parse_response
from prism_megatron.errors import DataError

MARKS = ("teacher_caption", "teacher_cot", "teacher_response")
"""The columns that tell a set of this kind."""

_CAPTION = re.compile(r"\s*<caption>\n?(.*?)\n?</caption>\s*", re.DOTALL)
_REASONING = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def parse(row: Row, *, where: str, reading: Reading) -> Conversation:
    """The prompt, answered by the teacher. Raises DataError, naming ``where`` and the field."""
    truth = ground_truth(row, where)
    caption, cot, response = (text_in(row.get(name), name, where) for name in MARKS)
    if caption is not None and cot is not None:
        body = _CAPTION.fullmatch(caption)
        cot = cot.replace("<thought>", "<think>").replace("</thought>", "</think>")
        tagged = _REASONING.fullmatch(cot)
        think, answer = (tagged[1], tagged[2].strip()) if tagged else (cot, truth)
        text = demonstration(body[1] if body else caption, think, answer, where=where, reading=reading)
    elif response is not None:
        text = assistant_text(response)
        parsed = parse_response(text.encode())
        answer = truth if isinstance(parsed, str) else parsed.answer.strip()
        if isinstance(parsed, str) and not reading.config.plain_answers:
            raise DataError(
                f"{where}: field teacher_response: not a valid response: {parsed}; --plain-answers learns it as it is"
            )
    else:
        text = demonstration(caption, cot, truth, where=where, reading=reading)
        answer = truth
    return answered(row, text, answer if truth is None else truth, where=where, reading=reading)
