"""What goes wrong with the Hub: what passes by itself is tried again, the rest is told in one line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipeline.commands import login
from pipeline.errors import HubError, is_unreachable, redact

ATTEMPTS = 5
BACKOFF_SECONDS = 1.0  # before the second attempt, and twice as long before each one after it
LONGEST_BACKOFF_SECONDS = 30.0

T = TypeVar("T")


class HubAway(HubError):
    """The Hub did not answer, or was unwell each time that it was asked."""


def persist(
    place: str,
    work: Callable[[], T],
    *,
    way_out: str = "try again later",
    passing: tuple[type[Exception], ...] = (),
    attempts: int = ATTEMPTS,
) -> T:
    """What `work` returns, done again where it fails for a reason that may pass.

    Args:
        place: the repository, or what of the configuration names it; errors begin with it.
        way_out: what people can do where it never passed.
        passing: errors that may pass besides those of the connection and the Hub's own.

    Raises:
        HubAway: where the Hub did not answer in any of these attempts.
        HubError: where the Hub refuses.
    """
    problem: Exception | None = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(min(BACKOFF_SECONDS * 2 ** (attempt - 1), LONGEST_BACKOFF_SECONDS))
        try:
            return work()
        except HubError:
            raise
        except Exception as error:
            if not (may_pass(error) or isinstance(error, passing)):
                raise _explained(place, error) from None
            problem = error
    code = status_of(problem)
    if code in (409, 412):
        raise HubError(f"{place}: others kept committing to it; {way_out}")
    what = "the Hub could not be reached" if code is None else "the Hub is unwell"
    raise HubAway(f"{place}: {what} ({say(problem)}); {way_out}")


def may_pass(error: Exception) -> bool:
    """Is it worth another attempt? 412 and 409 say that others were quicker, and passing is what they do."""
    code = status_of(error)
    if code is not None:
        return code in (408, 409, 412, 429) or code >= 500
    return any(is_unreachable(cause) for cause in _causes(error))


def _explained(place: str, error: Exception) -> Exception:
    """What to tell people of the Hub's refusal; any other error comes back as it is, for a bug keeps its traceback."""
    from huggingface_hub.errors import RepositoryNotFoundError

    code = status_of(error)
    if code is None:
        return error
    if code == 404 and any(isinstance(cause, RepositoryNotFoundError) for cause in _causes(error)):
        return HubError(f"{place}: no such repository, or it is private and this token may not see it")
    if code == 401:
        return HubError(f"{place}: the Hub refuses this token; log in again with: {login()}")
    if code == 403:
        return HubError(f"{place}: this token may not write there; use one that may")
    return HubError(f"{place}: the Hub refuses it ({say(error)})")


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that the Hub answered with, if it answered."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code if cause.response is not None else 500
    return None


def say(error: BaseException | None) -> str:
    return redact(" ".join(str(error).split()))[:200]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: the client wraps what happens to an upload."""
    while error is not None:
        yield error
        error = error.__cause__
