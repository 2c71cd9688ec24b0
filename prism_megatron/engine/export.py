"""Weights between a Hugging Face folder and the tensor-, pipeline- and expert-parallel shards of an engine.

``WeightTable`` ties the provider's mapping lists to the parameters that this rank holds; loading splits full tensors
into shards, exporting gathers shards into full tensors, bucket by bucket, with the same mapping read backwards: all of
them on every rank (``export``), or each on the one rank that sends it on (``share``).
Each expert layout has its list; the parameters that they name are the same (``conversion/expert_layout.py``).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.expert_relayout import FusedExperts
from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.conversion.ops import Column, PatchEmbed, Replicated
from prism_megatron.conversion.verify import check_names
from prism_megatron.errors import ConversionError
from prism_megatron.parallel.collectives import all_gather_objects

_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")


@dataclass(frozen=True)
class _Entry:
    """One parameter of one pipeline stage as a bucket carries it.

    ``names`` holds its name in the global model, or, for an expert's parameter, one per expert-parallel rank: they hold
    different experts in the same place, so one gather brings them all.
    """

    names: tuple[str, ...]
    local_name: str
    stage: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_expert(self) -> bool:
        return _EXPERT.search(self.local_name) is not None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def kind(self) -> Hashable:
        """What the entries of a bucket have in common."""
        return self.stage, self.is_expert, self.dtype


def canonical_name(name: str) -> str:
    """The name a parameter has where the experts of a rank are one MLP after another, whatever module holds them."""
    return _GROUPED_EXPERT.sub(r".experts.local_experts.\2.\1.weight", name)


class WeightTable:
    """The parameters of this rank beside the mapping that names them. Building one is collective."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        mappings: Callable[[ExpertLayout | None], Sequence[WeightMapping]],
        groups: ProcessGroupCollection,
        *,
        num_experts: int,
    ) -> None:
        """``chunks`` are the bare pipeline chunks of this rank; ``num_experts`` counts all experts of a layer, or is 0.

        ``mappings`` gives the list of an expert layout, or of the model's own for None: ``provider.weight_mappings``.
        A chunk whose parameter repeats another chunk's (a tied embedding) says so in ``tied_copies: {name: of}``.

        Raises ConversionError when a parameter has no mapping, or a mapping has no parameter on any stage.
        """
        self._groups = groups
        self._mappings_of = mappings
        self._parameters = {canonical_name(name): p for chunk in chunks for name, p in chunk.named_parameters()}
        self._num_local_experts = num_experts // groups.ep.size()
        own = mappings(None)
        by_parameter = {mapping.parameter: mapping for mapping in own}
        ep_rank = groups.ep.rank()
        unmapped = [name for name in self._parameters if self._global_name(name, ep_rank) not in by_parameter]
        tied = {name: of for chunk in chunks for name, of in getattr(chunk, "tied_copies", {}).items()}
        if strangers := sorted(set(unmapped) - tied.keys()):
            raise ConversionError(f"no weight mapping names {', '.join(strangers)}; add them to the model's mapping")
        self._global_names = {name: tied.get(name, self._global_name(name, ep_rank)) for name in self._parameters}
        self._entries, copies = self._plan(own, tied)
        self._sent = _balanced(self._entries, copies)

    def load(self, source: TensorSource, layout: ExpertLayout | None) -> None:
        """Copy this rank's shards out of ``source``, whose experts are stored in ``layout``.

        Fused experts are read slice by slice, each rank its own. Raises ConversionError when the source lacks a
        tensor, has one that nothing maps, or a shard does not fit.
        """
        mappings = self._mappings_of(layout)
        check_names(mappings, source)
        by_parameter = {mapping.parameter: mapping for mapping in mappings}
        for name, parameter in self._parameters.items():
            mapping = by_parameter[self._global_names[name]]
            group = self._shard_group(name)
            shard = mapping.op.split(mapping.read(source), group.size())[group.rank()]
            if shard.shape != parameter.shape:
                raise ConversionError(
                    f"{', '.join(mapping.hf_names)}: a shard of shape {tuple(shard.shape)} "
                    f"does not fit {name} of {tuple(parameter.shape)}"
                )
            with torch.no_grad():
                parameter.copy_(shard)

    def export(
        self,
        bucket_bytes: int,
        layout: ExpertLayout | None,
        *,
        of: Callable[[nn.Parameter], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        leave_out: Callable[[str], bool] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(hf_name, full tensor)`` for every tensor mapped in ``layout``, the same on every rank.

        ``of`` gives, in ``dtype``, what is exported of a parameter: itself by default, or its gradient. Parameters
        that ``leave_out`` is true of, by their names in a chunk, are not gathered.
        Collective: all ranks iterate together. A bucket of at most ``bucket_bytes`` of full tensors (or one parameter)
        is held at a time: one all-gather over TP, one over EP for experts, one broadcast over PP. Beside it, one tensor
        that fuses all experts of a layer is put together whole, whatever ``bucket_bytes``: it has a single name.
        """
        mappings = self._mappings_of(layout)
        by_parameter = {mapping.parameter: mapping for mapping in mappings}
        fused = FusedExperts(mappings)
        entries = [entry for entry in self._entries if leave_out is None or not leave_out(entry.local_name)]
        for bucket in self._buckets(entries, bucket_bytes, dtype):
            gathered = self._gather(bucket, of, dtype or bucket[0].dtype)
            offset = 0
            for entry in bucket:
                shards_E_T = gathered[:, :, offset : offset + entry.numel]
                offset += entry.numel
                for name, shards_T in zip(entry.names, shards_E_T, strict=True):
                    mapping = by_parameter[name]
                    merged = mapping.op.merge([shard.reshape(entry.shape) for shard in shards_T])
                    if mapping.expert is None:
                        for hf_name, tensor in zip(mapping.hf_names, merged, strict=True):
                            yield hf_name, _without_other_ranks(tensor, gathered)
                    else:
                        yield from fused.add(mapping, merged)

    def share(
        self, bucket_bytes: int, layout: ExpertLayout, *, leave_out: Callable[[str], bool]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(hf_name, full tensor)`` of what this rank sends: every tensor of the model on just one rank.

        A pipeline stage's are sent by its first tensor-parallel rank of the first data- and context-parallel one, and
        experts by each expert-parallel rank's first. They are gathered to that rank over TP and nowhere else: the
        other TP ranks iterate with it and get nothing, all further ranks take no part. Buckets as of ``export``.
        """
        by_parameter = {mapping.parameter: mapping for mapping in self._mappings_of(layout)}
        whole = {name for name, _ in self.replicated()}
        entries = [entry for entry in self._sent if self._takes_part(entry) and not leave_out(entry.local_name)]
        entries.sort(key=lambda entry: (entry.is_expert, entry.local_name not in whole, str(entry.dtype)))
        for bucket in self._buckets(entries, bucket_bytes, None, kind=lambda e: (e.kind, e.local_name in whole)):
            gathered = self._gather_to_sender(bucket, whole=bucket[0].local_name in whole)
            if gathered is None:
                continue
            offset = 0
            for entry in bucket:
                shards_T = gathered[:, offset : offset + entry.numel]
                offset += entry.numel
                mapping = by_parameter[entry.names[self._source(entry)]]
                merged = mapping.op.merge([shard.reshape(entry.shape) for shard in shards_T])
                yield from zip(mapping.hf_names, merged, strict=True)

    def shared_shapes(
        self, layout: ExpertLayout, leave_out: Callable[[str], bool]
    ) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
        """Names and shapes of what ``share`` yields on this rank, and the names of what it leaves out here.

        Raises ConversionError for a ``layout`` that fuses experts: their tensors are of all expert-parallel ranks.
        """
        if any(mapping.expert is not None for mapping in self._mappings_of(layout)):
            raise ConversionError(
                f"experts in the layout {layout!r} have no one rank that could send them; ask for per_expert"
            )
        mine = [e for e in self._sent if self._takes_part(e) and self._shard_group(e.local_name).rank() == 0]
        return self._announced([replace(e, names=(e.names[self._source(e)],)) for e in mine], layout, leave_out)

    def hf_shapes(
        self, layout: ExpertLayout | None, leave_out: Callable[[str], bool]
    ) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
        """Names and shapes of what ``export`` yields without gathering it, and the names of what it leaves out."""
        return self._announced(self._entries, layout, leave_out)

    def _announced(
        self, entries: Sequence[_Entry], layout: ExpertLayout | None, leave_out: Callable[[str], bool]
    ) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
        by_parameter = {mapping.parameter: mapping for mapping in self._mappings_of(layout)}
        shapes: dict[str, tuple[int, ...]] = {}
        left_out: set[str] = set()
        for entry in entries:
            for mapping in (by_parameter[name] for name in entry.names):
                assert mapping.hf_shapes is not None, mapping
                if leave_out(entry.local_name):
                    left_out.update(mapping.hf_names)
                else:
                    shapes.update(zip(mapping.hf_names, mapping.hf_shapes, strict=True))
        return shapes, frozenset(left_out)

    def _global_name(self, name: str, ep_rank: int) -> str:
        """Experts are numbered per rank in a chunk and globally in a mapping."""
        first = ep_rank * self._num_local_experts
        return _EXPERT.sub(lambda match: f".local_experts.{first + int(match[1])}.", name)

    def _shard_group(self, name: str) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self._groups.expt_tp if _EXPERT.search(name) else self._groups.tp
        return group

    def _plan(
        self, mappings: Sequence[WeightMapping], tied: Mapping[str, str]
    ) -> tuple[list[_Entry], dict[str, _Entry]]:
        """Every parameter of every stage, in the same order on every rank; beside it the ``tied`` copies of some."""
        mine = [(name, tuple(p.shape), p.dtype, tied.get(name)) for name, p in self._parameters.items()]
        ep_size = self._groups.ep.size()
        entries, copies = [], {}
        for stage, held in enumerate(all_gather_objects(mine, group=self._groups.pp)):
            for name, shape, dtype, original in held:
                if original is not None:
                    copies[original] = _Entry((original,), name, stage, shape, dtype)
                    continue
                holders = range(ep_size) if _EXPERT.search(name) else range(1)
                names = tuple(self._global_name(name, ep_rank) for ep_rank in holders)
                entries.append(_Entry(names, name, stage, shape, dtype))
        covered = {name for entry in entries for name in entry.names}
        if absent := sorted({mapping.parameter for mapping in mappings} - covered):
            raise ConversionError(f"the weight mapping names parameters that no stage holds: {absent}")
        # Slices of one fused tensor stand together in the mappings, so that one such tensor is open at a time.
        order = {mapping.parameter: place for place, mapping in enumerate(mappings)}
        entries.sort(
            key=lambda entry: (
                entry.stage,
                entry.is_expert,
                str(entry.dtype),
                order[entry.names[0]] if entry.is_expert else -1,
            ),
        )
        return entries, copies

    def _takes_part(self, entry: _Entry) -> bool:
        """Whether this rank sends the parameter, or its shard to the rank that does."""
        copies = self._groups.expt_dp if entry.is_expert else self._groups.dp_cp
        return bool(self._groups.pp.rank() == entry.stage and copies.rank() == 0)

    def _source(self, entry: _Entry) -> int:
        """Place of this rank's own name among those of an entry."""
        return int(self._groups.ep.rank()) if entry.is_expert else 0

    def _buckets(
        self,
        entries: Sequence[_Entry],
        bucket_bytes: int,
        dtype: torch.dtype | None,
        *,
        kind: Callable[[_Entry], Hashable] = lambda entry: entry.kind,
    ) -> Iterator[list[_Entry]]:
        bucket: list[_Entry] = []
        size = 0
        for entry in entries:
            ranks = len(entry.names) * self._shard_group(entry.local_name).size()
            entry_size = entry.numel * (dtype or entry.dtype).itemsize * ranks
            if bucket and (kind(entry) != kind(bucket[0]) or size + entry_size > bucket_bytes):
                yield bucket
                bucket, size = [], 0
            bucket.append(entry)
            size += entry_size
        if bucket:
            yield bucket

    def vocabularies(self) -> dict[str, int]:
        """Parameters of the whole model with a row for each word, and how many words; rows after those are padding."""
        ops = {mapping.parameter: mapping.op for mapping in self._mappings_of(None)}
        return {name: op.rows for name, op in ops.items() if isinstance(op, Column) and op.multiple > 1}

    def replicated(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters of this rank that every tensor-parallel rank holds whole, by their names in the chunk."""
        ops = {mapping.parameter: mapping.op for mapping in self._mappings_of(None)}
        return [
            (name, parameter)
            for name, parameter in self._parameters.items()
            if isinstance(ops[self._global_names[name]], Replicated | PatchEmbed)
        ]

    def _gather(
        self, bucket: Sequence[_Entry], of: Callable[[nn.Parameter], Tensor] | None, dtype: torch.dtype
    ) -> Tensor:
        """All shards of a bucket, ``[expert-parallel ranks, tensor-parallel ranks, elements]``, on every rank."""
        first = bucket[0]
        tp_group = self._shard_group(first.local_name)
        num_expert_ranks = len(first.names)
        numel = sum(entry.numel for entry in bucket)
        device = next(iter(self._parameters.values())).device
        shape = num_expert_ranks, tp_group.size(), numel
        if self._groups.pp.rank() == first.stage:
            held = [self._parameters[entry.local_name] for entry in bucket]
            shards = torch.cat([(one if of is None else of(one)).detach().flatten() for one in held])
            for group in (tp_group, self._groups.ep) if first.is_expert else (tp_group,):
                if group.size() > 1:
                    of_group = torch.empty(group.size() * shards.numel(), dtype=dtype, device=device)
                    dist.all_gather_into_tensor(of_group, shards, group=group)
                    shards = of_group
            shards = shards.view(shape)
        else:
            shards = torch.empty(shape, dtype=dtype, device=device)
        if self._groups.pp.size() > 1:
            dist.broadcast(shards, group=self._groups.pp, group_src=first.stage)
        return shards

    def _gather_to_sender(self, bucket: Sequence[_Entry], *, whole: bool) -> Tensor | None:
        """All shards of a bucket, ``[tensor-parallel ranks, elements]``, on the first of these ranks alone.

        Parameters that every rank has ``whole`` are not gathered: ``[1, elements]``.
        """
        group = self._shard_group(bucket[0].local_name)
        if whole and group.rank() != 0:
            return None
        shards = torch.cat([self._parameters[entry.local_name].detach().flatten() for entry in bucket])
        if whole or group.size() == 1:
            return shards[None]
        gathered = shards.new_empty((group.size(), shards.numel())) if group.rank() == 0 else None
        dist.gather(shards, None if gathered is None else list(gathered), group=group, group_dst=0)
        return gathered


def _balanced(entries: Sequence[_Entry], copies: Mapping[str, _Entry]) -> list[_Entry]:
    """The same parameters, a tied one on that of its two stages which holds less of everything else."""
    held = Counter[int]()
    for entry in entries:
        if entry.names[0] not in copies:
            held[entry.stage] += entry.numel * entry.dtype.itemsize
    chosen = []
    for entry in entries:
        copy = copies.get(entry.names[0], entry)
        sender = copy if held[copy.stage] < held[entry.stage] else entry
        if copy is not entry:
            held[sender.stage] += entry.numel * entry.dtype.itemsize
        chosen.append(sender)
    return chosen


def _without_other_ranks(tensor: Tensor, gathered: Tensor) -> Tensor:
    """A tensor that was merged out of ``gathered``, not keeping the copies alive that other ranks had of it.

    With one rank it may be a view: the buckets have no other owner and are not used again.
    """
    shared = tensor.untyped_storage().data_ptr() == gathered.untyped_storage().data_ptr()
    return tensor.clone() if shared and gathered.shape[1] > 1 else tensor


def digest_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named tensors in whatever order they come: of names, dtypes, shapes and bits."""
    digests = {}
    for name, tensor in weights:
        content = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{name} {content.dtype} {tuple(content.shape)}".encode())
        digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
        digests[name] = digest.digest()
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()
