"""``prism-data check PATH``: is every record of a set one that can be learned?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from prism_megatron.config.formats import FormatConfig
from prism_megatron.config.tools.data_tool import CheckSetConfig
from prism_megatron.data.conversation import Conversation
from prism_megatron.data.formats.columns import found_names
from prism_megatron.data.formats.detect import open_corpus, refuse_evaluation_set
from prism_megatron.data.formats.files.base import Corpus
from prism_megatron.data.formats.files.walk import walk
from prism_megatron.data.formats.pictures import decoded, size_of
from prism_megatron.data.formats.repeats import Repeats
from prism_megatron.data.formats.rows import RowCorpus
from prism_megatron.data.records import EVALUATION_ONLY_SOURCES, in_part
from prism_megatron.data.segments import TAGS, THINK_ALIAS, parse_response
from prism_megatron.errors import ConfigError, DataError

_FIELD = re.compile(r"field [\w.]+")
_MOST_SHOWN = 5


def open_set(path: str, reading: FormatConfig) -> Corpus:
    """The set to look at; one that is for evaluation only may be looked at. Raises PrismError."""
    if not path:
        raise ConfigError("which set? Name a file or a folder of records")
    return open_corpus(Path(path), reading, purpose="evaluate")


def check_set(config: CheckSetConfig, *, say: Callable[[str], None]) -> int:
    """Say every bad record, then the counts; returns the number of bad ones. Raises PrismError for no set at all."""
    corpus = open_set(config.path, config.reading)
    good, reasons, shares = 0, Counter[str](), _Shares(config.validation_share)
    repeats = Repeats()

    def bad(where: str, reason: str) -> None:
        reasons[_kind(reason)] += 1
        say(f"bad {reason}" if where in reason else f"bad {where}: {reason}")

    for where, found in walk(corpus):
        if isinstance(found, DataError):
            bad(where, str(found))
            continue
        try:
            _check(found, config, where)
        except DataError as error:
            bad(where, str(error))
            continue
        good += 1
        shares.add(found)
        repeats.add(found, where)
    for where, before in repeats.ids():
        good -= 1
        bad(where, f"field id: was used before, in {before}")
    _say_counts(config, corpus, good=good, reasons=reasons, shares=shares, repeats=repeats, say=say)
    return reasons.total()


def _check(conversation: Conversation, config: CheckSetConfig, where: str) -> None:
    for picture in conversation.pictures:
        size_of(picture, where=where)
        if config.decode:
            decoded(picture, where=where)
    if config.require_tags:
        kind = tag_kind(conversation)
        if kind != "tagged":
            raise DataError(f"{where}: field response: {kind}, and --require-tags wants the three tags")


def tag_kind(conversation: Conversation) -> str:
    """``tagged``, ``plain``, or ``broken`` with what is wrong, of the last response."""
    text = "".join(part for part in conversation.turns[-1].parts if isinstance(part, str))
    parsed = parse_response(text.encode(errors="surrogatepass"))
    if not isinstance(parsed, str):
        return "tagged"
    has_tags = any(f"<{slash}{tag}>" in text for tag in (*TAGS, THINK_ALIAS) for slash in ("", "/"))
    return f"broken: {parsed}" if has_tags else "plain"


class _Shares:
    """What the good records are, counted as they come."""

    def __init__(self, validation_share: float) -> None:
        self._validation_share = validation_share
        self.sources: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.images: Counter[int] = Counter()
        self.turns: Counter[int] = Counter()
        self.held_out = self.for_evaluation = 0

    def add(self, conversation: Conversation) -> None:
        self.sources[conversation.source] += 1
        self.tags[tag_kind(conversation)] += 1
        self.images[len(conversation.pictures)] += 1
        self.turns[sum(turn.role == "assistant" for turn in conversation.turns)] += 1
        self.held_out += in_part(conversation, "validation", validation_share=self._validation_share)
        self.for_evaluation += conversation.source.startswith(EVALUATION_ONLY_SOURCES)


def _say_counts(
    config: CheckSetConfig,
    corpus: Corpus,
    *,
    good: int,
    reasons: Counter[str],
    shares: _Shares,
    repeats: Repeats,
    say: Callable[[str], None],
) -> None:
    shards = corpus.shards()
    say(f"{config.path}: {corpus.name}, {len(shards)} file{'' if len(shards) == 1 else 's'}")
    if isinstance(corpus, RowCorpus) and corpus.name == "columns":
        say(f"read from    {_names(corpus)}")
    bad = reasons.total()
    say(f"records      {good + bad:,}: {good:,} good, {bad:,} bad" + (f" ({_listed(reasons)})" if bad else ""))
    say(f"sources      {_listed(shares.sources)}")
    say(f"parts        {good - shares.held_out:,} to train on, {shares.held_out:,} held out")
    say(f"responses    {_listed(shares.tags)}")
    say(f"images       {_listed(shares.images, ' with {}')}")
    say(f"answers      {_listed(shares.turns, ' with {}')}")
    same = list(repeats.contents())
    shown = "; ".join(f"{here} is {before}" for here, before in same[:_MOST_SHOWN])
    say(f"same content {len(same):,}" + (f" ({shown}{'; …' if len(same) > _MOST_SHOWN else ''})" if same else ""))
    if shares.for_evaluation or _is_for_evaluation(Path(config.path)):
        say("for evaluation only: training refuses this set")


def _names(corpus: RowCorpus) -> str:
    """``question=problem answer=answer``, as the first row that is one has them."""
    for shard in corpus.shards():
        for place in corpus.scan(shard):
            try:
                names = found_names(corpus.row(shard, place), reading=corpus.reading)
            except DataError:
                continue  # was named before
            return " ".join(f"{field}={name}" for field, name in names.items())
    return "nothing"


def _is_for_evaluation(path: Path) -> bool:
    try:
        refuse_evaluation_set(path)
    except DataError:
        return True
    return False


def _kind(reason: str) -> str:
    """``field answer`` of a long message, for the counts."""
    found = _FIELD.search(reason)
    return found[0] if found else "unreadable"


def _listed(counts: Counter[str] | Counter[int], form: str = " {}") -> str:
    """``12 tagged, 3 plain``: the most frequent first, a few of them."""
    most = [f"{count:,}{form.format(name)}" for name, count in counts.most_common(8)]
    return ", ".join(most + [f"{len(counts) - 8} more kinds"] * (len(counts) > 8)) or "none"
