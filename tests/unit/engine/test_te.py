"""The seams to Transformer Engine as far as a CPU can tell: arguments, names and settings.

Transformer Engine is absent here: its attention and its checkpoint are fakes that note what they are given. That these
notes fit its real signatures is what ``make te-check`` shows; that its kernels compute right needs a GPU.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_align_size, is_first_last_bf16_layer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.experts import TEGroupedMLP
from torch import Tensor, nn

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.engine.export import canonical_name
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.layers import te
from prism_megatron.engine.layers.attention import Sequences
from prism_megatron.engine.layers.expert_mlps import GroupedExperts
from prism_megatron.engine.layers.recompute import checkpointed
from prism_megatron.errors import ConfigError
from tests.distributed.tiny import provider

RECIPES: tuple[Any, ...] = ("delayed", "tensorwise", "blockwise", "mxfp8")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
def test_the_settings_are_ones_that_megatron_takes(form: Any, recipe: Any) -> None:
    """Megatron's config is built, so its own checks have run; the align size is compared with its own."""
    spared = 0 if recipe == "delayed" else 1
    precision = PrecisionConfig(fp8=form, fp8_recipe=recipe, fp8_first_layers_bf16=spared)
    model = Qwen3VLProvider(provider().shape, execution=Execution(precision=precision, layers="te"))
    config = model.transformer_config(ParallelConfig(), torch.bfloat16)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (form, Fp8Recipe(recipe), False)
    assert [is_first_last_bf16_layer(config, number) for number in range(4)] == [bool(spared), False, False, False]
    assert precision.fp8_multiple == get_fp8_align_size(config.fp8_recipe)


def test_without_fp8_nothing_is_set() -> None:
    config = provider().transformer_config(ParallelConfig(), torch.float32)
    assert config.fp8 is None


def test_fp8_without_its_layers_is_refused() -> None:
    model = Qwen3VLProvider(provider().shape, execution=Execution(precision=PrecisionConfig(fp8="hybrid")))
    with pytest.raises(ConfigError, match="megatron-core would ignore it"):
        model.transformer_config(ParallelConfig(), torch.bfloat16)


class FakeAttention(nn.Module):
    """Notes its arguments and gives back the queries, heads flattened, as Transformer Engine's attention would."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self.built_with = keywords
        self.calls: list[dict[str, Any]] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
        self.calls.append({"query": query, "key": key, "value": value, **keywords})
        return query.flatten(-2)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(te, "TEDotProductAttention", FakeAttention)

    def build(*, cp: int = 1, cp_comm_type: str = "all_gather") -> te.TECoreAttention:
        config = SimpleNamespace(context_parallel_size=cp, attention_dropout=0.0)
        return te.TECoreAttention(
            config=config, cp_comm_type=cp_comm_type, layer_number=3, name="core", attention_type="self",
            attn_mask_type=AttnMaskType.causal, pg_collection=SimpleNamespace(cp=None),
        )  # fmt: skip

    return build


def call(core: te.TECoreAttention, slots: tuple[int, ...], *, rows: int) -> tuple[Tensor, dict[str, Any], Tensor]:
    query = torch.randn(sum(slots), rows, 8, 4)
    context = core(query, torch.randn(sum(slots), rows, 2, 4), torch.randn(sum(slots), rows, 2, 4), Sequences(slots))
    return context, core.inner.calls[-1], query


def test_rows_of_one_sequence_go_in_as_they_are(core: Any) -> None:
    context, noted, query = call(core(), (6,), rows=3)
    assert noted["query"] is query and "packed_seq_params" not in noted
    assert noted["attn_mask_type"] == AttnMaskType.causal and noted["attention_mask"] is None
    assert torch.equal(context, query.flatten(2))


def test_packed_sequences_go_in_with_their_ends_and_come_back_as_a_row(core: Any) -> None:
    context, noted, query = call(core(), (4, 6, 2), rows=1)
    packed: PackedSeqParams = noted["packed_seq_params"]
    assert noted["query"].shape == (12, 8, 4) and noted["key"].shape == noted["value"].shape == (12, 2, 4)
    for ends in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert ends.dtype == torch.int32 and ends.tolist() == [0, 4, 10, 12]
    assert (packed.qkv_format, packed.max_seqlen_q, packed.max_seqlen_kv) == ("thd", 6, 6)
    assert packed.cu_seqlens_q_padded is None and packed.cu_seqlens_kv_padded is None
    assert torch.equal(context, query.flatten(2))


def test_context_parallel_packing_names_the_padded_ends_too(core: Any) -> None:
    _, noted, _ = call(core(cp=2, cp_comm_type="a2a"), (4, 8), rows=1)
    packed: PackedSeqParams = noted["packed_seq_params"]
    assert packed.cu_seqlens_q_padded.tolist() == packed.cu_seqlens_kv_padded.tolist() == [0, 4, 12]
    assert packed.max_seqlen_q == 8, "lengths are those over all ranks"


def test_an_old_transformer_engine_packs_under_a2a_only(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te, "is_te_min_version", lambda _version: False)
    call(core(cp=2, cp_comm_type="a2a"), (4, 8), rows=1)
    call(core(cp=2), (8,), rows=1)
    with pytest.raises(ConfigError, match=r"--cp-comm all_gather with packed .* use --cp-comm a2a"):
        call(core(cp=2), (4, 8), rows=1)


def test_what_goes_on_from_a_prompt_is_torchs(core: Any) -> None:
    """Claim: two sequences behind one prompt attend to it, by torch's attention; Transformer Engine's is not asked."""
    built = core()
    query, key, value = (torch.randn(12, 1, heads, 4) for heads in (8, 2, 2))
    context = built(query, key, value, Sequences((4, 4, 4), ((0, 0), (0, 4), (0, 4))))
    assert built.inner.calls == []
    for start in (4, 8):
        places = [*range(4), *range(start, start + 4)]
        alone = built.behind_prompts(query[places], key[places], value[places], Sequences((8,)))
        torch.testing.assert_close(context[start : start + 4], alone[4:])


def test_attention_is_built_with_what_megatron_passes_but_a_name(core: Any) -> None:
    built = core(cp=2, cp_comm_type="a2a")
    passed = {"layer_number", "attention_type", "attn_mask_type", "pg_collection"}
    assert built.inner.built_with.keys() == {"config", "cp_comm_type", *passed}
    assert built.inner.built_with["cp_comm_type"] == "a2a"
    assert built.sharded_state_dict("any.") == {}


class FakeGroupedLinear(nn.Module):
    """Transformer Engine's, as a loop over the experts' weights."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))))

    def forward(self, tokens: Tensor, counts: list[int]) -> tuple[Tensor, None]:
        parts = zip(tokens.split(counts), self.weights, strict=True)
        return torch.cat([nn.functional.linear(part, weight) for part, weight in parts]), None


