"""The vision tower of Qwen3-VL, tensor-parallel and outside sequence parallelism.

Matches ``Qwen3VLVisionModel`` of transformers 5.23. Shape suffixes: P patches of all images in merge-block order, D
pixels per patch, C hidden size, R merged rows (P / merge²), H hidden size of the language tower.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn

from prism_megatron.config.architecture.qwen3_vl import VisionShape
from prism_megatron.engine.layers.norms import LayerNorm, parameter_device
from prism_megatron.engine.layers.recompute import checkpointed
from prism_megatron.engine.layers.sdpa import scaled_dot_product_attention
from prism_megatron.engine.layers.specs import NumberedModules
from prism_megatron.engine.layers.torch_linears import torch_linears
from prism_megatron.parallel.host_to_device import on_device

EPS = 1e-6
"""LayerNorm epsilon, fixed in transformers and absent from the config file."""
ROPE_BASE = 10000.0

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def patch_coordinates(grid_thw: Sequence[Sequence[int]], merge: int) -> Tensor:
    """Row and column of every patch, ``[P, 2]``, in merge-block order, repeated over frames."""
    coordinates = []
    for frames, height, width in grid_thw:
        blocks = (height // merge, merge, width // merge, merge)
        rows = torch.arange(height).view(-1, 1).expand(height, width).reshape(blocks).transpose(1, 2).flatten()
        columns = torch.arange(width).expand(height, width).reshape(blocks).transpose(1, 2).flatten()
        coordinates.append(torch.stack([rows, columns], dim=-1).repeat(frames, 1))
    return torch.cat(coordinates)


def interpolation(grid_thw: Sequence[Sequence[int]], merge: int, side: int) -> tuple[Tensor, Tensor]:
    """Indices ``[P, 4]`` into the ``side · side`` position table and their bilinear weights (float32).

    Each axis of an image is an inclusive linspace over the table's axis.
    """
    axes: list[tuple[Tensor, Tensor]] = []
    coordinates = patch_coordinates(grid_thw, merge)
    for axis in (0, 1):
        patches = [frames * height * width for frames, height, width in grid_thw]
        sizes = torch.from_numpy(np.repeat([grid[1 + axis] for grid in grid_thw], patches))
        source = coordinates[:, axis].float() * (side - 1) / (sizes - 1).clamp(min=1)
        low = source.floor()
        neighbours = (low.long()[:, None] + torch.arange(2)).clamp(max=side - 1)
        fraction = source - low
        axes.append((neighbours, torch.stack([1 - fraction, fraction], dim=-1)))
    (row, row_weight), (column, column_weight) = axes
    indices = row[:, :, None] * side + column[:, None, :]
    weights = row_weight[:, :, None] * column_weight[:, None, :]
    return indices.flatten(1), weights.flatten(1)


def rotary_table(grid_thw: Sequence[Sequence[int]], merge: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin ``[P, 1, head_dim]`` in float32: rows turn the first half of the frequencies, columns the second."""
    exponent = torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2)
    angles = (patch_coordinates(grid_thw, merge)[..., None].float() * (1.0 / ROPE_BASE**exponent)).flatten(1)
    table = torch.cat((angles, angles), dim=-1)[:, None]
    return table.cos(), table.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary angles in float32 to ``[P, heads, head_dim]``."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class VisionAttention(MegatronModule):
    """Bidirectional attention within each frame; heads are split over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, shape: VisionShape, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.tp_group = groups.tp
        self.head_dim = shape.head_dim
        self.linear_qkv = _column(config, shape.hidden, 3 * shape.hidden, groups)
        self.linear_proj = _row(config, shape.hidden, shape.hidden, groups)

    def forward(self, hidden_P_C: Tensor, cos: Tensor, sin: Tensor, frame_lengths: Sequence[int]) -> Tensor:
        """``frame_lengths`` add up to P. Runs of equal frames (a video, or images of one size) attend as one batch."""
        qkv, _ = self.linear_qkv(hidden_P_C)
        query, key, value = qkv.view(len(qkv), -1, 3, self.head_dim).unbind(2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        runs = [(length, len(list(run))) for length, run in itertools.groupby(frame_lengths)]
        # Split at once: the gradient of a slice has all patches, and there may be a slice for every image.
        own = zip(*(x.split([length * count for length, count in runs]) for x in (query, key, value)), strict=True)
        attended = []
        for (length, count), run in zip(runs, own, strict=True):
            q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in run)
            context = scaled_dot_product_attention(q, k, v)
            attended.append(context.transpose(1, 2).reshape(count * length, -1))
        output: Tensor = self.linear_proj(torch.cat(attended))[0]
        return output


class VisionMLP(MegatronModule):
    """Two tensor-parallel linears around an activation: tanh GELU in blocks, *exact* GELU in every merger."""

    def __init__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        sizes: tuple[int, int, int],
        gelu: str,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = groups.tp
        self.gelu = gelu
        self.linear_fc1 = _column(config, sizes[0], sizes[1], groups)
        self.linear_fc2 = _row(config, sizes[1], sizes[2], groups)

    def forward(self, hidden: Tensor) -> Tensor:
        inner, _ = self.linear_fc1(hidden)
        output: Tensor = self.linear_fc2(nn.functional.gelu(inner, approximate=self.gelu))[0]
        return output


class VisionBlock(MegatronModule):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: TransformerConfig, shape: VisionShape, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.tp_group = groups.tp
        self.input_layernorm = LayerNorm(config, shape.hidden, EPS)
        self.self_attention = VisionAttention(config, shape, groups)
        self.pre_mlp_layernorm = LayerNorm(config, shape.hidden, EPS)
        self.mlp = VisionMLP(config, groups, sizes=(shape.hidden, shape.ffn, shape.hidden), gelu="tanh")

    def forward(self, hidden_P_C: Tensor, cos: Tensor, sin: Tensor, frame_lengths: Sequence[int]) -> Tensor:
        hidden_P_C = hidden_P_C + self.self_attention(self.input_layernorm(hidden_P_C), cos, sin, frame_lengths)
        output: Tensor = hidden_P_C + self.mlp(self.pre_mlp_layernorm(hidden_P_C))
        return output


class Merger(VisionMLP):
    """Merges each merge × merge block of patches into one row at the language tower's width.

    The final merger normalises patches before they are joined, DeepStack's mergers (``norm_after``) the joined row.
    """

    def __init__(
        self, config: TransformerConfig, shape: VisionShape, groups: ProcessGroupCollection, *, norm_after: bool
    ) -> None:
        joined = shape.hidden * shape.merge**2
        super().__init__(config, groups, sizes=(joined, joined, shape.out_hidden), gelu="none")
        self.joined = joined
        self.norm_after = norm_after
        self.patch_norm = LayerNorm(config, joined if norm_after else shape.hidden, EPS)

    def forward(self, hidden_P_C: Tensor) -> Tensor:
        """``[P, C] -> [R, H]``."""
        if self.norm_after:
            return super().forward(self.patch_norm(hidden_P_C.view(-1, self.joined)))
        return super().forward(self.patch_norm(hidden_P_C).view(-1, self.joined))


class VisionModel(MegatronModule):
    """Pixels to one row of features per merged patch, and the DeepStack taps beside them."""

    def __init__(
        self, config: TransformerConfig, shape: VisionShape, groups: ProcessGroupCollection, *, recompute: bool
    ) -> None:
        """``config`` is the language tower's; its width is not used, sequence parallelism and FP8 are left off here.

        ``recompute`` runs every block and merger again in the backward pass.
        """
        config = torch_linears(config)
        config.sequence_parallel = False
        config.fp8 = None
        super().__init__(config=config)
        self.tp_group = groups.tp
        self.shape = shape
        self.recompute = recompute
        dtype, device = config.params_dtype, parameter_device(config)
        self.patch_embed = _emptied(nn.Linear(shape.patch_dim, shape.hidden, dtype=dtype, device="meta"), device)
        self.pos_embed = _emptied(
            nn.Embedding(shape.num_position_embeddings, shape.hidden, dtype=dtype, device="meta"), device
        )
        self.blocks = NumberedModules(VisionBlock(config, shape, groups) for _ in range(shape.depth))
        self.merger = Merger(config, shape, groups, norm_after=False)
        self.deepstack_mergers = NumberedModules(Merger(config, shape, groups, norm_after=True) for _ in shape.taps)

    def forward(self, pixels_P_D: Tensor, grid_thw: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """Features ``[R, H]`` followed by one tap ``[R, H]`` per DeepStack index.

        Without images one block of zeros is run
        (R = 1, which no position shows): every parameter takes part in every micro-batch, with zero gradients, and the
        number of collectives never depends on the data.
        """
        shape = self.shape
        if not grid_thw:
            grid_thw = [(1, shape.merge, shape.merge)]
            pixels_P_D = pixels_P_D.new_zeros(shape.merge**2, shape.patch_dim)
        device = pixels_P_D.device
        indices, weights = (on_device(x, device) for x in interpolation(grid_thw, shape.merge, shape.grid_side))
        cos, sin = (on_device(x, device) for x in rotary_table(grid_thw, shape.merge, shape.head_dim))
        frame_lengths = [height * width for frames, height, width in grid_thw for _ in range(frames)]

        hidden = self.patch_embed(pixels_P_D.to(self.patch_embed.weight.dtype))
        positions = (self.pos_embed(indices) * weights[..., None]).sum(1)
        hidden = hidden + positions.to(hidden.dtype)
        taps = []
        mergers = iter(self.deepstack_mergers)
        for number, block in self.blocks.numbered():
            hidden = self._run(block, hidden, cos, sin, frame_lengths)
            if number in shape.taps:
                taps.append(self._run(next(mergers), hidden))
        return (self._run(self.merger, hidden), *taps)

    def _run(self, module: nn.Module, *arguments: Any) -> Tensor:
        output: Tensor = checkpointed(module, *arguments) if self.recompute else module(*arguments)
        return output


def _emptied(module: ModuleT, device: torch.device) -> ModuleT:
    """A module made on meta, with uninitialised parameters: torch's own initialisation would be thrown away."""
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
    return module


def _no_init(_weight: Tensor) -> None:
    """Weights are always loaded."""


def _column(config: TransformerConfig, rows: int, columns: int, groups: ProcessGroupCollection) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        rows, columns, config=config, init_method=_no_init, bias=True, gather_output=False, tp_group=groups.tp
    )


def _row(config: TransformerConfig, rows: int, columns: int, groups: ProcessGroupCollection) -> RowParallelLinear:
    return RowParallelLinear(
        rows,
        columns,
        config=config,
        init_method=_no_init,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=groups.tp,
    )
