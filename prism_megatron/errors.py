"""Every error that prism_megatron raises on purpose.

The message says where the trouble is and what to do; tools print it in one line and exit with status 2.
"""

from collections.abc import Iterable


def listed(values: Iterable[int]) -> str:
    """``1, 2, 4`` as a message offers it: ``1, 2 or 4``."""
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last


class PrismError(Exception):
    """Base of all errors that a user can act on."""


class ConfigError(PrismError):
    """A flag or a combination of flags cannot work. Raised before any process group starts."""


class DataError(PrismError):
    """A record, an image or a data folder is malformed."""


class ConversionError(PrismError):
    """A weight folder does not fit the model: missing, unknown or misshapen tensors."""


class WeightSyncError(PrismError):
    """A rollout engine was offered weights that are not the model's."""


class CheckpointError(PrismError):
    """A checkpoint is incomplete, hostile, or belongs to another run."""


class RolloutError(PrismError):
    """A rollout server cannot be reached, refuses, or answers with what the protocol does not allow."""


class GameError(PrismError):
    """The game between policy and discriminator has broken down."""
