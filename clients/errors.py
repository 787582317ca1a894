"""What can go wrong with a call over HTTP, as exceptions by status.

ApiError
|- NoAnswerError            the server can't be reached, broke off or took too long
|- UnexpectedAnswerError    an answer that is none of Hotswap's
|- InvalidRequestError      400 and every other 4xx without a class of its own
|- AuthenticationError      401
|- PermissionDeniedError    403
|- NotFoundError            404
|- ConflictError            409: the present state forbids it
|- TooLargeError            413
|- RateLimitedError         429
|- ServerError              500 and above
   |- UnavailableError      503: starting or draining
"""

from __future__ import annotations

import httpx

__all__ = [
    "ApiError",
    "AuthenticationError",
    "ConflictError",
    "InvalidRequestError",
    "NoAnswerError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitedError",
    "ServerError",
    "TooLargeError",
    "UnavailableError",
    "UnexpectedAnswerError",
    "error_of",
    "no_answer",
]


class ApiError(Exception):
    """The server answered with an error, or not at all.

    Args:
        message: One sentence.
        status: The HTTP status; 0 where there was no answer.
        code: What kind of error it is, for programs.
        param: The field at fault, where there is one.
        request_id: What the server's log calls the request.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None,
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id


class NoAnswerError(ApiError):
    """The server can't be reached, broke off or took too long."""


class UnexpectedAnswerError(ApiError):
    """An answer that is none of Hotswap's: another server, or another version."""


class InvalidRequestError(ApiError):
    """400: the request is wrong; `param` says where."""


class AuthenticationError(ApiError):
    """401: no API key, or one that is not valid."""


class PermissionDeniedError(ApiError):
    """403: the key may not do this."""


class NotFoundError(ApiError):
    """404: no such alias, version, experiment, response or route."""


class ConflictError(ApiError):
    """409: the request is fine, the present state forbids it."""


class TooLargeError(ApiError):
    """413: the body is larger than the server takes."""


class RateLimitedError(ApiError):
    """429: too much at once, also after all retries."""


class ServerError(ApiError):
    """500 and above: the server failed; its log has the reason under `request_id`."""


class UnavailableError(ServerError):
    """503: the server is starting or draining, also after all retries."""


_BY_STATUS: dict[int, type[ApiError]] = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: TooLargeError,
    429: RateLimitedError,
    503: UnavailableError,
}


def error_of(response: httpx.Response) -> ApiError:
    """The exception for an answer of 400 or above, whose body has been read."""
    status = response.status_code
    kind = _BY_STATUS.get(status, ServerError if status >= httpx.codes.INTERNAL_SERVER_ERROR else InvalidRequestError)
    request_id = response.headers.get("x-request-id")
    try:
        error = response.json()["error"]
        return kind(
            error["message"], status=status, code=error.get("code"), param=error.get("param"), request_id=request_id
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return kind(f"HTTP {status}", status=status, code=None, request_id=request_id)


def no_answer(error: httpx.TransportError) -> NoAnswerError:
    """The exception for a call that got no answer."""
    reason = str(error) or type(error).__name__
    address = error.request.url.copy_with(path="/", query=None)
    message = f"the server at {address} can't be reached (is it running, or still loading its base model?): {reason}"
    return NoAnswerError(message, status=0, code=None)
