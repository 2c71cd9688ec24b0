"""A pipeline of tools that compute next to nothing, in this process: what they make is a hash of all that they read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.fields import OnResume
from prism_megatron.config.merge import merge
from prism_megatron.config.pipeline.file import read_pipeline
from prism_megatron.config.pipeline.flags import PipelineConfig
from prism_megatron.config.run import RunConfig
from prism_megatron.config.tools.evaluate import EvaluateConfig, check_evaluate
from prism_megatron.config.yaml_file import read_yaml
from prism_megatron.errors import ConfigError
from prism_megatron.evaluation.benchmark.answers import Answered, places_of
from prism_megatron.evaluation.benchmark.metrics import summary_of
from prism_megatron.evaluation.benchmark.paired import compare_all
from prism_megatron.evaluation.charts import line_chart
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.progress import Columns
from prism_megatron.pipeline.plan import Plan, plan_of
from prism_megatron.pipeline.play import play
from prism_megatron.pipeline.process import Processes
from prism_megatron.pipeline.report import write_pipeline_report
from prism_megatron.pipeline.state import State
from prism_megatron.pipeline.tools import Tool
from prism_megatron.stages.evaluate.questions import read_questions

STEPS = """
stages:
  teach:
    tool: train
    steps: 3
  judge:
    tool: warm
    model: {model: "@teach"}
  play:
    tool: train
    model: {model: "@teach"}
    discriminator: {discriminator: "@judge"}
    steps: 5
  choose:
    tool: choose
    model: "@play"
  reward:
    tool: train
    model: {model: "@play"}
    prompts: "@choose/chosen.jsonl"
    steps: 7
evaluate: {scenes: 4, shown: 2}
"""
"""Five stages in the form of the method's."""


@dataclass(frozen=True)
class Model:
    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    model: str | None = None


@dataclass(frozen=True)
class Discriminator:
    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    discriminator: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Of any stage that plays steps."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    model: Model = field(default_factory=Model)
    discriminator: Discriminator = field(default_factory=Discriminator)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    data: Path | None = None
    prompts: Path | None = None
    steps: Annotated[int | None, OnResume.LONGER] = 2
    seed: int = 1
    lr: float = 1.0
    algo: str = "grpo"
    ranks: Annotated[int, OnResume.FREE] = 1


@dataclass(frozen=True)
class ChooseConfig:
    """Of one that chooses prompts."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    model: str | None = None
    seed: int = 1
    keep: Annotated[float, OnResume.FREE] = 0.5
    output: Annotated[Path | None, OnResume.COMMAND] = None


def _check_train(config: TrainConfig) -> None:
    """As commands do: what is named has to be there."""
    for place in (config.model.model, config.discriminator.discriminator, config.prompts):
        if place is not None and not Path(place).exists():
            raise ConfigError(f"{place} is not there")


def _parse(kind: type[Any], argv: Sequence[str]) -> Any:
    config = merge(kind(), read_yaml(Path(argv[1])))  # as a command does, and in a fraction of its time
    if isinstance(config, TrainConfig) and config.prompts is not None and not config.prompts.is_file():
        raise ConfigError(f"--prompts {config.prompts} is no file")
    if isinstance(config, TrainConfig) and config.lr <= 0:
        raise ConfigError("--lr must be above 0")
    return config


def _parse_evaluate(argv: Sequence[str]) -> EvaluateConfig:
    config = merge(EvaluateConfig(), read_yaml(Path(argv[1])))
    check_evaluate(config)
    return config


def _charts(rows: Sequence[Any]) -> Sequence[str]:
    return [line_chart("Loss", {"loss": [(row["step"], row["loss"]) for row in rows]})]


VIEW = StageView(Columns("", "", lambda _row: ""), lambda rows: {"loss": rows[-1]["loss"]}, lambda _: [], _charts)


def tools(home: Path) -> dict[str, Tool]:
    """The fake tools; ``home`` is given the policy that a stage without one starts from."""
    mini = home / "mini"
    mini.mkdir(exist_ok=True)
    (mini / "config.json").write_text("{}")
    (mini / "made").write_text("mini")

    def of_train(name: str, **more: Any) -> Tool:
        return Tool(
            name, (name,), TrainConfig, lambda argv: _parse(TrainConfig, argv), _check_train, view=VIEW,
            mini_policy=lambda _config: mini, **more,
        )  # fmt: skip

    inputs: Any = {("model", "model"): "policy", ("discriminator", "discriminator"): "discriminator"}
    return {
        "train": of_train("train", inputs={**inputs, ("prompts",): "prompts"}, makes={"policy": None},
                          policy_steps=lambda config: config.steps),
        "warm": of_train("warm", inputs=inputs, makes={"discriminator": None}),
        "choose": Tool("choose", ("choose",), ChooseConfig, lambda argv: _parse(ChooseConfig, argv), lambda _: None,
                       inputs={("model",): "policy"}, makes={"prompts": "chosen.jsonl"}, resume=(),
                       chosen_by=(("keep",),), mini_policy=lambda _config: mini),
        "evaluate": Tool("evaluate", ("evaluate",), EvaluateConfig, _parse_evaluate, lambda _: None,
                         inputs={("model",): "policy", ("against",): "answers"}, makes={"answers": None}, resume=()),
    }  # fmt: skip


@dataclass
class FakeProcesses(Processes):
    """Plays the commands at once. ``said`` are the folders that were asked for, ``ends`` what a folder's ends with."""

    said: list[str] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)
    before_end: Callable[[str], None] = lambda _name: None

    def __post_init__(self) -> None:
        super().__init__()

    def run(self, words: Sequence[str]) -> int:
        self.raise_if_asked("before it began")
        kind, _, config, _, output = words[1:6]
        folder = Path(output)
        name = f"{folder.parent.name}/{folder.name}"
        self.said.append(name)
        if name in self.ends:
            return self.ends[name]
        folder.mkdir(parents=True, exist_ok=True)
        values = read_yaml(Path(config))
        _WORK[kind](values, folder)
        self.before_end(name)
        return 0


