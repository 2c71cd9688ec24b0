"""All steps, one after the other, each from the file of the one before to its own; one whose file is there is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from prism_megatron.config.tools.curate import STEPS, CurateConfig, Model, Recipe, Step
from prism_megatron.curation.answer import Answering
from prism_megatron.curation.asking import Speaker, Spent
from prism_megatron.curation.calls import Asker
from prism_megatron.curation.correct import Correctness
from prism_megatron.curation.deduplicate import Deduplicate, deduplicated
from prism_megatron.curation.disambiguate import Disambiguation, by_picture
from prism_megatron.curation.files import Row, num_kept, path_of, rows_of, write_rows, written_aside
from prism_megatron.curation.in_order import in_order
from prism_megatron.curation.pool import Pool
from prism_megatron.curation.progress import Progress
from prism_megatron.curation.select import Selection
from prism_megatron.curation.split import split
from prism_megatron.curation.write import WRITTEN, split_file, write_sets
from prism_megatron.rewards.checker import Checker

_MOST_THREADS = 256
_FEWEST_THREADS = 4


@dataclass(frozen=True)
class Parts:
    """What the steps work with that may be another thing in a test."""

    deduplicate: Deduplicate
    endpoints: Callable[[], AbstractContextManager[Asker]]
    """opened once a step asks"""
    say: Callable[[str], object]
    check_going_on: Callable[[], object] = lambda: None
    """raises PrismError where the command is to end"""


class Curation:
    """One curation in its folder."""

    def __init__(self, config: CurateConfig, recipe: Recipe, folder: Path, parts: Parts) -> None:
        """Nothing is read or asked yet."""
        self._config, self._recipe, self._folder, self._parts = config, recipe, folder, parts
        self._spent = Spent()
        self.pool = Pool(recipe.data, "train", config.limit, parts.check_going_on)
        self.evaluation = Pool(recipe.evaluation, "evaluate", None, parts.check_going_on)

    def play(self) -> None:
        """Every step that is not done, up to --until. Raises PrismError."""
        with ExitStack() as held:
            opened: list[Asker] = []

            def asker() -> Asker:
                if not opened:
                    opened.append(held.enter_context(self._parts.endpoints()))
                return opened[0]

            for step in STEPS:
                self._parts.check_going_on()
                if self.is_done(step):
                    self._parts.say(f"{step}: done before")
                elif step == "write":
                    counts = write_sets(self._folder, split_file(self._folder))
                    said = " and ".join(f"{count} in {name}" for name, count in counts.items())
                    self._parts.say(f"write: {said}")
                else:
                    self._play(step, asker)
                if step == self._config.until:
                    return

    def is_done(self, step: Step) -> bool:
        """Whether the step's file is there."""
        return (self._folder / WRITTEN if step == "write" else path_of(self._folder, step)).is_file()

    def _play(self, step: Step, asker: Callable[[], Asker]) -> None:
        path = path_of(self._folder, step)
        total = None if step == "deduplicate" else num_kept(self._before(step))
        progress = Progress(say=self._parts.say, spent=self._spent, every_seconds=self._config.progress_seconds)
        with ExitStack() as held:
            rows = held.enter_context(closing(progress.watched(step, self._rows(step, asker, held), total)))
            write_rows(held.enter_context(written_aside(path)), rows, path)

    def _rows(self, step: Step, asker: Callable[[], Asker], held: ExitStack) -> Iterator[Row]:
        recipe = self._recipe
        if step == "deduplicate":
            return deduplicated(self.pool, self.evaluation, self._parts.deduplicate)
        if step == "split":
            return split(self._before(step), best=recipe.best, weights=recipe.quality, seed=recipe.seed)
        if step == "disambiguate":
            one = recipe.disambiguator
            disambiguation = Disambiguation(None if one is None else self._speaker("disambiguator", one, asker))
            groups = in_order(
                disambiguation.of,
                by_picture(self._before(step)),
                threads=threads_of(() if one is None else (one,)),
                check_going_on=self._parts.check_going_on,
            )
            return (row for group in groups for row in group)
        checker = held.enter_context(
            Checker(workers=self._config.workers, seconds=self._config.check_seconds, say=self._parts.say)
        )
        judge = None if recipe.judge is None else self._speaker("judge", recipe.judge, asker)
        work: Callable[[Row], Row]
        if step == "select":
            strong = [
                (self._speaker(f"strong {number}", one.model, asker), one.samples)
                for number, one in enumerate(recipe.strong)
            ]
            work = Selection(strong, Correctness(checker, judge), recipe.keep_to).of
            models: tuple[Model, ...] = tuple(one.model for one in recipe.strong)
        else:
            assert step == "answer"
            correctness = Correctness(checker, judge, judge_all=recipe.judge_all)
            teacher = self._speaker("teacher", recipe.teacher, asker)
            work = Answering(teacher, correctness, recipe.attempts, recipe.tell_answer).of
            models = (recipe.teacher,)
        return in_order(
            work,
            rows_of(self._before(step), kept_only=True),
            threads=threads_of(models),
            check_going_on=self._parts.check_going_on,
        )

    def _speaker(self, role: str, model: Model, asker: Callable[[], Asker]) -> Speaker:
        return Speaker(
            role,
            model,
            asker=asker(),
            seed=self._recipe.seed,
            spent=self._spent,
            check_going_on=self._parts.check_going_on,
        )

    def _before(self, step: Step) -> Path:
        return path_of(self._folder, STEPS[STEPS.index(step) - 1])


def threads_of(models: tuple[Model, ...]) -> int:
    """Problems under way at a time: as many as the models' endpoints take calls, within bounds."""
    calls = sum(endpoint.at_once for model in models for endpoint in model.endpoints)
    return min(_MOST_THREADS, max(_FEWEST_THREADS, calls))
