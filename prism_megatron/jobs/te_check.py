"""Does what we and megatron-core pass to Transformer Engine fit its signatures? (``make te-check``)

Both models are built from Transformer Engine's parts and run forward and backward on the CPU, once for each FP8
recipe, with ``engine.te_bindings`` in place of its modules. Kernels, numbers and speed are not checked.
"""

from __future__ import annotations

from importlib.metadata import version

import torch

from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.experiments.mini_world import mini_model_config
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.capabilities import MINIMUM_CAPABILITY, Installed, check_adam, choose, installed
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.host.fast_paths import FastPaths
from prism_megatron.engine.layers.te_bindings import Ledger, call_context_parallel_attention, stand_ins
from prism_megatron.engine.optimizer import inner_optimizers
from prism_megatron.engine.provider import LossOutput, ModelProvider
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.types import TokenSequence

TOKENS = ("<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
SHAPE = Qwen3VLShape.from_dict(
    mini_model_config(vocab_size=64, token_ids={token: index for index, token in enumerate(TOKENS)})
)
ROWS = [TokenSequence(tuple(range(8, 8 + length)), ()) for length in (40, 20)]

FUSED = FastPaths(fuse_weight_gradients=True, fuse_permutation=True, fuse_router=True)
"""The faster ways that are Transformer Engine's; experts' tokens are then ordered and routed by stand-ins too."""


def check_signatures() -> bool:
    """Bind every call for every recipe and print the table; False where something does not fit."""
    for name in ("torch", "transformer-engine", "megatron-core"):
        print(f"{name} {version(name)}")
    if installed().transformer_engine is None:
        print("MISMATCH megatron-core cannot load this Transformer Engine and would fall back without a word")
        return False
    world = start(ParallelConfig(), seed=1)
    ledger = Ledger()
    plain = {"none": PrecisionConfig()}
    with_fp8 = {recipe: PrecisionConfig(fp8="hybrid", fp8_recipe=recipe) for recipe in MINIMUM_CAPABILITY}
    with stand_ins(ledger):
        for ledger.column, precision in (plain | with_fp8).items():
            for check in (run_models, run_context_parallel):
                try:
                    check(world, precision)
                except TypeError as error:
                    ledger.problems.append(f"{ledger.column}: {error}")
    stop(world)
    report(ledger)
    return not ledger.problems


def run_models(world: World, precision: PrecisionConfig) -> None:
    """Both models, forward and backward, packed and not, with both kinds of recompute."""
    everything = RecomputeConfig("full")
    parts = RecomputeConfig("selective", ("core_attn", "mlp"))
    towers = Towers(experts_per_tower=4, top_k=2)
    policy = Qwen3VLProvider(SHAPE, execution=Execution(everything, precision, "te", FUSED))
    judge = DiscriminatorProvider(SHAPE, towers, head_dropout=0.0, execution=Execution(parts, precision, "te", FUSED))
    for pack in (False, True):
        run_model(world, policy, batch(world, precision, pack=pack), precision)
    run_model(world, judge, batch(world, precision, towers=(0, 1)), precision)


def run_model(world: World, provider: ModelProvider, rows: Batch, precision: PrecisionConfig) -> None:
    """Build, which also finds every parameter by its name, then one pass forward and backward."""
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
        device=world.device,
        pack=pack,
        tower_ids=towers,
    )


def run_context_parallel(world: World, precision: PrecisionConfig) -> None:
    """The arguments of attention under context parallelism."""
    for kind in ("all_gather", "a2a"):
        parallel = ParallelConfig(cp=2, cp_comm=kind)
        config = Qwen3VLProvider(SHAPE, execution=Execution(precision=precision, layers="te")).transformer_config(
            parallel, torch.bfloat16
        )
        call_context_parallel_attention(config, world.groups)


def report(ledger: Ledger) -> None:
    """The table: a line for each callable."""
    columns = ["none", *MINIMUM_CAPABILITY]
    print(f"{'Transformer Engine':28}" + "".join(f"{column:>12}" for column in columns) + "  keywords given")
    for name, fitted in ledger.fitted.items():
        cells = "".join(f"{'fits' if column in fitted else '-':>12}" for column in columns)
        print(f"{name:28}{cells}  {', '.join(sorted(ledger.keywords[name]))}")
    for problem in ledger.problems:
        print(f"MISMATCH {problem}")
