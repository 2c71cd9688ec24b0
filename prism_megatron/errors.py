"""Every error that prism_megatron raises on purpose.

The message says where the trouble is and what to do; tools print it in one line and exit with the error's status.
"""

from collections.abc import Iterable


def listed(values: Iterable[int]) -> str:
    """``1, 2, 4`` as a message offers it: ``1, 2 or 4``."""
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last


class PrismError(Exception):
    """Base of all errors that a user can act on. ``status`` is what a command that ends by one exits with."""

    status = 2


class ConfigError(PrismError):
    """A flag or a combination of flags cannot work. Raised before any process group starts."""


class DataError(PrismError):
    """A record, an image or a data folder is malformed."""

    counted_as = "bad_field"
    """the reason that a record which is left out for it is counted under"""


class ConversionError(PrismError):
    """A weight folder does not fit the model: missing, unknown or misshapen tensors."""


class WeightSyncError(PrismError):
    """A rollout engine was offered weights that are not the model's."""


class CheckpointError(PrismError):
    """A checkpoint is incomplete, hostile, or belongs to another run."""


class RolloutError(PrismError):
    """A rollout server cannot be reached, refuses, or answers with what the protocol does not allow."""


class EndpointError(PrismError):
    """No endpoint of a model can be reached, or all ask not to be asked for long."""


class SpentError(PrismError):
    """Answers of endpoints have cost what they may. All of them are stored, and the same command goes on."""

    status = 3


class StoreError(PrismError):
    """A store of responses is damaged, of another version, or cannot be shared where it lies."""


class RewardError(PrismError):
    """A reward cannot be worked out: of a user's function, or of the processes that check answers."""


class GameError(PrismError):
    """The game between policy and discriminator has broken down."""


class DiskError(PrismError):
    """A disk took no more of what had to be written."""


class NothingTrainsError(PrismError):
    """Step after step something kept a role from learning. Everything up to there was written."""

    status = 4


class LostRankError(PrismError):
    """A rank of the run is gone, or never came; ``speaker`` is the rank that says so for all that are left."""

    status = 1

    def __init__(self, message: str, *, speaker: int | None) -> None:
        """``speaker`` is a rank; None where ranks do not know of each other yet: then all may say so."""
        super().__init__(message)
        self.speaker = speaker


class RunStopped(PrismError):  # noqa: N818  # no error: the run did as it was asked to
    """The run was asked to end, and has saved its last whole step."""

    status = 3
