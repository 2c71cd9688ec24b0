"""Every recipe under ``examples/`` starts a run that the real checks take, of the model and the ranks that it says.

Blind spot: GPUs, clusters and images. Whether a step fits a GPU is counted by the tests that are marked slow.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prism_megatron.config.engine.validate_layout import check_world
from prism_megatron.config.pipeline.flags import PipelineConfig
from prism_megatron.config.stages.rlvr import check_rlvr
from prism_megatron.config.stages.sft import check_sft
from prism_megatron.config.stages.warm_start import check_warm_start
from prism_megatron.config.validate import check_align, towers_layout
from prism_megatron.errors import ConfigError
from prism_megatron.forecast.before_start import needs_of
from prism_megatron.forecast.build import Planned, plan_align, plan_rlvr, plan_sft
from prism_megatron.forecast.verdict import GIB
from prism_megatron.planning.build import Run as PlannedRun
from prism_megatron.planning.build import StageName
from prism_megatron.planning.gpus import gpu_of
from prism_megatron.planning.needs import estimated_memory
from tests.unit.examples.recipes import EXAMPLES, GPUS_OF_A_HOST, SIZES, STAGES, Run, every_run

NAMES = [
    *(f"{recipe}/{stage}" for recipe in ("single_node_4b", "single_node_8b")
      for stage in ("sft", "warm_start", "align", "select_prompts", "rlvr")),
    *(f"{recipe}/{stage}" for recipe in ("slurm_30b_a3b", "slurm_235b") for stage in STAGES),
    "kubernetes/align",
    "skypilot/sft",
]  # fmt: skip
PLAYED = [name for name in NAMES if not name.endswith(("warm_start", "select_prompts"))]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[str, Run]:
    return {str(run): run for run in every_run(home)}


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def test_no_run_is_without_a_test(runs: dict[str, Run]) -> None:
    """Claim: the names below are those of all runs that the recipes start."""
    assert list(runs) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_run_passes_the_checks_of_its_command(name: str, runs: dict[str, Run]) -> None:
    """Claim: values, layout, world and model go together; what the command would refuse is refused here."""
    check(runs[name])


def check(run: Run) -> None:
    config = run.config()
    if run.stage == "sft":
        check_sft(config, run.policy, world_size=run.ranks)
    elif run.stage == "rlvr":
        check_rlvr(config, run.policy, world_size=run.ranks)
    elif run.stage == "warm_start":
        check_warm_start(config, run.policy, world_size=run.ranks, discriminator=run.judge)
    elif run.stage == "align":
        check_align(config, run.policy, world_size=run.ranks, discriminator=run.judge)


def test_the_checks_are_not_blind(runs: dict[str, Run]) -> None:
    """Claim: with one rank more, every run that is split over ranks is refused."""
    for name in ("single_node_4b/align", "slurm_30b_a3b/align", "slurm_235b/rlvr", "kubernetes/align", "skypilot/sft"):
        run = runs[name]
        with pytest.raises(ConfigError, match="processes"):
            check(Run(run.recipe, run.stage, run.argv, run.ranks + 1, run.ranks_of_a_host))


@pytest.mark.parametrize("name", NAMES)
def test_a_host_has_the_gpus(name: str, runs: dict[str, Run]) -> None:
    """Claim: ranks and the servers that a run starts share a host's eight GPUs, and use all of them."""
    run = runs[name]
    rollout = getattr(run.config(), "rollout", None)
    servers = 0
    if rollout is not None and rollout.rollout == "sglang" and not rollout.rollout_urls:
        servers = rollout.rollout_servers * rollout.rollout_tp
    assert run.ranks_of_a_host + servers == GPUS_OF_A_HOST


@pytest.mark.parametrize("name", NAMES)
def test_tensor_parallel_ranks_are_neighbours(name: str, runs: dict[str, Run]) -> None:
    """Claim: the sums of every layer, and those of context parallelism, stay inside a host."""
    config = runs[name].config()
    if (parallel := getattr(config, "parallel", None)) is not None:
        assert runs[name].ranks_of_a_host % (parallel.tp * parallel.cp) == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("slurm")])
def test_a_job_saves_and_goes_back_before_it_is_ended(name: str, runs: dict[str, Run]) -> None:
    """Claim: --max-minutes comes before the signal, which comes with time left for a step and a checkpoint."""
    recipe, _ = name.split("/")
    text = (EXAMPLES / recipe / "stage.sbatch").read_text(encoding="utf-8")
    hours, notice = (int(one[1]) for one in (re.search(r"--time=(\d+):00:00", text),
                                             re.search(r"--signal=B:TERM@(\d+)", text)) if one)  # fmt: skip
    assert "#SBATCH --requeue" in text and "#SBATCH --open-mode=append" in text
    ends = runs[name].config().run.max_minutes
    assert ends is not None and ends + 10 <= 60 * hours - notice / 60
    assert notice >= 1800


