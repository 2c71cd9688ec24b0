"""What training saved at TP2·PP2 is taken up in other layouts: both players, dense and with experts, odd vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch

from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.check import CheckConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.tools.convert import TargetLayout, ToHFConfig, ToMegatronConfig
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.conversion.checkpoints.source import CheckpointSource
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.conversion.ops import Column
from prism_megatron.engine import checkpoint
from prism_megatron.engine.provider import ModelProvider
from prism_megatron.engine.runtime import World
from prism_megatron.errors import CheckpointError
from prism_megatron.jobs.check_weights import check_weights
from prism_megatron.jobs.convert import Role, to_hf, to_megatron
from prism_megatron.testing import GlooWorld
from tests.distributed import tiny
from tests.distributed.checkpoint_ranks import (
    FOLDERS,
    Continuation,
    Kind,
    build,
    load_and_continue,
    provider,
    train_and_save,
    weights_of,
)

LAYOUTS = {
    "TP1": (1, ParallelConfig()),
    "TP4·PP2": (8, ParallelConfig(tp=4, pp=2)),
    "EP2·DP2": (2, ParallelConfig(ep=2)),
}
EMBEDDING = "policy.embedding.word_embeddings.weight"
MINI: Mapping[Role, Kind] = {"policy": "dense", "discriminator": "discriminator"}
Saved = tuple[Path, dict[str, dict[str, Continuation]]]


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(8) as world:
        yield world


@pytest.fixture(scope="module")
def saved(gloo: GlooWorld, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("saved")
    return root, gloo.run(train_and_save, root, num_ranks=4, parallel=ParallelConfig(tp=2, pp=2))[0]


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_on_in_another_layout(gloo: GlooWorld, saved: Saved, tmp_path: Path, layout: str) -> None:
    """Claim: every tensor is taken up to the bit, and the next step is that of the run that never stopped.

    The first half: saved again at once, each weight, master and moment is what it was. The second, in fp32 with sums in
    another order: loss to 2e-6 and gradient norm to 5e-6 relative, every weight after the step to 1e-6, a few units in
    the last place of the largest, where an update is up to 1e-2. Blind spot: the data position is the caller's, and is
    the step alone, because batches, sampling and dropout are drawn from (seed, step);
    ``tests/integration/test_align.py`` resumes a whole run.
    """
    root, expected = saved
    ranks, parallel = LAYOUTS[layout]
    found = gloo.run(load_and_continue, root, tmp_path, num_ranks=ranks, parallel=parallel)[0]
    for name in FOLDERS:
        before, after = TorchDistFolder(root / name), TorchDistFolder(tmp_path / name)
        keys = before.keys()
        assert list(after.keys()) == list(keys)
        assert any(".exp_avg_sq." in key for key in keys)
        for key in keys:
            assert after.shape(key) == before.shape(key) and after.dtype(key) == before.dtype(key), key
            rows = before.shape(key)[0]
            assert torch.equal(after.read(key, 0, rows), before.read(key, 0, rows)), key
        for role, wanted in expected[name].items():
            ours = found[name][role]
            assert ours.loss == pytest.approx(wanted.loss, rel=2e-6), (name, role)
            assert ours.grad_norm == pytest.approx(wanted.grad_norm, rel=5e-6), (name, role)
            assert ours.weights.keys() == wanted.weights.keys()
            worst = max(float((ours.weights[n] - weight).abs().max()) for n, weight in wanted.weights.items())
            print(f"{layout} {name} {role}: loss {ours.loss - wanted.loss:.1e}, norm "
                  f"{ours.grad_norm - wanted.grad_norm:.1e}, weights {worst:.1e}")  # fmt: skip
            assert worst <= 1e-6


def test_padding_is_stored_as_zeros_and_never_learns(saved: Saved) -> None:
    """Claim: after two steps with weight decay, rows past the vocabulary are zero, and so are their moments.

    They get no gradient: a first moment that had ever seen one would not be zero.
    """
    for name, roles in FOLDERS.items():
        folder = TorchDistFolder(saved[0] / name)
        held = folder.keys()
        keys = [key for key in held if key.endswith(("word_embeddings.weight", "output_layer.weight"))]
        assert len(keys) >= 4 * len(roles)
        for key in keys:
            assert folder.shape(key)[0] == 128 > tiny.VOCAB
            assert not folder.read(key, tiny.VOCAB, 128).any(), key
            assert folder.read(key, 0, tiny.VOCAB).any(), key


def save_otherwise(world: World, folder: Path) -> dict[str, torch.Tensor]:
    """A policy whose vocabulary is padded to a multiple of tp only."""
    with mock.patch.object(Column, "padded_rows", lambda self, tp_size: -(-self.rows // tp_size) * tp_size):
        engine = build(world, "experts")
        tiny.train(engine, range(1))
        checkpoint.save(folder, {"policy": engine}, {}, models={})
        return tiny.exported(engine)


def load_otherwise(world: World, folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """All weights, and the largest of the padding of both vocabularies."""
    engine = build(world, "experts")
    checkpoint.load(folder, {"policy": engine})
    parameters = dict(engine.modules[0].named_parameters())
    vocabularies = [parameters[name] for name in engine.weights.vocabularies()]
    return tiny.exported(engine), [float(one[tiny.VOCAB :].abs().max()) for one in vocabularies]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_checkpoint_padded_otherwise_loads(gloo: GlooWorld, tmp_path: Path, tp: int) -> None:
    """Claim: one padded for its tp alone, or not at all, gives the same words, and zeros for the rest."""
    weights = gloo.run(save_otherwise, tmp_path / "step", num_ranks=tp, parallel=ParallelConfig(tp=tp))[0]
    assert TorchDistFolder(tmp_path / "step").shape(EMBEDDING)[0] == tiny.VOCAB + tp - 1
    found, padding = gloo.run(load_otherwise, tmp_path / "step", num_ranks=1)[0]
    assert padding == [0.0, 0.0]
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def error_with_more_words(world: World, folder: Path) -> str:
    config = {**tiny.CONFIG, "text_config": {**tiny.CONFIG["text_config"], "vocab_size": 150}}
    engine = build(world, "dense", Qwen3VLProvider(Qwen3VLShape.from_dict(config)))
    try:
        checkpoint.load(folder, {"policy": engine})
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_checkpoint_with_fewer_words_is_refused(gloo: GlooWorld, saved: Saved) -> None:
    """Claim: Megatron would fill the missing words with zeros; every rank gets an error that names the tensor."""
    for message in gloo.run(error_with_more_words, saved[0] / "players", num_ranks=2, parallel=ParallelConfig(pp=2)):
        assert f"128 rows of {EMBEDDING}, fewer than the model's 150 words" in message


@pytest.mark.parametrize(("name", "role"), [("players", "policy"), ("players", "discriminator"), ("experts", "policy")])
def test_weights_alone_are_taken_from_training(gloo: GlooWorld, saved: Saved, name: str, role: Role) -> None:
    """Claim: a fresh bf16 engine in another layout takes one role's fp32 weights, rounded, and nothing else."""
    kind = FOLDERS[name][role]
    found = gloo.run(weights_of, saved[0] / name, kind, num_ranks=2, parallel=ParallelConfig(pp=2))[0]
    expected = CheckpointSource(TorchDistFolder(saved[0] / name), role, provider(kind).weight_mappings())
    assert found.keys() == set(expected.names())
    assert all(torch.equal(tensor, expected.get(tensor_name).bfloat16()) for tensor_name, tensor in found.items())


