"""``prism-data stats PATH --model FOLDER``: tokens, image sizes and sources of a set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from prism_megatron.config.tools.data_tool import SetStatsConfig
from prism_megatron.conversion.checkpoints.model_names import folder_of
from prism_megatron.data.conversation import Conversation
from prism_megatron.data.formats.files.walk import walk
from prism_megatron.data.formats.pictures import size_of
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer, Lengths
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.jobs.check_set import open_set, tag_kind

_BAR = 40


class _Figures:
    """Counts of lengths: as many numbers as there are different ones, however many records there are."""

    def __init__(self) -> None:
        self.rows: dict[str, Counter[int]] = {
            name: Counter() for name in ("tokens", "text tokens", "visual tokens", "label tokens")
        }
        self.areas: Counter[int] = Counter()
        self.sources: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def add(self, conversation: Conversation, lengths: Lengths, sizes: list[tuple[int, int]]) -> None:
        total = lengths.text_tokens + lengths.visual_tokens
        for name, length in zip(
            self.rows, (total, lengths.text_tokens, lengths.visual_tokens, lengths.label_tokens), strict=True
        ):
            self.rows[name][length] += 1
        self.areas.update(_rounded(width * height) for width, height in sizes)
        self.sources[conversation.source] += 1
        self.tokens[conversation.source] += total
        self.tags[tag_kind(conversation).partition(":")[0]] += 1


def set_stats(config: SetStatsConfig, *, say: Callable[[str], None]) -> int:
    """Say the figures; returns the number of bad records. Raises PrismError for no set or no model at all."""
    corpus = open_set(config.path, config.reading)
    measure = _renderer(config).measure
    figures, bad = _Figures(), 0
    for where, found in walk(corpus):
        if isinstance(found, DataError):
            bad += 1
            continue
        try:
            sizes = [size_of(picture, where=where) for picture in found.pictures]
            figures.add(found, measure(found), sizes)
        except DataError:
            bad += 1
    good = figures.sources.total()
    say(f"{config.path}: {corpus.name}, {good:,} records" + (f", {bad:,} bad ones (see check)" if bad else ""))
    say("")
    for source, count in figures.sources.most_common():
        tokens = figures.tokens[source]
        say(f"{count:>12,} records {tokens:>16,} tokens  {source}")
    say("")
    say("responses: " + (", ".join(f"{count:,} {kind}" for kind, count in figures.tags.most_common()) or "none"))
    for name, lengths in figures.rows.items():
        for line in histogram(name, lengths):
            say(line)
    for line in histogram("pixels of an image", figures.areas):
        say(line)
    return bad


def histogram(name: str, values: Counter[int]) -> list[str]:
    """A heading with quantiles, then a line for every power of two that has values."""
    total = values.total()
    if not total:
        return ["", f"{name}: none"]
    mean = sum(value * count for value, count in values.items()) / total
    quantiles = ", ".join(f"{label} {quantile(values, share):,}" for label, share in _QUANTILES)
    bins: Counter[int] = Counter()
    for value, count in values.items():
        bins[value.bit_length()] += count
    lines = ["", f"{name}: mean {mean:,.1f}, {quantiles}"]
    most = max(bins.values())
    for bits in range(min(bins), max(bins) + 1):
        low, high = (1 << bits - 1, (1 << bits) - 1) if bits else (0, 0)
        bar = "#" * -(-bins[bits] * _BAR // most)
        lines.append(f"{low:>13,} – {high:<13,} {bins[bits]:>12,} {bar}".rstrip())
    return lines


_QUANTILES = (("least", 0.0), ("median", 0.5), ("95 %", 0.95), ("99 %", 0.99), ("most", 1.0))


def _rounded(area: int) -> int:
    """To three digits, so that photographs of a million sizes come to some thousand counts."""
    return round(area, 3 - len(str(area)))


def quantile(values: Counter[int], share: float) -> int:
    """The least value that at least this share of the values is not above."""
    wanted, seen = share * values.total(), 0
    for value in sorted(values):
        seen += values[value]
        if seen >= wanted:
            break
    return value


def _renderer(config: SetStatsConfig) -> ConversationRenderer:
    if config.model is None:
        raise ConfigError("--model is missing: tokens are counted by a model's tokenizer and image settings")
    folder = folder_of(config.model, flag="--model", fetch=True)
    renderer = Renderer.from_folder(
        folder, system_prompt=config.system_prompt, min_pixels=config.min_pixels, max_pixels=config.max_pixels
    )
    return ConversationRenderer(renderer, label_turns="last")
