"""TRL's GRPOTrainer with transformers' generation. Runs in TRL's environment (``make trl``)."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.grpo_sides.group import LR, MICRO_BATCH, NEW_TOKENS, PROMPTS, SAMPLES, checksum, prompts_of
from benchmarks.sft_sides.rounds import Rounds, all_rows


class Waiting(TrainerCallback):
    """Says what every step took; waits between rounds."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds
        self.seen = {"tokens": 0, "labels": 0, "ids": 0}
        self.generating = 0.0
        self.began = time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.rounds.begin()
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        whole = time.perf_counter() - self.began
        self.rounds.took(0.0, **self.seen, parts={"rollout": self.generating, "rest": whole - self.generating})
        self.seen = dict.fromkeys(self.seen, 0)
        self.generating, self.began = 0.0, time.perf_counter()


def configuration(output: Path, model: str, dtype: str, steps: int) -> GRPOConfig:
    """One update a batch, no reference, every answer as long as it may be."""
    size = MICRO_BATCH[model]
    return GRPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=PROMPTS * SAMPLES // size,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        beta=0.0,
        temperature=1.0,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        max_steps=steps,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        shuffle_dataset=False,
        optim="adamw_torch",
        learning_rate=LR,
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
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    parser.add_argument("way", choices=("padded",))
    parser.add_argument("steps", type=int)
    arguments = parser.parse_args()
    rounds = Rounds()
    torch.set_num_threads(1)
    records = all_rows(arguments.work)
    asked = [records[number] for step in range(arguments.steps) for number in prompts_of(step, len(records))]
    rows = [
        {
            "images": [Image.open(arguments.work / "records" / row["images"][0])],
            "prompt": [{"role": "user", "content": row["messages"][0]["content"].removeprefix("<image>")}],
        }
        for row in asked
    ]

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [checksum(completion[0]["content"]) for completion in completions]

    folder, waiting = arguments.work / arguments.model, Waiting(rounds)
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=configuration(arguments.work / "trl", arguments.model, arguments.dtype, arguments.steps),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(folder, padding_side="left", truncation_side="left"),
        callbacks=[waiting],
    )
    generate = trainer._generate_single_turn

    def timed(prompt_ids: Any, *given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        found = generate(prompt_ids, *given, **named)
        waiting.generating += time.perf_counter() - began
        waiting.seen["tokens"] += sum(map(len, found[0]))
        waiting.seen["labels"] += len(found[0])
        waiting.seen["ids"] += sum(map(sum, prompt_ids)) // SAMPLES
        return found

    trainer._generate_single_turn = timed
    trainer.train()


if __name__ == "__main__":
    main()
