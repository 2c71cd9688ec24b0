"""Keys of a ``config.json`` that transformers acts on and our model does not: what they may say.

What a Qwen3-VL is made of is read in ``qwen3_vl.py``; these change what transformers computes, reads from the folder or
returns, so that with any other value its model would be another one than ours, or none. A test walks transformers'
config classes and finds every key that it reads either there, here, or in a list of those that change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prism_megatron.config.json_section import Section
from prism_megatron.errors import ConfigError

Allowed = Mapping[str, Sequence[Any]]

ANYWHERE: Allowed = {
    # another architecture, or another answer of its ``forward``
    "is_encoder_decoder": (False,),
    "return_dict": (True,),
    "output_attentions": (False, None),
    "per_layer_config": (None,),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    # other files than those of the folder, or tensors under other names
    "configuration_files": (),
    "transformers_weights": (None,),
    "extra_files": ([], None),
    "fusion_config": (None,),
    "distributed_config": (None,),
    # what the file's keys mean
    "attribute_map": (),
    "_rope_type_labels": (None,),
    "_heterogeneity_spec": (None,),
}
"""Refused in each of the three objects unless absent, or one of these."""
TOP: Allowed = {"decoder": (None,), "generator": (None,), "text_encoder": (None,)}
"""Refused beside ``text_config``: transformers would not know which of them is meant."""
TEXT: Allowed = {"attention_dropout": (0.0, None), "is_causal": (True,), "quantization_config": (None,)}
VISION: Allowed = {"is_causal": (), "quantization_config": (None,)}


def check_unread(section: Section, allowed: Allowed) -> None:
    """Raise ConfigError for a key of ``section`` that says something else than ``allowed``."""
    for name, values in allowed.items():
        if name not in section.values:
            continue
        value = section.values[name]
        if value not in values:
            raise ConfigError(
                f"{section.where}: {name} is {value!r}, which transformers acts on and this model does not; remove it"
                + (f", or set it to {json.dumps(values[0])}" if values else "")
            )


def check_copies(top: Section, *sections: Section) -> None:
    """Raise ConfigError for a key of ``sections`` that the top level repeats with another value.

    transformers takes that of the section, and so do we; whoever wrote the other one meant another model.
    """
    for name in sorted(set().union(*(section.read for section in sections)) - top.read):
        value = top.values.get(name)
        if value is not None and all(value != section.values.get(name) for section in sections):
            raise ConfigError(
                f"{top.where}: {name} is {value!r} at the top level, which transformers does not read there and no "
                "section says; write it into the section that it belongs to, or remove it"
            )
