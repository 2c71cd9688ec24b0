"""Comparing a model too large to hold twice: one part at a time, each on the hidden states that transformers computes.

The first part is the vision tower, the embedding and layer 0; then each layer by itself; the last has the final norm
and the vocabulary. Ours are pipeline chunks of one layer, so it is their own forward that runs. Weights are read part
by part. Shape suffixes: T tokens of a sample, V visual rows, H hidden, C tokens and visual rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.engine.batch import collate
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.engine.runtime import World
from prism_megatron.parity.compare import Difference, agreement, gradient_errors, largest_error, worst_first
from prism_megatron.parity.oracle import model_inputs, one_layer_transformers
from prism_megatron.parity.probe import Sample, random_weights

TEXT, VISUAL, LM_HEAD = "model.language_model", "model.visual", "lm_head"


@dataclass(frozen=True, eq=False)
class State:
    """What reaches a part in transformers' pass over one sample; ``taps_V_H`` are those still to be added."""

    sample: Sample
    positions: Tensor
    visual_1_T: Tensor
    hidden_T_H: Tensor
    taps_V_H: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class PartOutcome:
    """``outputs_C`` of each sample and the gradients of their probe loss: of parameters by name, and of the inputs."""

    outputs_C: list[Tensor]
    gradients: dict[str, Tensor]


def compare_by_layer(
    world: World,
    folder: Path,
    shape: Qwen3VLShape,
    samples: Sequence[Sample],
    *,
    recompute: RecomputeConfig,
    source: TensorSource | None = None,
) -> Difference:
    """Every part's output, input gradient and parameter gradients, in float32, in a world of one process.

    Outputs and input gradients stand among the parameters. ``source`` are our weights, by default the folder's.
    """
    weights = open_weights(folder)
    theirs = Transformers(folder, shape, weights)
    ours = Ours(world, shape, weights if source is None else source, recompute)
    states: list[State] = []
    errors: list[tuple[str, float]] = []
    last = shape.text.num_layers - 1
    for layer in range(last + 1):
        inputs = states
        expected, states = theirs.run(layer, samples, inputs)
        found = ours.run(layer, samples, inputs)
        named = {f"output of layer {layer}, sample {n}": out for n, out in enumerate(expected.outputs_C)}
        mine = dict(zip(named, found.outputs_C, strict=True))
        errors += gradient_errors(found.gradients | mine, expected.gradients | named)
    return Difference(
        logits_max_abs=largest_error(found.outputs_C, expected.outputs_C),
        token_agreement=agreement(found.outputs_C, expected.outputs_C),
        gradients=worst_first(errors),
    )


class Transformers:
    """transformers' one-layer model, filled with the weights of one part after the other."""

    def __init__(self, folder: Path, shape: Qwen3VLShape, weights: TensorSource) -> None:
        self.shape = shape
        self.weights = weights
        self.model = one_layer_transformers(folder, shape)
        self.final_norm = self.model.model.language_model.norm

    def run(self, layer: int, samples: Sequence[Sample], states: Sequence[State]) -> tuple[PartOutcome, list[State]]:
        """Layer ``layer``; ``states`` are those that the layer before left (none for layer 0)."""
        named = self._fill(layer)
        is_last = layer == self.shape.text.num_layers - 1
        outputs, nexts, gradients = [], [], {}
        for n, sample in enumerate(samples):
            if layer == 0:
                state = self._open(sample)
                output = torch.cat([state.hidden_T_H, *state.taps_V_H])
            else:
                leaf = _leaf(_payload(states[n]))
                state = self._continue(layer, states[n], leaf)
                output = self.model.lm_head(state.hidden_T_H) if is_last else state.hidden_T_H
            _backward(output, sample)
            if layer:
                assert leaf.grad is not None
                gradients[f"input of layer {layer}, sample {n}"] = leaf.grad
            outputs.append(output.detach())
            nexts.append(
                dataclasses.replace(
                    state,
                    hidden_T_H=state.hidden_T_H.detach(),
                    taps_V_H=tuple(tap.detach() for tap in state.taps_V_H),
                )
            )
        gradients |= {name: _gradient(parameter) for name, parameter in named.items()}
        self.model.zero_grad(set_to_none=True)
        return PartOutcome(outputs, gradients), nexts

    def _open(self, sample: Sample) -> State:
        """Images, embedding and layer 0 by transformers' own forward; taps are caught as they leave the tower."""
        inputs = model_inputs(sample, self.shape, torch.device("cpu"))
        caught: list[Any] = []
        hook = self.model.model.visual.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state[0]
        hook.remove()
        ids = inputs["input_ids"]
        positions = self.model.model.compute_3d_position_ids(
            inputs_embeds=hidden[None], **{key: value for key, value in inputs.items() if "pixel" not in key}
        )
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
        visual = (ids == self.shape.image_token_id) | (ids == self.shape.video_token_id)
        # transformers splits them by image once they have left the tower.
        taps = [torch.cat(tap) for tap in caught[0].deepstack_features[1:]] if caught else []
        return State(sample, positions, visual, hidden, tuple(taps))

    def _continue(self, layer: int, state: State, payload_C_H: Tensor) -> State:
        hidden, tap = payload_C_H.split([len(state.hidden_T_H), len(payload_C_H) - len(state.hidden_T_H)])
        output = self.model.model.language_model(
            inputs_embeds=hidden[None],
            position_ids=state.positions,
            visual_pos_masks=state.visual_1_T,
            deepstack_visual_embeds=[tap] if layer < len(self.shape.vision.taps) else None,
            use_cache=False,
        ).last_hidden_state[0]
        return dataclasses.replace(state, hidden_T_H=output, taps_V_H=state.taps_V_H[1:])

    def _fill(self, layer: int) -> dict[str, nn.Parameter]:
        """Read the part's weights; its parameters by their names in the folder."""
        text = self.model.model.language_model
        is_last = layer == self.shape.text.num_layers - 1
        parts = {f"{TEXT}.layers.{layer}": text.layers[0]}
        if layer == 0:
            parts |= {f"{TEXT}.embed_tokens": text.embed_tokens, VISUAL: self.model.model.visual}
        text.norm = self.final_norm if is_last else nn.Identity()
        if is_last:
            tied = self.shape.text.tied
            parts |= {f"{TEXT}.norm": text.norm, f"{TEXT}.embed_tokens" if tied else LM_HEAD: self.model.lm_head}
        named: dict[str, nn.Parameter] = {}
        for prefix, module in parts.items():
            held = {name: self._read(f"{prefix}.{name}", p) for name, p in module.named_parameters()}
            module.load_state_dict(held, assign=True)
            named |= {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}
        return named

    def _read(self, name: str, parameter: nn.Parameter) -> Tensor:
        tensor = self.weights.get(name).float()
        # Experts: files of transformers 4 hold the transpose of what 5 holds in memory.
        return tensor if tensor.shape == parameter.shape else tensor.mT.contiguous()


