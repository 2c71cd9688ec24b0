"""Does the device get back what a resting role does not need, and does the role go on as if nothing had happened?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.presets import preset
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.cached_memory import give_back
from prism_megatron.engine.logprobs import VocabularyOutput, places_of
from prism_megatron.engine.provider import LossOutput
from prism_megatron.gpu_check.bench import Bench
from prism_megatron.gpu_check.rows import Row, measured, skipped, within
from prism_megatron.parity.tiny import tiny_config
from prism_megatron.types import TokenSequence

KEPT = 1.1
"""Most that may stay behind, of the weights' bytes: the weights, what torch's allocator rounds up, and its pools."""
_LAYERS = 4


def check_memory(bench: Bench) -> Iterator[Row]:
    """A role whose optimizer waits in host memory beside one whose optimizer stays, two updates each."""
    give_back()
    before = _taken(bench)
    staying = trained(bench, offload=False)
    wanted = staying.weights_digest(lambda _name: True)
    peak = _taken(bench)
    del staying
    give_back()
    resting = trained(bench, offload=True)
    give_back()
    weights = sum(parameter.nbytes for module in resting.modules for parameter in module.parameters())
    if before is None or peak is None:
        yield skipped("memory that a resting role keeps", "the CPU keeps no account of tensors")
    else:
        yield measured("taken while it trains", (peak - before) / 2**30, "GiB")
        left = _taken(bench)
        assert left is not None
        yield within("left while it rests, of the weights' bytes", (left - before) / weights, KEPT,
                     note=f"weights of {weights / 2**30:.2f} GiB")  # fmt: skip
    same = resting.weights_digest(lambda _name: True) == wanted
    yield within("weights that an optimizer in host memory changes", 0.0 if same else 1.0, 0.0,
                 note="as one that stays, to the bit, after two updates")  # fmt: skip


def trained(bench: Bench, *, offload: bool) -> MegatronEngine:
    """A policy after two updates, the same each time but for where its optimizer is."""
    if bench.dry:
        shape, dtype = Qwen3VLShape.from_dict(tiny_config()), torch.float32
    else:
        published = preset("2B")
        shape = dataclasses.replace(published, text=dataclasses.replace(published.text, num_layers=_LAYERS))
        dtype = torch.bfloat16
    engine = MegatronEngine(
        name="policy", provider=Qwen3VLProvider(shape), world=bench.world, dtype=dtype,
        optimizer=OptimizerConfig(lr=1e-3, offload=offload), total_steps=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in engine.modules:
            for _, parameter in sorted(module.named_parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    assert engine.optimizer is not None
    engine.optimizer.reload_model_params()
    for _ in range(2):
        engine.forward_backward([_text(bench, shape)], _loss)
        engine.step()
    return engine


def _text(bench: Bench, shape: Qwen3VLShape) -> Batch:
    rows = [TokenSequence(tuple(range(2, 2 + bench.size(2048, 32))), ())]
    return collate(rows, pad_token_id=shape.pad_token_id, multiple_of=1, device=bench.device)


def _loss(output: VocabularyOutput, batch: Batch) -> LossOutput:
    ids_B_S = batch.input_ids_B_S
    loss, _ = output.learn(
        lambda logprobs_n, *_: -logprobs_n.mean(),
        ids_B_S.roll(-1, 1),
        places_of(torch.ones_like(ids_B_S)),
        with_entropy=False,
    )
    return LossOutput(loss=loss)


def _taken(bench: Bench) -> int | None:
    """Bytes of the device that nobody has free; None on the CPU."""
    if bench.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
