"""Builds an evaluation from its configuration, and makes it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from prism_megatron.config.tools.evaluate import EvaluateConfig
from prism_megatron.conversion.checkpoints.model_names import folder_of
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError, RunStopped
from prism_megatron.evaluation.benchmark.answers import ANSWERS, Answered, AnswerFile, places_of
from prism_megatron.evaluation.benchmark.folder import PAGE, Evaluated, holds_evaluation, read_evaluation
from prism_megatron.parallel.collectives import broadcast_object, on_main
from prism_megatron.rewards.rewarder import Rewarder
from prism_megatron.run.result_folder import result_folder, session_in
from prism_megatron.run.session import Session
from prism_megatron.stages.evaluate.ask import ask_all
from prism_megatron.stages.evaluate.endpoint import build_endpoint_asker
from prism_megatron.stages.evaluate.identity import begun_unless_refused, check_same_asked, identity_of, settle
from prism_megatron.stages.evaluate.policy import build_policy_asker
from prism_megatron.stages.evaluate.questions import Batch, batches_of, digest_of, read_questions
from prism_megatron.stages.evaluate.result import write_result
from prism_megatron.stages.evaluate.said import Asker

AGAINST = "against"
"""The folder, in an evaluation's own, of that of the model which it is compared with."""


def evaluate_on(world: World, config: EvaluateConfig) -> None:
    """A whole evaluation on a world that is there.

    Raises PrismError for bad input before anything is asked; RunStopped as ``ask_all``.
    """
    check = partial(check_same_asked, config)
    with result_folder(world, config.output, kind="evaluate", check=check) as folder:
        try:
            base = _base(world, config, folder)
            with session_in(world, folder) as session:
                _evaluate(config, session, base)
        except RunStopped as stopped:
            raise RunStopped(f"{stopped}; the same command with --output {folder} goes on") from stopped


def _base(world: World, config: EvaluateConfig, folder: Path) -> Evaluated | None:
    """What is compared with. A model is asked the same first, by an evaluation of its own inside ``folder``.

    Raises as ``evaluate_on``, naming the flag, and RunStopped also where its end was asked for too late to stop it.
    """
    if config.against is None:
        return None
    if on_main(partial(holds_evaluation, Path(config.against))):
        return on_main(partial(read_evaluation, Path(config.against)))
    own = config.of_base(folder / AGAINST)
    try:
        check = partial(check_same_asked, own)
        with (
            result_folder(world, own.output, kind="evaluate", check=check) as place,
            session_in(world, place) as session,
        ):
            _evaluate(own, session, None)
            if (wish := session.stopping.agreed()) is not None:
                raise RunStopped(f"stopped by {wish} after the last question")
    except PrismError as error:
        raise type(error)(f"--against {config.against}: {error}") from error
    return on_main(partial(read_evaluation, place))


def _evaluate(config: EvaluateConfig, session: Session, base: Evaluated | None) -> None:
    # What is asked of whom.
    read = partial(
        read_questions,
        config.data,
        part=config.part,
        limit=config.limit,
        scenes=config.scenes,
        seed=config.seed,
        mini=config.mini,
    )
    questions = on_main(read)
    policy = None if config.url else broadcast_object(folder_of(config.model, "policy", flag="MODEL"), source=0)
    model = on_main(lambda: {"name": config.model} if policy is None else identity_of(policy))
    on_main(partial(settle, session.output, config, model=model, questions=digest_of(questions)))
    session.open()
    # What it answers.
    batches = batches_of(questions, config.questions_at_once)
    places = [place for one in questions for place in places_of(one.item, config.samples)]
    per_question = 1 + config.samples
    file = AnswerFile(session.output / ANSWERS, places, [per_question * len(batch.questions) for batch in batches])
    answers, done = on_main(file.reopen)
    session.say(f"folder {session.output}; {len(answers) // per_question} of {len(questions)} questions are answered")
    if done < len(batches):
        with begun_unless_refused(session.output):
            answers += _asked(config, policy, batches, session, file=file, before=answers, done=done)
    # What that says.
    result = on_main(partial(write_result, session.output, questions, answers, config, base))
    for line in result.lines:
        session.show_text(line)
    session.say(f"wrote {session.output / PAGE}")


def _asked(
    config: EvaluateConfig,
    policy: Path | None,
    batches: Sequence[Batch],
    session: Session,
    *,
    file: AnswerFile,
    before: Sequence[Answered],
    done: int,
) -> list[Answered]:
    """The answers of all batches but the first ``done``, which have those ``before``."""
    with Rewarder(config.rewards, strict_format=config.strict_format, say=session.say) as rewarder:
        asker: Asker
        if policy is None:
            assert config.url is not None
            has_answered = any(not one.failure for one in before)
            asker = build_endpoint_asker(config, config.url, has_answered=has_answered)
        else:
            asker = build_policy_asker(config, policy, session)
        with closing(asker):
            return ask_all(batches, asker, rewarder, file, session, done=done)
