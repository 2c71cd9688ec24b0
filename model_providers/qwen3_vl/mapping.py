"""Every weight of a Qwen3-VL by its Hugging Face name and its name here."""

from __future__ import annotations

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.experts import ExpertSizes
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.conversion.ops import (
    Column,
    FusedGateUp,
    GateUp,
    GroupedQKV,
    Op,
    PatchEmbed,
    Replicated,
    Row,
    Transposed,
    VisionQKV,
    vocabulary,
)

TEXT = "model.language_model"
VISUAL = "model.visual"
LM_HEAD = "lm_head.weight"
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


def weight_mappings(shape: Qwen3VLShape, layout: ExpertLayout = "transformers") -> list[WeightMapping]:
    """All weights of a policy. A tied model has no ``lm_head.weight``, though a folder may repeat it.

    ``layout`` says how experts are stored (``conversion.expert_layout``); a dense model has the same list in all. The
    parameters of the list are the same in all layouts, and so is what ``op.split`` makes for each.
    """
    mappings = [*vision_mappings(shape), *embedding_mappings(shape)]
    experts, hidden = shape.text.experts, shape.text.hidden
    for layer in range(shape.text.num_layers):
        mappings += attention_mappings(shape, layer)
        if experts is None:
            mappings += dense_mlp_mappings(shape, layer)
        else:
            mappings += [router_mapping(hidden, experts.count, layer), *expert_mappings(hidden, experts, layer, layout)]
    if not shape.text.tied:
        text = shape.text
        mappings.append(
            WeightMapping((LM_HEAD,), OUTPUT, vocabulary(text.vocab), hf_shapes=((text.vocab, text.hidden),))
        )
    return mappings


def embedding_mappings(shape: Qwen3VLShape) -> list[WeightMapping]:
    """The token embedding and the final norm."""
    text = shape.text
    return [
        WeightMapping(
            (f"{TEXT}.embed_tokens.weight",),
            EMBEDDING,
            vocabulary(text.vocab),
            optional_alias=LM_HEAD if text.tied else None,
            hf_shapes=((text.vocab, text.hidden),),
        ),
        _copy(f"{TEXT}.norm.weight", "decoder.final_layernorm.weight", (text.hidden,)),
    ]


def attention_mappings(shape: Qwen3VLShape, layer: int) -> list[WeightMapping]:
    """Attention and both norms of one decoder layer."""
    text = shape.text
    hf, ours = f"{TEXT}.layers.{layer}", f"decoder.layers.{layer}"
    query, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    return [
        _copy(f"{hf}.input_layernorm.weight", f"{ours}.input_layernorm.weight", (text.hidden,)),
        WeightMapping(
            tuple(f"{hf}.self_attn.{part}_proj.weight" for part in "qkv"),
            f"{ours}.self_attention.linear_qkv.weight",
            GroupedQKV(kv_heads=text.kv_heads, head_dim=text.head_dim),
            hf_shapes=((query, text.hidden), (keys, text.hidden), (keys, text.hidden)),
        ),
        *(
            _copy(
                f"{hf}.self_attn.{part}_norm.weight", f"{ours}.self_attention.{part}_layernorm.weight", (text.head_dim,)
            )
            for part in "qk"
        ),
        WeightMapping(
            (f"{hf}.self_attn.o_proj.weight",),
            f"{ours}.self_attention.linear_proj.weight",
            Row(),
            hf_shapes=((text.hidden, query),),
        ),
        _copy(f"{hf}.post_attention_layernorm.weight", f"{ours}.pre_mlp_layernorm.weight", (text.hidden,)),
    ]