def test_experts_of_both_players_are_split(runs: dict[str, Run]) -> None:
    """Claim: of 128 experts, and by --discriminator-ep of towers of four, each rank holds whole ones."""
    for name, own in (("slurm_30b_a3b/align", 16), ("slurm_235b/align", 2)):
        run = runs[name]
        config, experts = run.config(), run.policy.text.num_experts
        assert experts == 128 and experts // config.parallel.ep == own
        towers = towers_layout(config, run.policy)
        assert towers is not None and towers.ep == 4
        assert (
            check_world(config.parallel, run.ranks, towers=towers) == run.ranks // config.parallel.model_parallel_size
        )


def test_stages_of_a_recipe_follow_one_another(runs: dict[str, Run]) -> None:
    """Claim: over Slurm each stage starts from the folder that the one before it writes."""
    for recipe, folder in (("slurm_30b_a3b", "runs/30b"), ("slurm_235b", "runs/235b")):
        configs = {stage: runs[f"{recipe}/{stage}"].config() for stage in STAGES}
        assert configs["warm_start"].model.model == configs["align"].model.model == f"{folder}/sft"
        assert configs["warm_start"].discriminator.discriminator == f"{folder}/judge"
        assert configs["align"].discriminator.discriminator == f"{folder}/warm_start"
        assert configs["rlvr"].model.model == f"{folder}/align"
        assert f"--save {folder}/judge" in (EXAMPLES / recipe / "all.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", SIZES)
def test_a_recipe_is_of_the_model_that_it_says(recipe: str) -> None:
    """Claim: hub ids in its files are of the size that its checks are made for, and its README says what was run."""
    text = "".join(path.read_text(encoding="utf-8") for path in (EXAMPLES / recipe).iterdir())
    named = set(re.findall(r"Qwen/Qwen3-VL-([\w-]+)-Instruct", text))
    assert named <= {SIZES[recipe], "2B"}
    readme = (EXAMPLES / recipe / "README.md").read_text(encoding="utf-8")
    assert "## What has been run" in readme and "no GPU" in readme.lower().replace("no gpu", "no GPU")


def test_a_pipeline_goes_on_by_the_line_that_starts_it() -> None:
    """Claim: the scripts of one node name their own file and folder, and --resume auto."""
    for recipe, short in (("single_node_4b", "4b"), ("single_node_8b", "8b")):
        text = (EXAMPLES / recipe / "run.sh").read_text(encoding="utf-8")
        assert f"--config examples/{recipe}/pipeline.yaml" in text and f"--output runs/{short}/all" in text
        assert "--resume auto" in text and f"--save runs/{short}/judge" in text
        config = (EXAMPLES / recipe / "pipeline.yaml").read_text(encoding="utf-8")
        assert f"discriminator: runs/{short}/judge" in config
    assert PipelineConfig().resume == "no", "blind: it would be the default"


@pytest.mark.parametrize("name", PLAYED)
def test_the_planner_finds_that_a_run_fits(name: str, runs: dict[str, Run]) -> None:
    """Claim: every one that it takes does, by arithmetic, with margins. Blind spots: warm-start, servers by URL."""
    run = runs[name]
    stage: StageName = run.stage  # type: ignore[assignment]  # one of PLAYED
    plan = PlannedRun(stage, run.config(), run.policy, run.ranks, run.judge if stage == "align" else None)
    memory = estimated_memory(plan, gpu_of("h100-80"))
    print(f"{name}: {memory.worst:.1f} GiB and {memory.reserve:.1f} of margins, of {memory.device_gib:g}")
    assert memory.fits, memory.reason()


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAYED)
def test_a_step_fits_the_gpu(name: str, runs: dict[str, Run]) -> None:
    """Claim: what the step of each role holds, played on tensors without contents, leaves 4 GiB of the card free."""
    run = runs[name]
    need = max(needs_of(planned(run)), key=lambda one: one.at_worst()[1])
    worst, size = need.at_worst()
    print(f"{name}: {size / GIB:.1f} GiB of {run.device_gib:g}, in the step of the {worst}")
    assert size <= (run.device_gib - 4.0) * GIB


def planned(run: Run) -> Planned:
    config = run.config()
    if run.stage == "sft":
        return plan_sft(config, run.policy, world_size=run.ranks)
    if run.stage == "rlvr":
        return plan_rlvr(config, run.policy, world_size=run.ranks)
    return plan_align(config, run.policy, run.judge, world_size=run.ranks)
