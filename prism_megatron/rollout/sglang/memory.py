"""GPU memory that colocated servers release while the trainer needs it.

The calls of SGLang 0.5.23 behind ``--enable-memory-saver``. Releasing gives the memory back and keeps nothing of it, so
a server that has it again needs every weight anew. A server must be idle and stay so in between: it is paused before
it releases, and goes on only with the update that follows its waking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prism_megatron.rollout.sglang.http import ServerClient, ServerLostError

_REGIONS = ("kv_cache", "weights")
_SECONDS = 300.0

Replace = Callable[[str], bool]


def release(clients: Sequence[ServerClient], *, replace: Replace) -> None:
    """Pause all servers, then have them release the memory of weights, keys and values.

    A lost server that ``replace`` starts anew is passed over. Raises RolloutError for any other failure.
    """
    for client in clients:
        _post(client, "/pause_generation", {"mode": "retract"}, replace)
    for client in clients:
        _post(client, "/release_memory_occupation", {"tags": list(_REGIONS)}, replace)


def resume(clients: Sequence[ServerClient], *, replace: Replace) -> None:
    """Take the memory back; it holds no weights, and the servers stay paused. As ``release`` otherwise."""
    for client in clients:
        _post(client, "/resume_memory_occupation", {"tags": list(_REGIONS)}, replace)


def _post(client: ServerClient, path: str, body: dict[str, object], replace: Replace) -> None:
    try:
        client.post(path, body, seconds=_SECONDS)
    except ServerLostError:
        if not replace(client.url):
            raise
