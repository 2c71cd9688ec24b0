"""Pipeline chunks of a Qwen3-VL on Megatron-Core.

``Qwen3VLTrunk`` is everything but the head: a policy adds a vocabulary, a discriminator a score.
Shape suffixes: S tokens of a row, L those of this context-parallel rank, S_local those of this sequence-parallel rank
among them, B rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from torch import Tensor

from model_providers.qwen3_vl.balance import visual_features
from model_providers.qwen3_vl.decoder import Decoder
from model_providers.qwen3_vl.deepstack import Ints, VisualPlaces, VisualRows, locate, pack, pending_taps, unpack
from model_providers.qwen3_vl.mapping import EMBEDDING, OUTPUT
from model_providers.qwen3_vl.mrope import rotary_tables
from model_providers.qwen3_vl.vision import VisionModel
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.ops import vocabulary
from prism_megatron.engine.batch import Batch, Extra, token_sequences
from prism_megatron.engine.layers.attention import Sequences
from prism_megatron.engine.layers.specs import mark_tensor_parallel
from prism_megatron.engine.layers.torch_linears import torch_linears
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.parallel.host_to_device import on_device


class Qwen3VLTrunk(LanguageModule):
    """Vision tower and embedding (first chunk) and this chunk's decoder layers; ``head`` makes the last one's output.

    Parameters carry their global names: layers are kept under their number in the whole model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: Qwen3VLShape,
        layer_spec: ModuleSpec,
        groups: ProcessGroupCollection,
        *,
        recompute_vision: bool,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config, pg_collection=groups)
        self.cp_group = groups.cp
        self.model_type = ModelType.encoder_or_decoder  # read by Megatron's schedules
        self.shape = shape
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.share_embeddings_and_output_weights = False
        if pre_process:
            self.vision_model = VisionModel(config, shape.vision, groups, recompute=recompute_vision)
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded_vocab(shape, config),
                max_sequence_length=0,
                position_embedding_type="none",
                scatter_to_sequence_parallel=False,  # images are put in first
                tp_group=groups.tp,
            )
        self.decoder = Decoder(config, layer_spec, groups, post_process=post_process, vp_stage=vp_stage)
        self.input_payload: Tensor | None = None

    @abstractmethod
    def head(self, hidden: Tensor, batch: Batch) -> Any:
        """The output of the last chunk from normalised hidden states ``[S_local, B, H]``."""

    def mlp_args(self, batch: Batch, tokens_L: Ints) -> tuple[Tensor, ...]:
        """Tensors that the MLP of every layer takes beside the hidden states of the tokens ``tokens_L`` of each row."""
        del batch, tokens_L
        return ()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """What the previous stage sent; Megatron's schedules call this, with a list of one."""
        self.input_payload = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, batch: Batch) -> Any:
        """The payload for the next chunk, or ``head``'s output (see ``deepstack.pack``)."""
        places, positions_3_B_S = locate(batch, self.shape)
        tokens_L = batch.tokens_of(cp_size=self.cp_group.size(), cp_rank=self.cp_group.rank())
        device, text = batch.input_ids_B_S.device, self.shape.text
        cos, sin = rotary_tables(
            on_device(positions_3_B_S[:, :, tokens_L], device),
            head_dim=text.head_dim,
            theta=text.theta,
            mrope_section=text.mrope_section,
            dtype=self.config.params_dtype,
        )
        sequences = Sequences.of(
            batch.row_slots(), prefixes=batch.row_prefixes(), cp_size=self.cp_group.size(), device=device
        )
        local_tokens_L = self.local_tokens(batch)
        local = places.of(local_tokens_L).to(device)
        if self.pre_process:
            hidden, taps = self._embed(batch, tokens_L, places, local)
        else:
            hidden, taps = self._receive(len(local_tokens_L), local)
        mlp_args = self.mlp_args(batch, local_tokens_L)
        hidden = self.decoder(hidden, cos, sin, sequences, visual=local, taps=taps, mlp_args=mlp_args)
        if self.post_process:
            return self.head(hidden, batch)
        next_layer = self.decoder.first_layer + len(self.decoder.layers)
        return pack(hidden, [taps[k] for k in pending_taps(len(self.shape.vision.taps), next_layer)])

    def local_tokens(self, batch: Batch) -> Ints:
        """The tokens of each row whose hidden states this rank holds, after the cuts of context and sequence."""
        tokens_L = batch.tokens_of(cp_size=self.cp_group.size(), cp_rank=self.cp_group.rank())
        if not self.config.sequence_parallel:
            return tokens_L
        share = len(tokens_L) // self.tp_group.size()
        return tokens_L[self.tp_group.rank() * share :][:share]

    def _embed(
        self, batch: Batch, tokens_L: Ints, places: VisualPlaces, local: VisualRows
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        features, *taps = visual_features(self.vision_model, batch, self.cp_group)
        device = batch.input_ids_B_S.device
        ids_B_L = on_device(batch.host_ids_B_S[:, tokens_L], device)
        hidden_L_B_H = self.embedding(input_ids=ids_B_L, position_ids=None)
        visual = places.of(tokens_L).to(device)
        hidden_L_B_H = visual.overwrite(hidden_L_B_H, features.index_select(0, visual.feature_V))
        if self.config.sequence_parallel:
            hidden_L_B_H = scatter_to_sequence_parallel_region(hidden_L_B_H, group=self.tp_group)
            # Each rank takes its own rows of a tap: the identity forward, a sum over ranks backward. With a plain slice
            # every rank would see its own rows' gradient only, and the mergers' replicated weights would drift apart.
            taps = [copy_to_tensor_model_parallel_region(tap, group=self.tp_group) for tap in taps]
        return hidden_L_B_H, {k: tap.index_select(0, local.feature_V) for k, tap in enumerate(taps)}

    def payload_shape(self, batch: Batch) -> tuple[int, int, int]:
        """What ``set_input_tensor`` is given of a micro-batch on a later chunk (see ``deepstack.pack``)."""
        tokens_L = self.local_tokens(batch)
        num_visual, num_rows = len(locate(batch, self.shape)[0].of(tokens_L).token_V), len(batch.input_ids_B_S)
        pending = pending_taps(len(self.shape.vision.taps), self.decoder.first_layer)
        return len(tokens_L) + -(-len(pending) * num_visual // num_rows), num_rows, self.shape.text.hidden

    def _receive(self, num_tokens: int, local: VisualRows) -> tuple[Tensor, Mapping[int, Tensor]]:
        if self.input_payload is None:
            raise RuntimeError("a later pipeline chunk ran before set_input_tensor gave it the previous one's output")
        return unpack(
            self.input_payload,
            num_tokens=num_tokens,
            num_visual=len(local),
            pending=pending_taps(len(self.shape.vision.taps), self.decoder.first_layer),
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Checkpoint shards under global names. (``LanguageModule``'s own expects an output layer.)"""
        shards: ShardedStateDict = MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return shards


class Qwen3VLModel(Qwen3VLTrunk):
    """A policy: the trunk and a vocabulary-parallel output layer, tied to the embedding or not."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: Qwen3VLShape,
        layer_spec: ModuleSpec,
        groups: ProcessGroupCollection,
        *,
        recompute_vision: bool,
        fp32_head: bool = False,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config,
            shape,
            layer_spec,
            groups,
            recompute_vision=recompute_vision,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.fp32_head = fp32_head
        self.share_embeddings_and_output_weights = shape.text.tied
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                padded_vocab(shape, config),
                config=torch_linears(config),
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and shape.text.tied,
                tp_group=groups.tp,
            )
        mark_tensor_parallel(self)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    @property
    def tied_copies(self) -> Mapping[str, str]:
        """Parameters of this chunk that repeat one of another chunk: their name, and the name of what they repeat.

        A loader must fill them too; Megatron keeps them equal from then on.
        """
        has_copy = self.post_process and not self.pre_process and self.share_embeddings_and_output_weights
        return {OUTPUT: EMBEDDING} if has_copy else {}

    def mlp_args(self, batch: Batch, tokens_L: Ints) -> tuple[Tensor, ...]:
        """What ``SoftmaxRouter`` takes beside the hidden states of the local tokens; nothing of a dense model.

        Losses of routers need ``sequence_share`` in the batch: each sequence's share of the step's tokens.
        """
        if self.shape.text.experts is None:
            return ()
        device = batch.input_ids_B_S.device
        slot_L_B, is_real_L_B = (on_device(of, device) for of in token_sequences(batch, tokens_L))
        sequence_L_B = slot_L_B.where(is_real_L_B, len(batch.lengths))
        shares_Q = batch.extras.get(Extra.SEQUENCE_SHARE)
        if shares_Q is None or not torch.is_grad_enabled():
            return sequence_L_B, batch.lengths_Q
        if batch.row_prefixes():
            raise ValueError("a router's losses are means over whole sequences; collate without prefixes for them")
        return sequence_L_B, batch.lengths_Q, shares_Q

    def head(self, hidden: Tensor, batch: Batch) -> VocabularyOutput:
        """What the logits of this context-parallel rank's tokens are made of."""
        del batch
        tied = self.share_embeddings_and_output_weights
        weight_V_H = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        # The product is made elsewhere, so nobody calls the layer: who waits for its weights in time does so here.
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return VocabularyOutput(hidden, weight_V_H, self.tp_group, self.shape.text.vocab, self.fp32_head)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Checkpoint shards under global names; a tied copy of the embedding is saved as its replica."""
        shards: ShardedStateDict = LanguageModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return shards


def padded_vocab(shape: Qwen3VLShape, config: TransformerConfig) -> int:
    """Rows of the embedding and of the output layer over all tensor-parallel ranks (see ``conversion.ops``)."""
    return vocabulary(shape.text.vocab).padded_rows(config.tensor_model_parallel_size)
