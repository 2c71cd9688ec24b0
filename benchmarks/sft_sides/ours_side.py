"""Our side: the stage as ``prism-sft`` builds it, in one process without reader processes.

``packed`` lays a step's records into one row, one after the other; ``padded`` is one record to a row.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from benchmarks.sft_sides.rounds import Rounds
from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.stages.demonstrations import DemonstrationsConfig
from prism_megatron.config.stages.sft import SFTConfig
from prism_megatron.engine.runtime import start
from prism_megatron.run.session import Session
from prism_megatron.stages.sft.build import build
from prism_megatron.stages.sft.demonstrations import Row
from prism_megatron.training.supervised_update import learn
from prism_megatron.types import TokenSequence

BATCH = 8


def configuration(work: Path, model: str, *, dtype: Literal["fp32", "bf16"], steps: int) -> SFTConfig:
    """Eight records a step, one to a row: their order is the plan's."""
    return SFTConfig(
        model=ModelConfig(model=str(work / model), dtype=dtype),
        data=DemonstrationsConfig(
            data=(work / "records" / "records.jsonl",),
            system_prompt=None,
            max_tokens=4096,
            packing=False,
            rows_per_step=BATCH,
            rows_per_microbatch=BATCH,
            epochs=1000,
            validation_share=0.0,
            index=work / "index",
            readers=0,
        ),
        policy=OptimizerConfig(lr=1e-4, weight_decay=0.0),
        freeze=(),
        steps=steps,
    )


def rows_of(rows: tuple[Row, ...], *, pack: bool) -> tuple[Row, ...]:
    """The rows as they are, or all in one."""
    if not pack:
        return rows
    return (
        Row(tuple(one for row in rows for one in row.demonstrations), tuple(s for row in rows for s in row.sources)),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("model")
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    parser.add_argument("way", choices=("packed", "padded"))
    parser.add_argument("steps", type=int)
    arguments = parser.parse_args()
    rounds = Rounds()
    torch.set_num_threads(1)
    config = configuration(arguments.work, arguments.model, dtype=arguments.dtype, steps=arguments.steps)
    world = start(ParallelConfig(), seed=1)
    stage = build(config, Session(world, arguments.work / "run", quiet=True))
    pack = arguments.way == "packed"
    learner = dataclasses.replace(
        stage.learner, row_tokens=4096 if pack else None, rows_per_microbatch=1 if pack else BATCH
    )
    rounds.begin()
    for taken in stage.lessons.learned.steps({}):
        rows = rows_of(taken.rows, pack=pack)
        update = learn(learner.policy, learner.batches(rows), world=world)
        ids = [sequence.token_ids for sequence in _sequences(rows)]
        rounds.took(update.loss, tokens=sum(map(len, ids)), labels=update.label_tokens, ids=sum(map(sum, ids)))


def _sequences(rows: tuple[Row, ...]) -> Iterator[TokenSequence]:
    return (sequence for row in rows for sequence, _ in row.demonstrations)


if __name__ == "__main__":
    main()
