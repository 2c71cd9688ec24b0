"""TRL's SFTTrainer, padded: it refuses to pack records with images. Runs in TRL's environment (``make trl``)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.sft_sides.rounds import Rounds, ordered_rows

BATCH = 8


class Waiting(TrainerCallback):
    """Says what every step took; waits between rounds."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds
        self.losses: list[torch.Tensor] = []
        self.collated: list[dict[str, int]] = []
        """what batches held, in their order: one is made ahead"""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.rounds.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        counted = self.collated.pop(0)
        loss = float(self.losses.pop())
        self.rounds.took(loss, tokens=counted["tokens"], labels=counted["labels"], ids=counted["ids"])


def configuration(output: Path, dtype: str, steps: int) -> SFTConfig:
    """As the reference has it: no checkpointing, no reports; ``autocast`` is TRL's own default for precision."""
    return SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        use_cpu=True,
        bf16=dtype == "autocast",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_length=None,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        model_init_kwargs={
            "dtype": "bfloat16" if dtype == "bf16" else "float32",
            "attn_implementation": "sdpa",
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("model")
    parser.add_argument("dtype", choices=("fp32", "autocast", "bf16"))
    parser.add_argument("way", choices=("padded",))
    parser.add_argument("steps", type=int)
    arguments = parser.parse_args()
    rounds = Rounds()
    torch.set_num_threads(1)
    rows = [
        {
            "images": [Image.open(arguments.work / "records" / row["images"][0])],
            "prompt": [{"role": "user", "content": row["messages"][0]["content"].removeprefix("<image>")}],
            "completion": [row["messages"][1]],
        }
        for row in ordered_rows(arguments.work)
    ]
    folder = arguments.work / arguments.model
    waiting = Waiting(rounds)
    trainer = SFTTrainer(
        model=str(folder),
        args=configuration(arguments.work / "trl", arguments.dtype, arguments.steps),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(folder),
        callbacks=[waiting],
    )
    collator, compute_loss = trainer.data_collator, trainer.compute_loss

    def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = collator(examples)
        waiting.collated.append({
            "tokens": int(batch["attention_mask"].sum()),
            "labels": int((batch["labels"] != -100).sum()),
            "ids": int((batch["input_ids"] * batch["attention_mask"]).sum()),
        })  # fmt: skip
        return batch

    def loss_of(*given: Any, **named: Any) -> Any:
        found = compute_loss(*given, **named)
        waiting.losses.append((found[0] if isinstance(found, tuple) else found).detach())
        return found

    trainer.data_collator, trainer.compute_loss = collate, loss_of
    trainer.train()


if __name__ == "__main__":
    main()