class FakePadding(nn.Module):
    """``Fp8Padding`` to multiples of 4, or its inverse."""

    def __init__(self, *, undo: bool) -> None:
        super().__init__()
        self.undo = undo

    def forward(self, tokens: Tensor, counts: list[int]) -> Any:
        padded = [-(-count // 4) * 4 for count in counts]
        if self.undo:
            return torch.cat([part[:count] for part, count in zip(tokens.split(padded), counts, strict=True)])
        rows = [nn.functional.pad(part, (0, 0, 0, -len(part) % 4)) for part in tokens.split(counts)]
        return torch.cat(rows), padded


@pytest.mark.parametrize("fp8", ["none", "hybrid"])
def test_grouped_experts_are_megatrons_with_one_function_between_their_products(fp8: Any) -> None:
    """Claim: outputs and gradients equal those of ``TEGroupedMLP.forward`` without fusion, to the bit, padded or not.

    Blind spot: its linears and its padding are fakes.
    """
    execution = Execution(precision=PrecisionConfig(fp8=fp8), layers="te")
    config = Qwen3VLProvider(provider().shape, execution=execution).transformer_config(ParallelConfig(), torch.bfloat16)
    experts = GroupedExperts.__new__(GroupedExperts)
    MegatronModule.__init__(experts, config)
    experts.num_local_experts, experts.activation_func = 3, config.activation_func
    experts.offload_expert_fc1 = experts.offload_moe_act = experts.activation_recompute = False
    experts._with_fused_impl = False
    experts.linear_fc1, experts.linear_fc2 = FakeGroupedLinear(3, 12, 8), FakeGroupedLinear(3, 8, 6)
    experts.quantization_padding, experts.quantization_unpadding = FakePadding(undo=False), FakePadding(undo=True)
    tokens, gates = torch.randn(7, 8, requires_grad=True), torch.rand(7, requires_grad=True)
    inputs = (tokens, gates, *experts.parameters())
    results = []
    for forward in (GroupedExperts.forward, TEGroupedMLP.forward):
        output, bias = forward(experts, tokens, torch.tensor([5, 0, 2]), gates)
        assert bias is None
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    assert all(torch.equal(mine, megatrons) for mine, megatrons in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("grouped", "canonical"),
    [
        (
            "decoder.layers.3.mlp.experts.linear_fc1.weight0",
            "decoder.layers.3.mlp.experts.local_experts.0.linear_fc1.weight",
        ),
        (
            "decoder.layers.3.mlp.experts.linear_fc2.weight12",
            "decoder.layers.3.mlp.experts.local_experts.12.linear_fc2.weight",
        ),
        *(
            (name, name)
            for name in (
                "decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight",
                "decoder.layers.3.mlp.linear_fc1.weight",
                "decoder.layers.3.input_layernorm.weight",
            )
        ),
    ],
)
def test_grouped_experts_have_the_names_of_single_ones(grouped: str, canonical: str) -> None:
    assert canonical_name(grouped) == canonical


def test_under_fp8_recompute_is_transformer_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[dict[str, Any]] = []

    def te_checkpoint(function: Any, *arguments: Any, **keywords: Any) -> Any:
        noted.append(keywords)
        return function(*arguments)

    fake = ModuleType("transformer_engine.pytorch")
    fake.checkpoint = te_checkpoint  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", fake)
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(checkpointed(torch.mul, x, x), x * x) and noted == []
    assert torch.equal(checkpointed(torch.mul, x, x, fp8=True), x * x)
    assert noted == [{"use_reentrant": False}], "the reentrant kind loses gradients of tensors inside lists"
