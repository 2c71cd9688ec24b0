"""Work whose time is measured: one layer of a published size, its bare arithmetic, and the output layer.

``benchmarks/model.py`` measures the same on CPUs. Shape suffixes: L tokens, H hidden, D head size, V vocabulary, n
tokens of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.presets import preset
from prism_megatron.engine.host.execution import PLAIN, Execution
from prism_megatron.engine.layers.attention import Sequences
from prism_megatron.engine.layers.fp8 import around_all_layers, around_layer
from prism_megatron.engine.logprobs import VocabularyOutput, places_of
from prism_megatron.engine.runtime import World

PRESET = "2B"


@dataclass(frozen=True, eq=False)
class Layer:
    """The first decoder layer of the preset with random weights, and what one training pass of it is given."""

    module: nn.Module
    hidden_L_1_H: Tensor
    gradient_L_1_H: Tensor
    cos_L_1_1_D: Tensor
    sin_L_1_1_D: Tensor

    def forward(self) -> Tensor:
        """Its output, in FP8 where its configuration says so."""
        config = self.module.config
        with around_all_layers(config), around_layer(config, 0):
            output: Tensor = self.module(
                self.hidden_L_1_H, self.cos_L_1_1_D, self.sin_L_1_1_D, Sequences((len(self.hidden_L_1_H),))
            )
        return output

    def train(self) -> None:
        """Forward and backward; gradients of weights and input are dropped."""
        torch.autograd.grad(self.forward(), [self.hidden_L_1_H, *self.module.parameters()], self.gradient_L_1_H)


def one_layer(world: World, dtype: torch.dtype, *, tokens: int, execution: Execution = PLAIN) -> Layer:
    """The same weights and inputs for every ``execution`` on a device."""
    text = preset(PRESET).text
    shape = dataclasses.replace(
        preset(PRESET),
        text=dataclasses.replace(text, num_layers=1),
        vision=dataclasses.replace(preset(PRESET).vision, taps=()),
    )
    provider = Qwen3VLProvider(shape, execution=execution)
    config = provider.transformer_config(ParallelConfig(), dtype)
    chunk = provider.build_chunk(config, world.groups, pre_process=False, post_process=False, vp_stage=None)
    module: nn.Module = next(iter(chunk.decoder.layers)).to(world.device, dtype)
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(world.device, dtype)

    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.ones_like(parameter) if "norm" in name else drawn(*parameter.shape) * 0.02)
    hidden, gradient, angles = (
        drawn(tokens, 1, text.hidden),
        drawn(tokens, 1, text.hidden),
        drawn(tokens, 1, 1, text.head_dim),
    )
    return Layer(module, hidden.requires_grad_(), gradient, angles.cos(), angles.sin())


def layer_flops(tokens: int) -> float:
    """Of matrix products and causal attention of a layer, forward and backward; norms and the like are not counted."""
    text = preset(PRESET).text
    attention = 2 * tokens**2 * text.heads * text.head_dim  # two products, causal: half of each
    return 3.0 * (2 * tokens * sum(rows * columns for rows, columns in matrices()) + attention)


def matrices() -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's four matrices: query, key and value; projection; gate and up; down."""
    text = preset(PRESET).text
    return [
        (text.hidden, (text.heads + 2 * text.kv_heads) * text.head_dim),
        (text.heads * text.head_dim, text.hidden),
        (text.hidden, 2 * text.ffn),
        (text.ffn, text.hidden),
    ]


def matrix_products(dtype: torch.dtype, *, tokens: int, device: torch.device) -> Callable[[], None]:
    """The matrix products of a layer, forward and backward, with nothing around them."""
    operands = [
        (
            torch.randn(tokens, rows, device=device).to(dtype),
            torch.randn(columns, rows, device=device).to(dtype),
            torch.randn(tokens, columns, device=device).to(dtype),
        )
        for rows, columns in matrices()
    ]

    def run() -> None:
        for inputs, weight, grad in operands:
            inputs @ weight.T
            grad @ weight
            grad.T @ inputs

    return run


def bare_arithmetic(dtype: torch.dtype, *, tokens: int, device: torch.device) -> Callable[[], None]:
    """The matrix products of a layer and its attention kernel, forward and backward."""
    text = preset(PRESET).text
    products = matrix_products(dtype, tokens=tokens, device=device)

    def drawn(heads: int) -> Tensor:
        return torch.randn(1, heads, tokens, text.head_dim, device=device).to(dtype).requires_grad_()

    query, key, value = drawn(text.heads), drawn(text.kv_heads), drawn(text.kv_heads)
    gradient = torch.randn_like(query)

    def run() -> None:
        products()
        context = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.autograd.grad(context, (query, key, value), gradient)

    return run


@dataclass(frozen=True, eq=False)
class Head:
    """Loss, entropy and gradients of the output layer: in chunks, and by ``log_softmax`` over all logits in fp32.

    Under tensor parallelism a rank has its columns, and its part of the hidden states' gradient. Both give the loss and
    the gradients of hidden states and of the weight.
    """

    world: World
    hidden_L_1_H: Tensor
    weight_V_H: Tensor
    targets_1_L: Tensor
    factors_2_1_L: Tensor

    def chunked(self) -> tuple[Tensor, ...]:
        """Ours."""
        logprob_factors, entropy_factors = self.factors_2_1_L
        loss, _ = VocabularyOutput(
            self.hidden_L_1_H, self.weight_V_H, self.world.groups.tp, preset(PRESET).text.vocab
        ).learn(
            lambda logprobs_n, entropy_n, of: (
                logprobs_n * of(logprob_factors) + entropy_n * of(entropy_factors)
            ).sum(),
            self.targets_1_L,
            places_of(torch.ones_like(self.targets_1_L)),
        )
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden_L_1_H, self.weight_V_H))

    def plain(self) -> tuple[Tensor, ...]:
        """The plain computation; of a rank that has all columns."""
        table = (self.hidden_L_1_H @ self.weight_V_H.t()).float().log_softmax(-1).transpose(0, 1)
        picked = table.gather(-1, self.targets_1_L.unsqueeze(-1)).squeeze(-1)
        entropy = -(table.exp() * table).sum(-1)
        loss = (picked * self.factors_2_1_L[0] + entropy * self.factors_2_1_L[1]).sum()
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden_L_1_H, self.weight_V_H))


def head(world: World, dtype: torch.dtype, *, tokens: int) -> Head:
    """The preset's output layer with random weights; the same for every rank of a layout but for its columns."""
    text = preset(PRESET).text
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    hidden = drawn(tokens, 1, text.hidden).to(world.device, dtype).requires_grad_()
    weight = drawn(text.vocab, text.hidden).mul_(text.hidden**-0.5).to(world.device, dtype)
    targets = torch.randint(text.vocab, (1, tokens), generator=generator).to(world.device)
    factors = drawn(2, 1, tokens).to(world.device)
    own = weight.chunk(world.parallel.tp)[world.tp_rank].clone().requires_grad_()
    return Head(world, hidden, own, targets, factors)


def spread(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest distance of a tensor to the expected one, relative to that one's norm."""
    pairs = zip(ours, expected, strict=True)
    return max(float((mine.float() - one.float()).norm() / one.float().norm()) for mine, one in pairs)
