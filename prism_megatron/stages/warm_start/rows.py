"""What one step of a warm-start reports, as one flat row."""

from __future__ import annotations

from dataclasses import dataclass

from prism_megatron.data.render import Renderer
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.evaluation.health import Figures
from prism_megatron.evaluation.sample import Sample
from prism_megatron.game.figures import cost_row, game_row
from prism_megatron.game.judge import Judgement
from prism_megatron.game.samples import game_samples
from prism_megatron.game.unlearned import why_none_is_valid
from prism_megatron.stages.warm_start.pairs import StepPairs
from prism_megatron.training.figures import NOT_FINITE, ratio, update_row
from prism_megatron.types import Rollout


@dataclass(frozen=True)
class WarmStartStep:
    """Everything one step produced; observers read it and change nothing."""

    step: int
    pairs: StepPairs
    judgement: Judgement

    def samples(self, renderer: Renderer) -> list[Sample]:
        """What the report shows of it."""
        return game_samples(self.pairs.examples, self.pairs.groups, self.judgement, renderer)


def step_row(step: WarmStartStep, renderer: Renderer) -> Figures:
    """Figures of the whole step, equal on every rank; scores are those before its update."""
    groups, judgement = step.pairs.groups, step.judgement
    answers = [answer for group in groups for answer in group.rollouts]
    num_valid = sum(len(group.valid_rollouts) for group in groups)
    row: Figures = {
        "step": step.step,
        "rollouts": len(answers),
        "valid_rollouts": num_valid,
        "valid_share": ratio(num_valid, len(answers)),
        "truncated_rollouts": sum(isinstance(one, Rollout) and one.finish_reason == "length" for one in answers),
        "response_tokens": sum(len(answer.token_ids) for answer in answers),
    }
    row |= game_row(groups, judgement, step.pairs.rights(renderer))
    row |= cost_row(judgement.cost)
    return row | update_row("discriminator", judgement.result)


def why_idle(judgement: Judgement, pairs: StepPairs, renderer: Renderer) -> dict[str, str]:
    """Why the step's update did not change the discriminator; empty where it did."""
    if judgement.result is not None and judgement.result.updated:
        return {}
    return {"discriminator": why_none_is_valid(pairs.groups, renderer) or NOT_FINITE}


def what_it_is(discriminator: MegatronEngine) -> str:
    """What an export of it is: only one that was updated is warmed up."""
    return "warmed-up discriminator" if discriminator.was_updated else "discriminator as made (no update touched it)"
