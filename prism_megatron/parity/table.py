"""The parity tables as text, one line a cell."""

from __future__ import annotations

from prism_megatron.parity.matrix import RECOMPUTE_TOLERANCE, Cell, RecomputeCell

WHERE = f"{'model':13} {'layout':16} {'packing':7} {'samples':21}"
ERROR = f"{'gradient':>8} {'limit':>8}  worst parameter"
HEADER = f"{WHERE} {'ours':4} {'logits':>8} {'limit':>8}  {ERROR}"
RECOMPUTE_HEADER = f"{WHERE} {'recompute':12} {ERROR}"


def cell_line(cell: Cell) -> str:
    """Errors beside their limits; a cell without figures says why."""
    where = f"{cell.model:13} {cell.layout:16} {cell.packing:7} {cell.samples:21} {cell.dtype}"
    if cell.difference is None or cell.tolerance is None:
        return f"{where} – {cell.reason}"
    name, error = cell.difference.worst
    copies = "" if cell.spread == 0 else f"   COPIES DIFFER {cell.spread:.1e}"
    return (
        f"{where} {cell.difference.logits_max_abs:8.1e} {cell.tolerance.logits:8.1e}  "
        f"{error:8.1e} {cell.tolerance.gradients:8.1e}  {name}{copies}{_verdict(cell.ok)}"
    )


def recompute_line(cell: RecomputeCell) -> str:
    """The worst gradient against that without recompute."""
    name, error = cell.worst
    return (
        f"{cell.model:13} {cell.layout:16} {cell.packing:7} {cell.samples:21} {cell.recompute:12} "
        f"{error:8.1e} {RECOMPUTE_TOLERANCE:8.1e}  {name}{_verdict(cell.ok)}"
    )


def _verdict(ok: bool) -> str:
    return "" if ok else "   TOO FAR"
