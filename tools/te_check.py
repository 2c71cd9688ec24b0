"""Does what we and megatron-core pass to Transformer Engine fit its signatures? ``make te-check``; needs no GPU.

Both models are built from Transformer Engine's parts and run forward and backward on the CPU, once for each FP8
recipe. Its modules cannot be made without CUDA, so stand-ins bind every argument to the real signature and then give
back tensors of the right shape; recipes are the real classes. Kernels, numbers and speed are not checked.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions import transformer_engine as extensions
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.mini_world import mini_model_config
from prism_megatron.config.optimizer import OptimizerConfig
from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.config.precision import PrecisionConfig
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.config.recompute import RecomputeConfig
from prism_megatron.engine.attention import Sequences
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.engine.capabilities import MINIMUM_CAPABILITY, Installed, check_adam, choose
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.optimizer import inner_optimizers
from prism_megatron.engine.provider import LossOutput, ModelProvider
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.engine.te import TECoreAttention
from prism_megatron.types import TokenSequence

TOKENS = ("<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
VOCAB = 64
SHAPE = Qwen3VLShape.from_dict(
    mini_model_config(vocab_size=VOCAB, token_ids={token: index for index, token in enumerate(TOKENS)})
)
ROWS = [TokenSequence(tuple(range(8, 8 + length)), ()) for length in (40, 20)]


@dataclass
class Ledger:
    """Every callable of Transformer Engine that was called, the keywords it was given, and the recipes it fitted."""

    column: str = ""
    keywords: dict[str, set[str]] = field(default_factory=dict)
    fitted: dict[str, set[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def bind(self, name: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """The arguments by name, with defaults. Raises TypeError where they do not fit."""
        try:
            bound = inspect.signature(function).bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
        self.keywords.setdefault(name, set()).update(keywords)
        self.fitted.setdefault(name, set()).add(self.column)
        bound.apply_defaults()
        return dict(bound.arguments)


@contextlib.contextmanager
def stand_ins(ledger: Ledger) -> Iterator[None]:
    """Transformer Engine's modules, Adam and FP8 context, with bodies that only bind and shape."""
    with contextlib.ExitStack() as stack:
        for owner, make, run in (
            (te.Linear, _make_linear, _run_linear),
            (te.GroupedLinear, _make_grouped, _run_grouped),
            (te.RMSNorm, _make_norm, _run_norm),
            (te.DotProductAttention, _make_nothing, _run_attention),
            (te.Fp8Padding, _make_nothing, lambda _self, bound: (bound["inp"], bound["m_splits"])),
            (te.Fp8Unpadding, _make_nothing, lambda _self, bound: bound["inp"]),
            (te.optimizers.FusedAdam, _make_adam, None),
        ):
            stack.enter_context(mock.patch.object(owner, "__init__", _bound_init(ledger, owner, make)))
            if run is not None:
                stack.enter_context(mock.patch.object(owner, "_apply", nn.Module._apply))  # the real one wants CUDA
                stack.enter_context(mock.patch.object(owner, "forward", _bound_forward(ledger, owner, run)))
        stack.enter_context(mock.patch.object(te, "fp8_autocast", _bound_autocast(ledger, te.fp8_autocast)))
        stack.enter_context(mock.patch.object(te, "checkpoint", _bound_checkpoint(ledger, te.checkpoint)))
        yield


def _bound_init(ledger: Ledger, owner: Any, make: Callable[[Any, dict[str, Any]], None]) -> Callable[..., None]:
    original = owner.__init__

    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        bound = ledger.bind(owner.__name__, original, self, *arguments, **keywords)
        if isinstance(self, nn.Module):
            nn.Module.__init__(self)
        make(self, bound)

    return init


