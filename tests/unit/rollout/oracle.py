"""transformers' own forward, as the oracle of rollout engines."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism_megatron.types import Prompt, Rollout
from tests.unit.rollout.tiny_qwen import IMAGE


def model_inputs(prompt: Prompt, response: tuple[int, ...] = (), *, image_token_id: int = IMAGE) -> dict[str, Tensor]:
    """What transformers' model takes for a prompt and a response to it."""
    ids = torch.tensor([[*prompt.token_ids, *response]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([i.pixel_values_P_D for i in prompt.images]))
        inputs["image_grid_thw"] = torch.tensor([i.grid_thw for i in prompt.images])
        inputs["mm_token_type_ids"] = (ids == image_token_id).int()
    return inputs


@torch.no_grad()
def forced_logprobs(model: Any, prompt: Prompt, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probs of the response in one transformers forward over prompt and response."""
    model.model.rope_deltas = None
    inputs = model_inputs(prompt, rollout.token_ids, image_token_id=model.config.image_token_id)
    logits = model(**inputs).logits[0].double() / temperature
    start = len(prompt.token_ids)
    predicted = logits[start - 1 : -1].log_softmax(-1)
    chosen: Tensor = predicted.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
    return chosen
