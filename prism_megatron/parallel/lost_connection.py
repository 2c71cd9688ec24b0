"""Which errors of collectives mean that another rank is gone, or the way to it."""

from __future__ import annotations

import torch.distributed as dist

_OF_BACKENDS = (
    "closed by peer",
    "reset by peer",
    "timed out",
    "broken pipe",
    "no route to host",
    "connection refused",
    "connectfullmesh failed",
    "remote process exited",
)
"""In lower case. gloo raises plain RuntimeErrors, and NCCL has one class for trouble here and there: their words tell.
The last is NCCL's, all others are gloo's, whose words come from the kernel where a connection broke."""


def lost_connection(error: BaseException) -> str | None:
    """What was said of the connection, in one line; None for an error of another kind.

    Blind to which of several ranks it was: a rank that waits for a second one, which waits for a third, cannot know.
    """
    said = str(error).partition("\n")[0]
    is_of_a_store = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
    is_of_a_backend = isinstance(error, RuntimeError) and any(words in said.lower() for words in _OF_BACKENDS)
    if not (is_of_a_store or is_of_a_backend):
        return None
    _, bracket, rest = said.partition("] ")  # gloo begins with the place in its source
    said = rest if bracket and said.startswith("[") else said
    return said.partition(". ")[0].rstrip(".")
