"""What goes wrong with the Hub: what passes by itself is tried again, the rest is told in one line."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from http.client import responses
from typing import TypeVar

from pipeline.errors import HubError, is_unreachable, redact
from pipeline.hub.client import prepare, setting
from pipeline.system.command_names import login

ATTEMPTS = 8
WAIT_SECONDS = 1.0  # before the second attempt, and twice as long before each one after it
LONGEST_WAIT_SECONDS = 30.0
LONGEST_ASKED_SECONDS = 600.0  # that the Hub may ask for; its limits are of five minutes

T = TypeVar("T")
_log = logging.getLogger(__name__)


class HubAway(HubError):
    """The Hub did not answer, or was unwell each time that it was asked."""


def persist(
    place: str,
    work: Callable[[], T],
    *,
    way_out: str = "try again later",
    passing: tuple[type[Exception], ...] = (),
    attempts: int | None = None,
) -> T:
    """`insist`, with one line for people where it comes to nothing.

    Args:
        way_out: what people can do where it never passed.

    Raises:
        HubAway: where the Hub did not answer in any of these attempts.
        HubError: where the Hub refuses.
    """
    try:
        return insist(place, work, passing=passing, attempts=attempts)
    except HubError:
        raise
    except Exception as error:
        code = status_of(error)
        if not _passes(error, passing):
            raise _explained(place, error) from None
        if code in (409, 412):
            raise HubError(f"{place}: others kept committing to it; {way_out}") from None
        what = "the Hub could not be reached" if code is None else "the Hub is unwell"
        asked = _asked(error)
        pause = f"; it asks to be left alone for {asked:.0f} s" if asked > LONGEST_ASKED_SECONDS else ""
        raise HubAway(f"{place}: {what} ({say(error)}){pause}; {way_out}") from None


def insist(
    place: str,
    work: Callable[[], T],
    *,
    passing: tuple[type[Exception], ...] = (),
    attempts: int | None = None,
) -> T:
    """What `work` returns, done again where it fails for a reason that may pass.

    Each wait is shown, and twice as long as the one before it, or as long as the Hub asks for. How often, and how
    long the first wait is, can be set in TUNEPRESS_HUB_ATTEMPTS and TUNEPRESS_HUB_WAIT (seconds).

    Args:
        place: the repository, or what of the configuration names it; what is shown begins with it.
        passing: errors that may pass besides those of the connection and the Hub's own.

    Raises:
        Exception: what `work` raised last.
    """
    prepare()
    most = attempts or max(1, int(setting("TUNEPRESS_HUB_ATTEMPTS", ATTEMPTS)))
    wait = setting("TUNEPRESS_HUB_WAIT", WAIT_SECONDS)
    for attempt in range(1, most + 1):
        try:
            return work()
        except HubError:
            raise
        except Exception as error:
            asked = _asked(error)
            if attempt == most or asked > LONGEST_ASKED_SECONDS or not _passes(error, passing):
                raise
            pause = max(min(wait * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS), asked)
            _log.warning("%s: %s; again in %.0f s (%d of %d)", place, _in_short(error), pause, attempt + 1, most)
        time.sleep(pause)
    raise AssertionError  # the last attempt returns or raises


def show_waits(show: Callable[[list[str]], None]) -> None:
    """Have what is waited for in this process be shown by `show`, a line each time."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show([record.getMessage()])

    _log.addHandler(Shown())
    _log.propagate = False


def _in_short(error: Exception) -> str:
    """What keeps us waiting."""
    code = status_of(error)
    if code is None:
        return f"the Hub could not be reached ({say(error)})"
    if code in (409, 412):
        return "somebody else committed to it"
    return f"the Hub is unwell ({' '.join(filter(None, (str(code), responses.get(code))))})"


def _asked(error: BaseException) -> float:
    """Seconds that the Hub asks to be left alone for."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            headers = cause.response.headers
            limit = parse_ratelimit_headers(headers) if cause.response.status_code == 429 else None
            if limit and limit.remaining == 0:
                return float(limit.reset_in_seconds)
            after = headers.get("Retry-After", "")
            return float(after) if after.isdecimal() else 0.0
    return 0.0


def _passes(error: Exception, passing: tuple[type[Exception], ...]) -> bool:
    """Is it worth another attempt, or one of `passing`? A token that is refused stays refused."""
    return may_pass(error) or (isinstance(error, passing) and status_of(error) != 401)


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


def say(error: BaseException | str | None) -> str:
    return redact(" ".join(str(error).split()))[:200]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: the client wraps what happens to an upload."""
    while error is not None:
        yield error
        error = error.__cause__