def _made(place: Any) -> str:
    """What an earlier step made, by its content."""
    path = Path(str(place)) / "made" if Path(str(place)).is_dir() else Path(str(place))
    return path.read_text() if path.is_file() else str(place)


def _train(values: Any, folder: Path) -> None:
    read = [_made(values[one][one]) for one in ("model", "discriminator")] + [_made(values["prompts"])]
    made = hashlib.sha256(json.dumps([read, values["steps"], values["seed"], values["lr"]]).encode()).hexdigest()
    steps = values["steps"] or 1
    rows = [json.dumps({"step": step, "loss": 1 / (step + 1), "seconds/all": 0.5}) for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    (folder / "made").write_text(made)
    (folder / "report.html").write_text("a page")
    (folder / "summary.json").write_text(json.dumps({"steps": steps, "ended": "done"}))


def _choose(values: Any, folder: Path) -> None:
    (folder / "chosen.jsonl").write_text(f"{_made(values['model'])} {values['keep']}\n")
    names = ("prompts", "selected", "keep_from", "keep_to", "accuracy", "histogram")
    (folder / "summary.json").write_text(json.dumps(dict.fromkeys(names, 1)))


def _evaluate(values: Any, folder: Path) -> None:
    config = merge(EvaluateConfig(), values)
    answers = answers_of(config)
    items = [one.item for one in _questions(config)]
    summary = summary_of(items, [[one] for one in answers])
    if config.against is not None:
        base = [Answered(**json.loads(line)) for line in Path(config.against, "answers.jsonl").read_text().splitlines()]
        summary["against"] = {"folder": str(config.against), "measures": [one.to_plain() for one in
                                                                          compare_all(answers, base)]}  # fmt: skip
    (folder / "begun.json").write_text(json.dumps({"config": {}}))
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(asdict(one))}\n" for one in answers))
    (folder / "summary.json").write_text(json.dumps(summary))


def _questions(config: EvaluateConfig) -> Any:
    return read_questions(config.data, part=config.part, limit=config.limit, scenes=config.scenes, seed=config.seed)


def answers_of(config: EvaluateConfig) -> list[Answered]:
    """Greedy ones, of which the model's content decides which are right; the text is hostile."""
    made = _made(config.model)
    found = []
    for place, one in enumerate(_questions(config)):
        (where,) = places_of(one.item, 0)
        right = hashlib.sha256(f"{made}{place}".encode()).digest()[0] % 2 == 0
        found.append(Answered(*where, counts=right, right=right, valid=True, truncated=False, tokens=place,
                              kind="word", answer="", problem="", text="<script>alert('x')</script>",
                              failure=""))  # fmt: skip
    return found


_WORK: dict[str, Callable[[Any, Path], None]] = {
    "train": _train,
    "warm": _train,
    "choose": _choose,
    "evaluate": _evaluate,
}


@dataclass
class Home:
    """A folder with a pipeline's file, and what was played of it."""

    folder: Path
    text: str = STEPS
    lines: list[str] = field(default_factory=list)
    table: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "run"

    def plan(self, **flags: Any) -> Plan:
        path = self.folder / "own.yaml"
        path.write_text(self.text)
        known = tools(self.folder)
        file = read_pipeline(path, tools=[name for name in known if name != "evaluate"])
        return plan_of(file, PipelineConfig(config=path, **flags), known, self.output)

    def play(self, processes: FakeProcesses | None = None, **flags: Any) -> list[str]:
        """The steps that were played, in order."""
        processes = processes or FakeProcesses()
        plan = self.plan(**flags)
        self.output.mkdir(exist_ok=True)
        state = State(self.output)
        play(plan, state, processes, report=lambda: None, say=self.lines.append)
        self.table = write_pipeline_report(plan, state)
        return processes.said

    def report(self) -> dict[str, Any]:
        """Without the minutes."""
        document: dict[str, Any] = json.loads((self.output / "report.json").read_text())
        del document["minutes"]
        return document