@pytest.mark.parametrize("role", MINI)
def test_a_converted_checkpoint_is_taken_in_any_layout(gloo: GlooWorld, tmp_path: Path, role: Role) -> None:
    """Claim: converted without Megatron for TP4, read by Megatron at TP2·PP2: every weight is the folder's to the bit.

    The mini's, policy and discriminator; both roles hold their model files, so that nothing else is needed.
    """
    source = MINI_FOLDER / role
    layout = TargetLayout(tp=4)
    to_megatron(ToMegatronConfig(layout, hf=str(source), save=str(tmp_path / "converted")), say=lambda _: None)
    files = files_folder(tmp_path / "converted", role)
    model: ModelProvider
    if role == "policy":
        model = Qwen3VLProvider(Qwen3VLShape.from_folder(files))
    else:
        model = DiscriminatorProvider.from_folder(files)
    arguments = (tmp_path / "converted", MINI[role], model)
    found = gloo.run(weights_of, *arguments, num_ranks=4, parallel=ParallelConfig(tp=2, pp=2))[0]
    expected = HFFolder(source)
    assert found.keys() == set(expected.names())
    assert all(torch.equal(tensor, expected.get(name)) for name, tensor in found.items())


def test_what_training_saves_becomes_a_model_folder(saved: Saved, tmp_path: Path) -> None:
    """Claim: a checkpoint of training, cut at TP2·PP2 with moments beside the weights, gives a whole model folder."""
    for name, roles in FOLDERS.items():
        for role in roles:
            load, target = str(saved[0] / name), str(tmp_path / f"{name}-{role}")
            to_hf(ToHFConfig(load=load, save=target, role=role), say=lambda _: None)
            assert check_weights(CheckConfig(load, target, role=role)).equal