def dense_mlp_mappings(shape: Qwen3VLShape, layer: int) -> list[WeightMapping]:
    """The gated MLP of one decoder layer."""
    text = shape.text
    hf, ours = f"{TEXT}.layers.{layer}.mlp", f"decoder.layers.{layer}.mlp"
    return [
        WeightMapping(
            (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            f"{ours}.linear_fc1.weight",
            GateUp(),
            hf_shapes=((text.ffn, text.hidden), (text.ffn, text.hidden)),
        ),
        WeightMapping(
            (f"{hf}.down_proj.weight",), f"{ours}.linear_fc2.weight", Row(), hf_shapes=((text.hidden, text.ffn),)
        ),
    ]


def router_mapping(hidden: int, num_experts: int, layer: int) -> WeightMapping:
    """The gate of one expert layer."""
    name = f"layers.{layer}.mlp"
    return _copy(f"{TEXT}.{name}.gate.weight", f"decoder.{name}.router.weight", (num_experts, hidden))


def expert_mappings(hidden: int, experts: ExpertSizes, layer: int, layout: ExpertLayout) -> list[WeightMapping]:
    """The experts of one decoder layer: per expert its gate and up projections, then its down projection."""
    if layout == "per_expert":
        return _single_mappings(hidden, experts, layer)
    fused: tuple[tuple[str, str, Op, tuple[int, int]], ...] = (
        ("gate_up_proj", "linear_fc1", FusedGateUp(), (2 * experts.width, hidden)),
        ("down_proj", "linear_fc2", Row(), (hidden, experts.width)),
    )
    return [
        WeightMapping(
            (f"{TEXT}.layers.{layer}.mlp.experts.{theirs}",),
            _expert_parameter(layer, expert, linear),
            Transposed(op) if layout == "hub" else op,
            hf_shapes=((experts.count, *(reversed(matrix) if layout == "hub" else matrix)),),
            expert=expert,
        )
        for theirs, linear, op, matrix in fused
        for expert in range(experts.count)
    ]


def _single_mappings(hidden: int, experts: ExpertSizes, layer: int) -> list[WeightMapping]:
    mappings = []
    for expert in range(experts.count):
        mappings += [
            WeightMapping(
                (expert_name(layer, expert, "gate"), expert_name(layer, expert, "up")),
                _expert_parameter(layer, expert, "linear_fc1"),
                GateUp(),
                hf_shapes=((experts.width, hidden), (experts.width, hidden)),
            ),
            WeightMapping(
                (expert_name(layer, expert, "down"),),
                _expert_parameter(layer, expert, "linear_fc2"),
                Row(),
                hf_shapes=((hidden, experts.width),),
            ),
        ]
    return mappings


def expert_name(layer: int, expert: int, part: str) -> str:
    """Name of one expert's projection where each has a tensor of its own; ``part`` is gate, up or down."""
    return f"{TEXT}.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def _expert_parameter(layer: int, expert: int, linear: str) -> str:
    return f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.{linear}.weight"


def vision_mappings(shape: Qwen3VLShape) -> list[WeightMapping]:
    """The vision tower with its mergers."""
    vision = shape.vision
    kernel = (vision.channels, vision.temporal_patch, vision.patch, vision.patch)
    mappings = [
        WeightMapping(
            (f"{VISUAL}.patch_embed.proj.weight",),
            "vision_model.patch_embed.weight",
            PatchEmbed(kernel),
            hf_shapes=((vision.hidden, *kernel),),
        ),
        _copy(f"{VISUAL}.patch_embed.proj.bias", "vision_model.patch_embed.bias", (vision.hidden,)),
        _copy(
            f"{VISUAL}.pos_embed.weight",
            "vision_model.pos_embed.weight",
            (vision.num_position_embeddings, vision.hidden),
        ),
    ]
    for block in range(vision.depth):
        mappings += _vision_block_mappings(shape, block)
    joined = vision.hidden * vision.merge**2
    mergers = {"merger": vision.hidden} | {f"deepstack_merger_list.{k}": joined for k in range(len(vision.taps))}
    for name, norm_size in mergers.items():
        hf, ours = f"{VISUAL}.{name}", f"vision_model.{name.replace('_merger_list', '_mergers')}"
        mappings += [
            *(_copy(f"{hf}.norm.{kind}", f"{ours}.patch_norm.{kind}", (norm_size,)) for kind in ("weight", "bias")),
            *_vision_mlp(hf, ours, (joined, joined, vision.out_hidden)),
        ]
    return mappings


def _vision_block_mappings(shape: Qwen3VLShape, block: int) -> list[WeightMapping]:
    vision = shape.vision
    hf, ours = f"{VISUAL}.blocks.{block}", f"vision_model.blocks.{block}"
    hidden = vision.hidden
    norms = {"norm1": "input_layernorm", "norm2": "pre_mlp_layernorm"}
    qkv, proj = "self_attention.linear_qkv", "self_attention.linear_proj"
    return [
        *(
            _copy(f"{hf}.{theirs}.{kind}", f"{ours}.{name}.{kind}", (hidden,))
            for theirs, name in norms.items()
            for kind in ("weight", "bias")
        ),
        WeightMapping(
            (f"{hf}.attn.qkv.weight",),
            f"{ours}.{qkv}.weight",
            VisionQKV(heads=vision.heads),
            hf_shapes=((3 * hidden, hidden),),
        ),
        WeightMapping(
            (f"{hf}.attn.qkv.bias",), f"{ours}.{qkv}.bias", VisionQKV(heads=vision.heads), hf_shapes=((3 * hidden,),)
        ),
        WeightMapping((f"{hf}.attn.proj.weight",), f"{ours}.{proj}.weight", Row(), hf_shapes=((hidden, hidden),)),
        _copy(f"{hf}.attn.proj.bias", f"{ours}.{proj}.bias", (hidden,)),
        *_vision_mlp(f"{hf}.mlp", f"{ours}.mlp", (hidden, vision.ffn, hidden)),
    ]


def _vision_mlp(hf: str, ours: str, sizes: tuple[int, int, int]) -> list[WeightMapping]:
    """Two linears with bias; the bias of a row-parallel linear is whole on every rank."""
    first, inner, last = sizes
    return [
        WeightMapping(
            (f"{hf}.linear_fc1.weight",), f"{ours}.linear_fc1.weight", Column(inner), hf_shapes=((inner, first),)
        ),
        WeightMapping((f"{hf}.linear_fc1.bias",), f"{ours}.linear_fc1.bias", Column(inner), hf_shapes=((inner,),)),
        WeightMapping((f"{hf}.linear_fc2.weight",), f"{ours}.linear_fc2.weight", Row(), hf_shapes=((last, inner),)),
        _copy(f"{hf}.linear_fc2.bias", f"{ours}.linear_fc2.bias", (last,)),
    ]


def _copy(hf_name: str, parameter: str, shape: tuple[int, ...]) -> WeightMapping:
    return WeightMapping((hf_name,), parameter, Replicated(), hf_shapes=(shape,))