def _bound_forward(ledger: Ledger, owner: Any, run: Callable[[Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    original = owner.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return run(self, ledger.bind(f"{owner.__name__}.forward", original, self, *arguments, **keywords))

    return forward


def _bound_autocast(ledger: Ledger, original: Callable[..., Any]) -> Callable[..., Any]:
    def fp8_autocast(**keywords: Any) -> Any:
        bound = ledger.bind("fp8_autocast", original, **keywords)
        recipe = type(bound["fp8_recipe"])
        ledger.bind(recipe.__name__, lambda: None)  # Megatron has made the real one: it takes what it was given
        return contextlib.nullcontext()

    return fp8_autocast


def _bound_checkpoint(ledger: Ledger, original: Callable[..., Any]) -> Callable[..., Any]:
    taken = inspect.getsource(original)

    def checkpoint(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        ledger.bind("checkpoint", original, function, *arguments, **keywords)
        for name in keywords:  # its signature takes any keyword, and hands on to the function what it does not know
            if f'kwargs.pop("{name}"' not in taken:
                raise TypeError(f"checkpoint() does not take {name!r}")
        return function(*arguments)

    return checkpoint


def _make_nothing(_self: Any, _bound: dict[str, Any]) -> None:
    pass


def _make_linear(self: Any, bound: dict[str, Any]) -> None:
    self.save_original_input = bound["save_original_input"]  # megatron-core looks for it
    self.weight = _weight(bound, bound["out_features"], bound["in_features"])


def _run_linear(self: Any, bound: dict[str, Any]) -> Tensor:
    return nn.functional.linear(bound["inp"], self.weight)


def _make_grouped(self: Any, bound: dict[str, Any]) -> None:
    self.num_gemms = bound["num_gemms"]
    for gemm in range(self.num_gemms):
        self.register_parameter(f"weight{gemm}", _weight(bound, bound["out_features"], bound["in_features"]))


def _run_grouped(self: Any, bound: dict[str, Any]) -> Tensor:
    parts = bound["inp"].split(bound["m_splits"])
    weights = [getattr(self, f"weight{gemm}") for gemm in range(self.num_gemms)]
    return torch.cat([nn.functional.linear(part, weight) for part, weight in zip(parts, weights, strict=True)])


def _make_norm(self: Any, bound: dict[str, Any]) -> None:
    keywords = bound | bound.get("kwargs", {})
    self.weight = _weight(keywords, keywords["normalized_shape"] or keywords["hidden_size"])
    self.weight.sequence_parallel = keywords["sequence_parallel"]


def _run_norm(self: Any, bound: dict[str, Any]) -> Tensor:
    x: Tensor = bound["input"]
    return nn.functional.rms_norm(x, self.weight.shape, self.weight)


def _run_attention(_self: Any, bound: dict[str, Any]) -> Tensor:
    query, key, value = (bound[f"{name}_layer"] for name in ("query", "key", "value"))
    context: Tensor = query.flatten(-2) + 0 * (key.sum() + value.sum())
    return context


def _make_adam(self: Any, bound: dict[str, Any]) -> None:
    torch.optim.Optimizer.__init__(self, bound["params"], {"lr": bound["lr"]})


def _weight(bound: dict[str, Any], *size: int) -> nn.Parameter:
    return nn.Parameter(torch.full(size, 0.01, dtype=bound["params_dtype"], device=bound["device"]))


def run_models(world: World, precision: PrecisionConfig) -> None:
    """Both models, forward and backward, packed and not, with both kinds of recompute."""
    everything = RecomputeConfig("full")
    parts = RecomputeConfig("selective", ("core_attn", "mlp"))
    towers = Towers(experts_per_tower=4, top_k=2)
    policy = Qwen3VLProvider(SHAPE, recompute=everything, precision=precision, layers="te")
    judge = DiscriminatorProvider(SHAPE, towers, head_dropout=0.0, recompute=parts, precision=precision, layers="te")
    for pack in (False, True):
        run_model(world, policy, batch(world, precision, pack=pack), precision)
    run_model(world, judge, batch(world, precision, towers=(0, 1)), precision)


def run_model(world: World, provider: ModelProvider, rows: Batch, precision: PrecisionConfig) -> None:
    """Build, which also finds every parameter by its name, then one pass; every parameter must get a gradient."""
    engine = MegatronEngine(
        name="checked", provider=provider, world=world, dtype=torch.bfloat16, optimizer=OptimizerConfig(), total_steps=1
    )
    assert engine.optimizer is not None
    device = Installed(torch.__version__, (10, 0), transformer_engine=version("transformer-engine"))
    check_adam(choose(device, precision), inner_optimizers(engine.optimizer))
    engine.forward_backward([rows], lambda output, _batch: LossOutput(loss=output.float().logsumexp(-1).sum()))


def batch(
    world: World, precision: PrecisionConfig, *, pack: bool = False, towers: tuple[int, ...] | None = None
) -> Batch:
    """Two rows of text of unequal lengths."""
    return collate(
        ROWS,
        pad_token_id=1,
        multiple_of=precision.length_multiple(world.parallel),
        patch_dim=SHAPE.vision.patch_dim,
        device=world.device,
        pack=pack,
        tower_ids=towers,
    )


def run_context_parallel(world: World, precision: PrecisionConfig) -> None:
    """The arguments of attention under context parallelism, on a group of one rank that says it is two."""
    for kind in ("all_gather", "a2a"):
        parallel = ParallelConfig(cp=2, cp_comm=kind)
        config = Qwen3VLProvider(SHAPE, precision=precision, layers="te").transformer_config(parallel, torch.bfloat16)
        core = TECoreAttention(
            config=config,
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            cp_comm_type=kind,
            pg_collection=world.groups,
        )
        for slots in ((64,), (32, 32)):
            query = torch.zeros(32, 1, 8, 16)
            core(query, query[:, :, :4], query[:, :, :4], Sequences(slots))


def report(ledger: Ledger) -> None:
    """The table: a line for each callable."""
    columns = ["none", *MINIMUM_CAPABILITY]
    print(f"{'Transformer Engine':28}" + "".join(f"{column:>12}" for column in columns) + "  keywords given")
    for name, fitted in ledger.fitted.items():
        cells = "".join(f"{'fits' if column in fitted else '-':>12}" for column in columns)
        print(f"{name:28}{cells}  {', '.join(sorted(ledger.keywords[name]))}")
    for problem in ledger.problems:
        print(f"MISMATCH {problem}")


def main() -> int:
    for name in ("torch", "transformer-engine", "megatron-core"):
        print(f"{name} {version(name)}")
    if not extensions.HAVE_TE:
        print("MISMATCH megatron-core cannot load this Transformer Engine and would fall back without a word")
        return 1
    world = start(ParallelConfig(), seed=1)
    ledger = Ledger()
    with stand_ins(ledger):
        plain = {"none": PrecisionConfig()}
        with_fp8 = {recipe: PrecisionConfig(fp8="hybrid", fp8_recipe=recipe) for recipe in MINIMUM_CAPABILITY}
        for ledger.column, precision in (plain | with_fp8).items():
            for check in (run_models, run_context_parallel):
                try:
                    check(world, precision)
                except TypeError as error:
                    ledger.problems.append(f"{ledger.column}: {error}")
    stop(world)
    report(ledger)
    return 1 if ledger.problems else 0


if __name__ == "__main__":
    sys.exit(main())
