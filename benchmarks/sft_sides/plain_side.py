"""A plain loop around transformers' model: records padded on the right, ``loss.backward()``, AdamW.

``fused`` uses torch's fused AdamW. ``masters`` is bf16 with AdamW on fp32 copies of the weights, as ours has them. Runs
in TRL's environment, whose transformers has all processors.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from benchmarks.sft_sides.rounds import Rounds, ordered_rows

BATCH = 8
DTYPES = {
    "fp32": torch.float32,
    "autocast": torch.float32,
    "bf16": torch.bfloat16,
    "masters": torch.bfloat16,
}


def collate(processor: Any, rows: list[dict[str, Any]], folder: Path) -> dict[str, torch.Tensor]:
    """Texts and images of a batch as tensors, with -100 for a label where nothing is to be learned."""
    conversations = []
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        conversations.append(
            [
                {"role": "user", "content": [
                    {"type": "image", "image": Image.open(folder / row["images"][0])},
                    {"type": "text", "text": question.removeprefix("<image>")},
                ]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        )  # fmt: skip
    made = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True,
        processor_kwargs={"padding": True, "padding_side": "right", "return_tensors": "pt"},
    )  # fmt: skip
    batch: dict[str, torch.Tensor] = dict(made)
    ids = batch["input_ids"]
    # The answer begins behind the last turn's head, which is three tokens: <|im_start|>, assistant, a line break.
    opening = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    head = len(processor.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False))
    columns = torch.arange(ids.shape[1])
    begins = torch.where(ids == opening, columns, -1).amax(-1, keepdim=True) + head
    batch["labels"] = torch.where((columns >= begins) & batch["attention_mask"].bool(), ids, -100)
    return batch


def hand_over_gradients(parameters: list[torch.nn.Parameter], masters: list[torch.nn.Parameter]) -> None:
    """In fp32, to the copies that are stepped."""
    for parameter, master in zip(parameters, masters, strict=True):
        master.grad = None if parameter.grad is None else parameter.grad.float()
        parameter.grad = None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("model")
    parser.add_argument("dtype", choices=tuple(DTYPES))
    parser.add_argument("way", choices=("plain", "fused"))
    parser.add_argument("steps", type=int)
    arguments = parser.parse_args()
    rounds = Rounds()
    torch.set_num_threads(1)
    folder = arguments.work / arguments.model
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=DTYPES[arguments.dtype], attn_implementation="sdpa"
    )
    model.train()
    processor = AutoProcessor.from_pretrained(folder)
    parameters = list(model.parameters())
    stepped = parameters
    if arguments.dtype == "masters":
        stepped = [torch.nn.Parameter(parameter.detach().float()) for parameter in parameters]
    optimizer = torch.optim.AdamW(stepped, lr=1e-4, weight_decay=0.0, fused=arguments.way == "fused" or None)
    rows = ordered_rows(arguments.work)
    rounds.begin()
    for step in range(arguments.steps):
        batch = collate(processor, rows[BATCH * step : BATCH * (step + 1)], arguments.work / "records")
        with torch.autocast("cpu", torch.bfloat16) if arguments.dtype == "autocast" else nullcontext():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        if stepped is not parameters:
            hand_over_gradients(parameters, stepped)
        torch.nn.utils.clip_grad_norm_(stepped, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if stepped is not parameters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, stepped)
        rounds.took(
            loss.item(),
            tokens=int(batch["attention_mask"].sum()),
            labels=int((batch["labels"] != -100).sum()),
            ids=int((batch["input_ids"] * batch["attention_mask"]).sum()),
        )


if __name__ == "__main__":
    main()
