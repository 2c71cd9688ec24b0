"""The models of a recipe as calls name them, their keys, and their endpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prism_megatron.config.tools.curate import Endpoint, Model
from prism_megatron.config.tools.requests import check_address
from prism_megatron.curation.client.gate import Gate
from prism_megatron.curation.client.pace import Pace
from prism_megatron.curation.client.place import Place
from prism_megatron.curation.client.pool import Pool
from prism_megatron.endpoints.chat import LIMIT_BYTES, ChatEndpoint, key_of
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class Role:
    """A model that calls name, and where it is asked."""

    name: str
    model: Model
    pool: Pool


def build_roles(
    models: Mapping[str, Model],
    environment: Mapping[str, str],
    gate: Gate,
    *,
    pace: Pace,
    limit_bytes: int = LIMIT_BYTES,
    clock: Callable[[], float],
) -> dict[str, Role]:
    """A role for each model. An endpoint that stands at several models in the same words is one, with one limit.

    Raises ConfigError where a model has no endpoint, an address is none, or a key is missing.
    """
    places: dict[tuple[Endpoint, str, float], Place] = {}
    roles = {}
    for name, model in models.items():
        if not model.endpoints:
            raise ConfigError(f"{name} has no endpoint; name one under its endpoints, such as url: http://HOST/v1")
        own = []
        for endpoint in model.endpoints:
            same = (endpoint, endpoint.served_model or model.name, model.seconds)
            if same not in places:
                _check_address(name, endpoint.url)
                chat = ChatEndpoint(
                    endpoint.url,
                    api_key=_key(name, endpoint, environment),
                    silence_seconds=model.seconds,
                    seconds=model.seconds,
                    limit_bytes=limit_bytes,
                )
                places[same] = Place(endpoint, chat, pace=pace)
            own.append(places[same])
        pool = Pool(name, own, gate, tries=model.tries, longest_wait=pace.longest_wait, clock=clock)
        roles[name] = Role(name, model, pool)
    return roles


def _key(role: str, endpoint: Endpoint, environment: Mapping[str, str]) -> str | None:
    if endpoint.key is None:
        return None
    key = key_of(environment.get(endpoint.key, ""), endpoint.key)
    if key is None:
        raise ConfigError(
            f"{role}: {endpoint.url} needs the key that the environment variable {endpoint.key} holds, and it is not "
            "set; set it, or leave key out for an endpoint that asks for none"
        )
    return key


def _check_address(role: str, url: str) -> None:
    """Raise ConfigError for anything but a host and a path; what may be a secret in it is not told."""
    try:
        check_address(url, key="a key stands in an environment variable, which the endpoint's key names")
    except ConfigError as error:
        raise ConfigError(f"{role}: {error}") from error
