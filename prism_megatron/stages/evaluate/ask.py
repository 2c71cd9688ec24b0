"""All questions are asked, a batch after the other, and each batch's answers are kept before the next is asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from prism_megatron.errors import RunStopped
from prism_megatron.evaluation.benchmark.answers import Answered, AnswerFile
from prism_megatron.parallel.collectives import on_main
from prism_megatron.rewards.rewarder import Rewarder
from prism_megatron.run.session import Session
from prism_megatron.stages.evaluate.questions import Batch
from prism_megatron.stages.evaluate.said import Asker, Said, judged


def ask_all(
    batches: Sequence[Batch], asker: Asker, rewarder: Rewarder, file: AnswerFile, session: Session, *, done: int
) -> list[Answered]:
    """The answers of all batches but the first ``done``; all ranks call it together.

    Raises RunStopped after a whole batch where somebody asked for an end, and as ``asker``.
    """
    answers: list[Answered] = []
    total = sum(len(batch.questions) for batch in batches)
    asked = sum(len(batch.questions) for batch in batches[:done])
    for batch in batches[done:]:
        if (wish := session.stopping.agreed()) is not None:
            raise RunStopped(f"stopped by {wish} after {asked} of {total} questions")
        with session.activity.phase("rollout"):
            said = asker.ask(batch)
        new = on_main(partial(_kept, batch, said, rewarder, file))
        answers += new
        asked += len(batch.questions)
        greedy = [one for one in new if one.mode == "greedy"]
        right, failed = sum(one.counts for one in greedy), sum(bool(one.failure) for one in new)
        trouble = f"; {failed} answers failed" if failed else ""
        session.say(f"{asked} of {total} questions; {right} of the last {len(greedy)} are right{trouble}")
    return answers


def _kept(batch: Batch, said: Sequence[Sequence[Said]], rewarder: Rewarder, file: AnswerFile) -> list[Answered]:
    answers = judged(batch, said, rewarder)
    file.append(answers)
    return answers