class Ours:
    """Pipeline chunks of one layer, by the provider that builds the whole model's."""

    def __init__(self, world: World, shape: Qwen3VLShape, weights: TensorSource, recompute: RecomputeConfig) -> None:
        self.world = world
        self.shape = shape
        provider = Qwen3VLProvider(shape)
        self.stored = {m.parameter: m for m in provider.weight_mappings(provider.expert_layout(weights))}
        """mappings by parameter, experts as the weights store them"""
        self.compared = {m.parameter: m for m in provider.weight_mappings("transformers")}
        """the same, experts as transformers has them in memory"""
        self.weights = weights
        self.recompute = recompute

    def run(self, layer: int, samples: Sequence[Sample], states: Sequence[State]) -> PartOutcome:
        """As ``Transformers.run``, from the states that transformers left."""
        chunk = self._chunk(layer)
        outputs: list[Tensor] = []
        gradients: dict[str, Tensor] = {}
        for n, sample in enumerate(samples):
            batch = collate(
                [sample.row],
                pad_token_id=self.shape.pad_token_id,
                multiple_of=1,
                device=self.world.device,
            )
            if layer:
                leaf = _leaf(_payload(states[n])[:, None].to(self.world.device))
                chunk.set_input_tensor(leaf)
            made = chunk(batch)
            output = made.logits()[:, 0, : self.shape.text.vocab] if isinstance(made, VocabularyOutput) else made[:, 0]
            _backward(output, sample)
            if layer:
                assert leaf.grad is not None
                gradients[f"input of layer {layer}, sample {n}"] = leaf.grad[:, 0].cpu()
            outputs.append(output.detach().cpu())
        slices: dict[str, dict[int, Tensor]] = {}
        for whole, parameter in self._named(chunk, layer):
            mapping = self.compared[whole]
            for name, tensor in zip(mapping.hf_names, mapping.op.merge([_gradient(parameter)]), strict=True):
                if mapping.expert is None:
                    gradients[name] = tensor
                else:
                    slices.setdefault(name, {})[mapping.expert] = tensor
        fused = {name: torch.stack([of[expert] for expert in sorted(of)]) for name, of in slices.items()}
        return PartOutcome(outputs, gradients | fused)

    def _chunk(self, layer: int) -> Any:
        """The chunk that holds ``layer`` as its only one, with its weights."""
        text, vision = self.shape.text, self.shape.vision
        # Layer 0 sends the other taps on; a later layer is sent its own, if it has one.
        taps = vision.taps if layer == 0 else vision.taps[layer : layer + 1]
        shape = dataclasses.replace(
            self.shape, text=dataclasses.replace(text, num_layers=1), vision=dataclasses.replace(vision, taps=taps)
        )
        provider = Qwen3VLProvider(shape, execution=Execution(self.recompute))
        chunk = provider.build_chunk(
            provider.transformer_config(ParallelConfig(), torch.float32),
            self.world.groups,
            pre_process=layer == 0,
            post_process=layer == text.num_layers - 1,
            vp_stage=None,
        ).to(self.world.device)
        for whole, parameter in self._named(chunk, layer):
            mapping = self.stored[whole]
            with torch.no_grad():
                parameter.copy_(mapping.op.split(mapping.read(self.weights), 1)[0])
        return chunk

    def _named(self, chunk: Any, layer: int) -> Iterator[tuple[str, nn.Parameter]]:
        """The chunk's parameters beside what they are called in the whole model."""
        for name, parameter in chunk.named_parameters():
            yield chunk.tied_copies.get(name, name).replace("decoder.layers.0.", f"decoder.layers.{layer}."), parameter


def _payload(state: State) -> Tensor:
    """``[C, H]``: hidden states, and below them the rows of the tap that the next layer adds."""
    return torch.cat([state.hidden_T_H, *state.taps_V_H[:1]])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _backward(output_C: Tensor, sample: Sample) -> None:
    """Gradients of the probe loss on a part's output."""
    (output_C * random_weights(sample.key, *output_C.shape).to(output_C.device)).sum().backward()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.cpu()
