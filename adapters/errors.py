"""Every error that a user, a file or the network can cause, in one tree.

HotswapError
|- InvalidInputError            what was given is wrong; the message says what was expected and where
|  |- InvalidNameError          an alias, version or model name that breaks the grammar
|  |- ConfigurationError        a setting that is unknown or out of bounds
|  |- DataError                 a row of training data; names file, line and field
|  |- PromptTooLongError        the rendered prompt leaves no room in the context
|  |- AdapterRejectedError      an adapter that can't be served
|     |- FingerprintMismatchError   made for another base model
|     |- RankTooHighError           does not fit the slots
|     |- AdapterConfigError         adapter_config.json asks for something unsupported
|     |- AdapterWeightsError        tensors missing, misshapen, not finite or without effect
|     |- AdapterManifestError       manifest.json is none, or that of other files
|- NotFoundError                no such alias, version, experiment, response, file, job, key or base model
|- AuthenticationError          an API key is required, and none or an invalid one was given
|- PermissionDeniedError        the API key is valid, but does not allow this
|  |- AliasForbiddenError       making or moving an alias that the key is not for
|- ForeignPageError             without API keys, a request that did not plainly come from this machine
|- ConflictError                the request is fine, the present state forbids it
|  |- FeedbackTooLateError      on a response from longer ago than feedback is taken for
|- IntegrityError               a stored file is not what its manifest says
|- DatabaseBusyError            others hold the database for too long: try again later
|- StorageFullError             the disk has no room for what was to be kept
|- BaseModelError               the base model can't be fetched, read or supported
|- OverloadedError              the queue is full: try again later
|  |- RateLimitError               the API key has used up what it may take: try again later
|- EngineUnavailableError       the engine is starting, draining or has died
|- AdapterLoadError             a published version can't be served; the reason is in the message
|- EngineFailureError           a step of the model failed under this request
|- DeadlineExceededError        the answer was not finished in its time
|- OutOfMemoryError             a run for which the machine or its device has too little memory
|- TrainingDivergedError        a run whose loss is no number, or only rises
"""

from __future__ import annotations

__all__ = [
    "AdapterConfigError",
    "AdapterLoadError",
    "AdapterManifestError",
    "AdapterRejectedError",
    "AdapterWeightsError",
    "AliasForbiddenError",
    "AuthenticationError",
    "BaseModelError",
    "ConfigurationError",
    "ConflictError",
    "DataError",
    "DatabaseBusyError",
    "DeadlineExceededError",
    "EngineFailureError",
    "EngineUnavailableError",
    "FeedbackTooLateError",
    "FingerprintMismatchError",
    "ForeignPageError",
    "HotswapError",
    "IntegrityError",
    "InvalidInputError",
    "InvalidNameError",
    "NotFoundError",
    "OutOfMemoryError",
    "OverloadedError",
    "PermissionDeniedError",
    "PromptTooLongError",
    "RankTooHighError",
    "RateLimitError",
    "StorageFullError",
    "TrainingDivergedError",
]


class HotswapError(Exception):
    """Root of the tree; `str(error)` is one sentence that may be shown to a user."""


class InvalidInputError(HotswapError):
    """What was given is wrong.

    Args:
        message: What was found and what was expected.
        param: The field or option at fault, where there is one.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidNameError(InvalidInputError):
    """An alias, version or model name that breaks the grammar."""


class ConfigurationError(InvalidInputError):
    """A setting that is unknown or out of bounds."""


class DataError(InvalidInputError):
    """One or more rows of training data are wrong.

    Args:
        problems: One sentence each, beginning with where it is: `file:line`, or `line N` of an upload.
        num_more: Problems beside those.
        param: The field of the request that holds the data, where there is one.
    """

    def __init__(self, problems: list[str], *, num_more: int = 0, param: str | None = None) -> None:
        shown = "\n".join(problems)
        more = f"\n... and {num_more} more" if num_more else ""
        super().__init__(shown + more, param=param)
        self.problems = problems


class PromptTooLongError(InvalidInputError):
    """The rendered prompt leaves no room in the context."""


class AdapterRejectedError(InvalidInputError):
    """An adapter that can't be served on this base model by this server."""


class FingerprintMismatchError(AdapterRejectedError):
    """The adapter was made for another base model than the one that is loaded."""

    def __init__(self, *, adapter: str, base: str) -> None:
        super().__init__(
            f"the adapter was made for the base model with fingerprint {adapter}, but this base model has {base}"
        )


class RankTooHighError(AdapterRejectedError):
    """The adapter's rank exceeds the slots' rank; `where` says which of its ranks, if not all modules have it."""

    def __init__(self, *, rank: int, max_rank: int, where: str | None = None) -> None:
        of = f" in {where}" if where else ""
        super().__init__(
            f"the adapter has rank {rank}{of}, but slots hold at most rank {max_rank}; "
            "raise max_rank (HOTSWAP_MAX_RANK) to serve it"
        )


class AdapterConfigError(AdapterRejectedError):
    """adapter_config.json asks for something that is not supported."""


class AdapterWeightsError(AdapterRejectedError):
    """Tensors are missing, misshapen, not finite or without effect."""


class AdapterManifestError(AdapterRejectedError):
    """manifest.json is not a manifest, or describes other files than those beside it."""


class NotFoundError(HotswapError):
    """No such alias, version, experiment, response or base model."""


class AuthenticationError(HotswapError):
    """An API key is required, and none or an invalid one was given."""


class PermissionDeniedError(HotswapError):
    """The API key is valid, but does not allow this."""


class AliasForbiddenError(PermissionDeniedError):
    """The API key is limited to other aliases than the one that would be made or moved; `param` names the field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ForeignPageError(HotswapError):
    """A server without API keys answers this machine alone, and the request did not plainly come from it."""


class ConflictError(HotswapError):
    """The request is well formed, but the present state forbids it."""


class FeedbackTooLateError(ConflictError):
    """The response is from longer ago than feedback is taken for."""


class IntegrityError(HotswapError):
    """A stored file is not what its manifest says."""


class DatabaseBusyError(HotswapError):
    """Others hold the database for longer than is waited for; nothing was written."""


class StorageFullError(HotswapError):
    """The disk has no room for what was to be kept; a note names the place where the message doesn't."""


class BaseModelError(HotswapError):
    """The base model can't be fetched, read or supported."""


class OverloadedError(HotswapError):
    """The queue is full; nothing was started.

    Args:
        retry_after_s: Seconds after which a retry is sensible.
    """

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitError(OverloadedError):
    """The API key has used up what it may take in a minute, or at once; nothing was started."""


class EngineUnavailableError(HotswapError):
    """The engine is starting, draining or has died."""


class AdapterLoadError(HotswapError):
    """A published version that a request names can't be loaded; nothing is wrong with the request."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.param = "model"


class EngineFailureError(HotswapError):
    """A step of the model failed under this request; other requests are unaffected."""


class DeadlineExceededError(HotswapError):
    """The answer was not finished in its time; the same request would most likely run out of it again."""


class OutOfMemoryError(HotswapError):
    """The machine or its device has too little memory for a training run; the message says what takes less."""


class TrainingDivergedError(HotswapError):
    """A training run was stopped, since going on would make nothing; the message says at which step, and what to do."""
