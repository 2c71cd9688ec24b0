"""One trainable model on the parallel groups: build, load, forward, backward, step, export.

Policy and discriminator are two of these, built from two providers on the same ``World``. Every method is collective
over the ranks that its docstring names, and makes the same number of collective calls whatever the data. This is one
class and no more, whose methods share the model, its optimizer and its groups; what they call stands in files beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.conversion.announced_weights import AnnouncedWeights, WeightShare
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.building import build_chunks, data_parallel, sum_gradients
from prism_megatron.engine.export import WeightTable, digest_of
from prism_megatron.engine.gradients import gather_gradients, gradient_of, spread_of
from prism_megatron.engine.host.fast_paths import PLAIN_PATHS, FastPaths
from prism_megatron.engine.offload import Offload
from prism_megatron.engine.optimizer import (
    adam_step,
    build_optimizer,
    gradient_norm,
    set_adam_step,
    set_learning_rate,
    state_stretches,
)
from prism_megatron.engine.passes import forward_step, shared_outputs, unreduced
from prism_megatron.engine.pieces import Piece, Stretch, is_shard, pieces_of
from prism_megatron.engine.provider import LossFn, LossOutput, ModelProvider, PassOutput, StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.engine.token_values import ValuesFn, gather_token_values
from prism_megatron.engine.vision.cache import VisionCache
from prism_megatron.engine.vision.images import SharedImages
from prism_megatron.observability.activity import Activity

DEFAULT_BUCKET_BYTES = 256 * 2**20


class MegatronEngine:
    """A role: pipeline chunks, their optimizer and their step count.

    ``optimizer=None`` makes an engine that only runs forward. ``dtype`` is fp32 or bf16; bf16 parameters have fp32
    masters in the optimizer, and gradients are reduced in fp32 in either case.
    """

    def __init__(
        self,
        *,
        name: str,
        provider: ModelProvider,
        world: World,
        dtype: torch.dtype,
        optimizer: OptimizerConfig | None,
        total_steps: int,
        fast: FastPaths = PLAIN_PATHS,
    ) -> None:
        """Build on all ranks. Raises ConfigError for a layout that does not fit the model (see the provider)."""
        self.name = name
        self.activity = Activity()
        """what is told of micro-batches and weights"""
        self.world = world
        self.dtype = dtype
        self.total_steps = total_steps
        self.steps_taken = 0
        """optimizer steps so far, skipped ones included; the schedule's position"""
        self.expert_layout: ExpertLayout | None = None
        """how the folder stores experts that the weights were loaded from; None before, and for a dense model"""
        self.vision_cache: VisionCache | None = None
        """where features of images are kept from pass to pass; for a vision tower that is frozen"""
        self.provider = provider
        self.config = provider.transformer_config(world.parallel, dtype)
        self.config.finalize_model_grads_func = sum_gradients
        self.modules = build_chunks(provider, self.config, world, dtype)
        self.weights = WeightTable(
            self.modules,
            provider.weight_mappings,
            world.groups,
            num_experts=self.config.num_moe_experts or 0,
        )
        for module in self.modules:
            for parameter_name, parameter in module.named_parameters():
                if optimizer is None or provider.is_frozen(parameter_name):
                    parameter.requires_grad_(False)
        self._optimizer_config = optimizer
        self.optimizer: ChainedOptimizer | None = None
        self._chunks: list[Any] = self.modules
        if optimizer is not None:
            distributed = world.parallel.distributed_optimizer
            self._chunks = [data_parallel(module, self.config, world, distributed, fast) for module in self.modules]
            if fast.overlap_grad_reduce:
                functions = [chunk.no_sync for chunk in self._chunks]
                self.config.no_sync_func = functions if len(functions) > 1 else functions[0]
            self.optimizer = build_optimizer(
                self._chunks,
                optimizer,
                dtype=dtype,
                distributed=distributed,
                overlap_param_gather=fast.overlap_param_gather,
                groups=world.groups,
            )
        self._gathers_late = optimizer is not None and fast.overlap_param_gather
        self._is_stale = False
        """whether ranks hold weights that an update of other ranks has changed: the next pass gathers them"""
        self._offload = Offload(self._chunks, self.optimizer) if optimizer and optimizer.offload else None

    def load_hf(self, source: TensorSource) -> None:
        """Take all weights from Hugging Face tensors, in any layout of experts; masters follow.

        Raises ConversionError as ``WeightTable.load``, and for experts whose layout is mixed or cannot be told.
        """
        self._restore()
        self.expert_layout = self.provider.expert_layout(source)
        self.weights.load(source, self.expert_layout)
        if self.optimizer is not None:
            self.optimizer.reload_model_params()
        self.release()

    def export_hf(
        self,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        *,
        layout: ExpertLayout | None = None,
        changed_only: bool = False,
    ) -> AnnouncedWeights:
        """Yield ``(hf_name, full tensor)``, the same on every rank; all ranks iterate together, to the end.

        Experts come in ``layout``, by default in the one that they were loaded from. ``changed_only`` leaves out what
        the provider keeps as loaded, for a receiver that has had a whole export.
        """
        self._gather_weights()
        layout = layout or self.expert_layout
        leave_out = self._unchanged(changed_only=changed_only)
        shapes, left_out = self.weights.hf_shapes(layout, leave_out)
        return AnnouncedWeights(
            shapes,
            self._counted(self.weights.export(bucket_bytes, layout, leave_out=leave_out), total=len(shapes)),
            left_out=left_out,
        )

    def export_share(
        self, bucket_bytes: int = DEFAULT_BUCKET_BYTES, *, layout: ExpertLayout, changed_only: bool = False
    ) -> WeightShare:
        """Yield ``(hf_name, full tensor)`` of what this rank sends (see ``WeightTable.share``).

        All ranks call it and iterate to the end, each beside the others of its TP group. ``changed_only`` as of
        ``export_hf``.
        """
        self._gather_weights()
        leave_out = self._unchanged(changed_only=changed_only)
        shapes, left_out = self.weights.hf_shapes(layout, leave_out)
        own_shapes, own_left_out = self.weights.shared_shapes(layout, leave_out)
        tensors = self.weights.share(bucket_bytes, layout, leave_out=leave_out)
        return WeightShare(
            shapes,
            self._counted(tensors, total=len(own_shapes)),
            left_out=left_out,
            own_shapes=own_shapes,
            own_left_out=own_left_out,
        )

    def _unchanged(self, *, changed_only: bool) -> Callable[[str], bool]:
        """What an export leaves out, by the names of parameters in a chunk."""
        return self.provider.is_frozen if changed_only else _nothing

    def weights_digest(self, wanted: Callable[[str], bool]) -> str:
        """SHA-256 of the weights of those parameters (by their names in a chunk) that are ``wanted``, in any layout.

        Of names, dtypes, shapes and bits; the same on every rank, which call together.
        """
        self._gather_weights()
        return digest_of(self.weights.export(DEFAULT_BUCKET_BYTES, None, leave_out=lambda name: not wanted(name)))

    def export_gradients(
        self, bucket_bytes: int = DEFAULT_BUCKET_BYTES, *, layout: ExpertLayout | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(hf_name, full gradient)`` in fp32, as ``export_hf`` does weights; a frozen weight's is zeros.

        They are those of the last ``forward_backward``, before ``step``, which clips them in place.
        """
        assert self.optimizer is not None
        gather_gradients(self._chunks)
        return self.weights.export(bucket_bytes, layout or self.expert_layout, of=gradient_of, dtype=torch.float32)

    def gradient_spread(self) -> float:
        """How far this rank's gradient of a replicated parameter lies from tensor-parallel rank 0's, at most.

        Relative to the gradient's norm; anything but 0 would let the copies drift apart.
        """
        return spread_of((parameter for _, parameter in self.weights.replicated()), self.world.groups.tp)

    def forward_backward(
        self, batches: Sequence[Batch], loss: LossFn, *, adds: bool = False, more: bool = False
    ) -> PassOutput:
        """Gradients of the summed loss of ``batches``, replacing those of an earlier call; summed over DP ranks.

        ``batches`` are this data-parallel rank's micro-batches, at least one, the same on all its ranks. Every
        data-parallel rank calls this, with losses that return the same names of sums.
        A step may take several calls: all but the last have ``more``, which leaves gradients and what the provider
        measures to the calls that follow, and all but the first have ``adds``.
        Raises RuntimeError for an engine that is not to be trained.
        """
        if self.optimizer is None:
            raise RuntimeError(f"engine {self.name!r} was built without an optimizer; it only runs forward")
        if not adds:
            if self._offload is not None:
                self._offload.restore()
            self.zero_grad()
        for chunk in self._chunks:
            chunk.train()
        with unreduced(self.config, self._chunks) if more else nullcontext():
            return self._run(batches, loss, forward_only=False, more=more)

    def forward(self, batches: Sequence[Batch], loss: LossFn, *, more: bool = False) -> PassOutput:
        """As ``forward_backward`` without gradients, in evaluation mode; gradients of an earlier call stay."""
        for chunk in self._chunks:
            chunk.eval()
        with torch.no_grad():
            return self._run(batches, loss, forward_only=True, more=more)

    def token_values(self, batches: Sequence[Batch], values: ValuesFn) -> list[list[Tensor]]:
        """What ``values`` finds for every token: for each micro-batch and sequence ``[K, tokens]``, on all its ranks.

        ``values`` gives ``[K, B, L]`` in fp32 for this context-parallel rank's outputs, as ``beside_logits`` has them;
        they come back at the tokens that are predicted, 0 at a sequence's first. Runs in evaluation mode without
        gradients; every rank calls this. Nothing is pickled on the way.
        """
        for chunk in self._chunks:
            chunk.eval()

        def kept(output: Any, batch: Batch) -> LossOutput:
            found_K_B_L = values(output, batch)
            return LossOutput(found_K_B_L.new_zeros(()), rows={"values": found_K_B_L})

        with torch.no_grad():
            outputs = self._outputs(batches, kept, forward_only=True)
        self._measured()  # forgets what this pass counted
        return gather_token_values([output.rows["values"] for output in outputs], batches, self.world)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        assert self.optimizer is not None
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, *, update: bool = True) -> StepResult:
        """Clip the gradients of the last ``forward_backward`` to the global norm and apply AdamW, on all ranks.

        A gradient that is not finite is dropped: ``updated`` is False and no weight changes; so it is without
        ``update``, which all ranks have to agree on. The schedule moves on in any case. With ``offload`` gradients
        and optimizer state are gone afterwards, until the next ``forward_backward``, checkpoint or load.
        """
        assert self.optimizer is not None and self._optimizer_config is not None
        self._restore()
        lr = self._optimizer_config.lr_at(self.steps_taken, self.total_steps)
        set_learning_rate(self.optimizer, lr)
        self.steps_taken += 1
        norm = gradient_norm(self.optimizer)
        updated = update and norm != float("inf")
        if updated:
            self.optimizer.step()
            self._is_stale = self._gathers_late
        self.release()
        return StepResult(grad_norm=norm, lr=lr, updated=updated)

    def release(self) -> None:
        """With ``offload``, put gradients and optimizer state away."""
        if self._offload is not None:
            self._offload.release()

    def _restore(self) -> None:
        if self._offload is not None:
            self._offload.restore()
            self._offload.wait()

    def _gather_weights(self) -> None:
        """Where the next pass would gather what the last update changed, do so now, for others that read weights."""
        if self._is_stale:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)
            self._is_stale = False

    @property
    def was_updated(self) -> bool:
        """Whether an update has ever changed its weights, that of an earlier part of the run included."""
        return self.optimizer is not None and adam_step(self.optimizer) > 0

    def progress(self) -> dict[str, int]:
        """What a checkpoint keeps of this engine beside its tensors."""
        return {
            "steps_taken": self.steps_taken,
            "adam_step": 0 if self.optimizer is None else adam_step(self.optimizer),
        }

    def pieces(self, role: str | None = None, *, with_state: bool = True) -> list[Piece]:
        """What a checkpoint has of this rank, lying where it is: weights, and ``with_state`` masters and moments.

        To save from until the next ``forward_backward``, or to load into, before ``resume`` or ``take_weights``. State
        that is offloaded stays where it is. ``role`` is what names in the checkpoint begin with, by default the
        engine's name. On all ranks together.
        """
        self._gather_weights()
        if self._offload is not None:
            self._offload.wait()
        shards: dict[str, Any] = {}
        for module in self.modules:
            shards |= module.sharded_state_dict(prefix=f"{role or self.name}.", metadata=self._checkpoint_metadata())
        weights = [base.data for base in nested_values(shards) if is_shard(base)]
        forgotten = {id(parameter) for module in self.modules for parameter in module.parameters()}
        forgotten.difference_update(map(id, weights))
        assert not forgotten, f"{len(forgotten)} parameters of {self.name} have no place in a checkpoint"
        stretches = [Stretch(weight, "", weight.detach().view(-1)) for weight in weights]
        if self.optimizer is not None and with_state:
            where = _itself if self._offload is None else self._offload.where
            stretches += state_stretches(self.optimizer, where)
        return pieces_of(shards, stretches, self.world.groups)

    def resume(self, progress: Mapping[str, int]) -> None:
        """Go on from ``progress``, once all ``pieces`` have been loaded."""
        if self.optimizer is not None:
            set_adam_step(self.optimizer, progress["adam_step"])
        self.steps_taken = progress["steps_taken"]

    def take_weights(self) -> None:
        """Let masters follow, once the ``pieces`` of the weights alone have been loaded; moments and counts stay."""
        if self.optimizer is not None:
            self._restore()
            self.optimizer.reload_model_params()
            self.release()

    def _checkpoint_metadata(self) -> dict[str, Any]:
        return {"dp_cp_group": self.world.groups.dp_cp}

    def _run(self, batches: Sequence[Batch], loss: LossFn, *, forward_only: bool, more: bool = False) -> PassOutput:
        outputs = self._outputs(batches, loss, forward_only=forward_only)
        return self._share(outputs, more=more)

    def _share(self, outputs: Sequence[LossOutput], *, more: bool) -> PassOutput:
        return shared_outputs(outputs, dict if more else self._measured, self.world)

    def _measured(self) -> Mapping[str, float]:
        """What the provider has counted since it was asked last."""
        return self.provider.measure(self.modules, self._sum_over_ranks)

    def _outputs(self, batches: Sequence[Batch], loss: LossFn, *, forward_only: bool) -> list[LossOutput]:
        """What the loss returned for every micro-batch; empty on ranks of other than the last stage."""
        if not batches:
            raise ValueError(f"engine {self.name!r} needs at least one micro-batch on every rank")
        shared = SharedImages((batch.images for batch in batches), cache=self.vision_cache)
        batches = [replace(batch, shared_images=shared) for batch in batches]
        rows, padded = batches[0].input_ids_B_S.shape
        # Megatron runs every chunk of a virtual pipeline over every micro-batch.
        with self.activity.task(f"micro-batches of the {self.name}", total=len(batches) * len(self._chunks)) as advance:
            outputs: list[LossOutput] = get_forward_backward_func()(
                forward_step_func=partial(forward_step, loss=loss, advance=advance),
                data_iterator=[iter(batches) for _ in self._chunks],
                model=self._chunks,
                num_microbatches=len(batches),
                # With variable_seq_lengths stages tell each other the true shape; these two only have to be there.
                seq_length=padded,
                micro_batch_size=rows,
                forward_only=forward_only,
                pg_collection=self.world.groups,
                **self._schedule_arguments(),
            )
            self._is_stale = False  # every module has waited for its weights
            return outputs

    def _counted(self, weights: Iterator[tuple[str, Tensor]], *, total: int) -> Iterator[tuple[str, Tensor]]:
        """The same tensors; how many have been taken is told."""
        with self.activity.task("weights", total=total) as advance:
            for named in weights:
                yield named
                advance(1)

    def _schedule_arguments(self) -> dict[str, Any]:
        """The schedule takes our groups only together with a communicator over the same pipeline group."""
        if self.world.parallel.pp == 1:
            return {}
        return {"p2p_communicator": P2PCommunicator(pp_group=self.world.groups.pp, config=self.config)}

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values.cpu()


def _nothing(_parameter_name: str) -> bool:
    return False


def _itself(tensor: Tensor) -> Tensor:
    return tensor
