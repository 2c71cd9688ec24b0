"""A policy that is loaded here answers, by the rollout engine of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape, max_positions
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.tools.evaluate import EvaluateConfig
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.conversion.hf.files import member, read_object
from prism_megatron.data.loader import Example
from prism_megatron.data.reading.intake import ImageError, TextError
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.run.session import Session
from prism_megatron.sampling.build import build_rollout
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.stages.evaluate.questions import Batch, Question
from prism_megatron.stages.evaluate.said import Said, until_it_goes_on
from prism_megatron.training.prompts import renderer_of
from prism_megatron.training.roles import resolve_dtype, weights_in_layout
from prism_megatron.types import Prompt, Response, Rollout, Segments

_NOT_ASKED_FOR = Response((), Segments(None, None, "an evaluation has no reference"))


@dataclass(frozen=True)
class Settings:
    """How many answers, and how they are drawn."""

    samples: int
    sampled: Sampling
    seed: int
    max_prompt_tokens: int
    strict_format: bool

    @property
    def greedy(self) -> Sampling:
        return Sampling(temperature=0.0, max_new_tokens=self.sampled.max_new_tokens)


def settings_of(config: EvaluateConfig) -> Settings:
    """Those of the flags."""
    drawn = Sampling(config.temperature, config.top_p, config.max_response_tokens)
    return Settings(config.samples, drawn, config.seed, config.max_prompt_tokens, config.strict_format)


def too_long(tokens: int, limit: int) -> str:
    """The failure of a question that takes so many tokens."""
    return f"the question takes {tokens} tokens, of which --max-prompt-tokens allows {limit}"


def prompt_of(question: Question, renderer: Renderer) -> Prompt:
    """The rendered question. Raises ImageError or TextError, naming its line."""
    where = question.item.id if question.record is None else question.record.where
    try:
        return renderer.prompt(question.item.id, question.text, [question.image()])
    except (ImageError, TextError) as error:
        raise type(error)(f"{where}: {error}") from error


@dataclass(frozen=True)
class PolicyAsker:
    """An ``Asker``. Draws are keyed by set, batch and place: a question that is asked again is answered alike."""

    rollout: RolloutEngine
    renderer: Renderer
    settings: Settings
    world: World

    def ask(self, batch: Batch) -> list[list[Said]]:
        """Raises DataError for a question that cannot be rendered, and as ``sample_groups``."""
        settings = self.settings
        prompts = [prompt_of(question, self.renderer) for question in batch.questions]
        short = [place for place, one in enumerate(prompts) if len(one.token_ids) <= settings.max_prompt_tokens]
        examples = [
            Example(prompts[place], _NOT_ASKED_FOR, batch.questions[place].scene, batch.questions[place].record)
            for place in short
        ]
        said = [
            [Said(failure=too_long(len(one.token_ids), settings.max_prompt_tokens))] * (1 + settings.samples)
            for one in prompts
        ]
        if not examples:
            return said
        greedy = self._drawn(batch, examples, "greedy", settings.greedy, 1)
        sampled = self._drawn(batch, examples, "sampled", settings.sampled, settings.samples)
        for place, *answers in zip(short, greedy, sampled, strict=True):
            said[place] = [self._said(rollout) for own in answers for rollout in own]
        return said

    def close(self) -> None:
        """Release the policy's memory."""
        self.rollout.close()

    def _drawn(
        self, batch: Batch, examples: Sequence[Example], mode: str, sampling: Sampling, count: int
    ) -> list[tuple[Rollout, ...]]:
        if not count:
            return [()] * len(examples)
        groups = sample_groups(
            self.rollout,
            examples,
            sampling,
            n=count,
            seed=self.settings.seed,
            step=batch.key(mode),
            world=self.world,
        )
        return [tuple(group.rollouts) for group in groups]

    def _said(self, rollout: Rollout) -> Said:
        tokens = rollout.token_ids
        ended = tokens[-1] == self.renderer.end_token_id
        text = self.renderer.decode(tokens[:-1] if ended else tokens)
        return Said(
            until_it_goes_on(text) if self.settings.strict_format else text,
            ended=ended,
            truncated=rollout.finish_reason == "length",
            tokens=len(tokens),
        )


def build_policy_asker(config: EvaluateConfig, policy: Path, session: Session) -> PolicyAsker:
    """With the weights of ``policy``, a folder; all ranks call it together.

    Raises ConfigError where questions and answers of the greatest length do not fit the model, and as
    ``build_rollout``.
    """
    world, files = session.world, files_folder(policy, "policy")
    shape = Qwen3VLShape.from_folder(files)
    check_room(config, files)
    dtype = resolve_dtype(config.dtype, shape)
    sizes = RolloutConfig(prompts_per_step=config.questions_at_once, rollouts_per_prompt=max(1, config.samples))
    renderer = renderer_of(files, config.as_trained)
    with session.phase("build", f"making the policy ready on {world.world_size} ranks"):
        rollout = build_rollout(
            sizes, config.as_trained, policy, shape, renderer, output=session.output, world=world, dtype=dtype
        )
        rollout.update_weights(weights_in_layout(policy, shape, rollout.expert_layout), version=0)
    session.watch(rollout)
    return PolicyAsker(rollout, renderer, settings_of(config), world)


def check_room(config: EvaluateConfig, files: Path) -> None:
    """Raise ConfigError where a question and an answer, each of its greatest length, exceed the model's positions."""
    path = member(files, "config.json")
    allowed = max_positions(read_object(path), str(path))
    wanted = config.max_prompt_tokens + config.max_response_tokens
    if allowed is not None and wanted > allowed:
        raise ConfigError(
            f"--max-prompt-tokens {config.max_prompt_tokens} and --max-response-tokens {config.max_response_tokens} "
            f"make {wanted} tokens, and the model allows {allowed}; lower one of them"
        )
