"""GPU memory that colocated servers release while the trainer needs it.

The calls of SGLang 0.5.23 behind ``--enable-memory-saver``. Releasing gives the memory back and keeps nothing of it, so
a server that has it again needs every weight anew. A server must be idle and stay so in between: it is paused before
it releases, and goes on only when it is whole again.

Memory comes back in two parts, as the trainer lets go of it: first that of weights, which are handed over while the
trainer still holds the policy and what it gathers, then that of keys and values, which takes all that is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prism_megatron.rollout.sglang.http import ServerClient, ServerLostError

WEIGHTS, KEYS_AND_VALUES = "weights", "kv_cache"
_SECONDS = 300.0

Replace = Callable[[str], bool]


def release(clients: Sequence[ServerClient], *, replace: Replace) -> None:
    """Pause all servers, then have them release the memory of weights, keys and values.

    A lost server that ``replace`` starts anew is passed over. Raises RolloutError for any other failure.
    """
    for client in clients:
        _post(client, "/pause_generation", {"mode": "retract"}, replace)
    for client in clients:
        _post(client, "/release_memory_occupation", {"tags": [KEYS_AND_VALUES, WEIGHTS]}, replace)


def resume(clients: Sequence[ServerClient], region: str, *, replace: Replace) -> None:
    """Take the memory of one region back, with nothing in it; the servers stay paused. As ``release`` otherwise."""
    for client in clients:
        _post(client, "/resume_memory_occupation", {"tags": [region]}, replace)


def go_on(clients: Sequence[ServerClient], *, replace: Replace) -> None:
    """Let servers that are whole again take requests. As ``release`` otherwise."""
    for client in clients:
        _post(client, "/continue_generation", {}, replace)


def _post(client: ServerClient, path: str, body: dict[str, object], replace: Replace) -> None:
    try:
        client.post(path, body, seconds=_SECONDS)
    except ServerLostError:
        if not replace(client.url):
            raise
