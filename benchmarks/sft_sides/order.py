"""The order in which the stage trains on the records, for sides that do not plan."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from benchmarks.sft_sides.ours_side import BATCH, configuration
from prism_megatron.data.formats.detect import open_corpus
from prism_megatron.data.index.index import open_index
from prism_megatron.data.index.samples import IndexedCorpus, samples_of
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.data.stream.mixture import Mixture
from prism_megatron.data.stream.plan import Packing, Plan
from prism_megatron.observability.activity import Activity


def write_order(work: Path, model: str, *, steps: int) -> None:
    """``order.json``: ids of the records of so many steps; the index that our side opens too is made on the way."""
    config = configuration(work, model, dtype="fp32", steps=steps)
    data = config.data
    render = ConversationRenderer(Renderer.from_folder(work / model, system_prompt=None), label_turns=data.labels)
    corpus = open_corpus(data.data[0], config.format, purpose="train")
    assert data.index is not None
    index = open_index(corpus, render, data.index, validation_share=0.0, on_bad="fail", workers=0, counting=Activity())
    samples = samples_of([IndexedCorpus(corpus, index)], part="train", max_tokens=data.max_tokens)
    plan = Plan(
        samples, Mixture(samples, {}, seed=config.seed), packing=Packing(None, 1), seed=config.seed, epochs=data.epochs
    )
    order = [
        index.read(corpus, int(samples.row[pack[0]])).id
        for step in islice(plan.steps(BATCH), steps)
        for pack in step.packs
    ]
    (work / "order.json").write_text(json.dumps(order), encoding="utf-8")
