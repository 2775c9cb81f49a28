"""Retries of requests to the Hub, and one line for each error that stays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from http.client import responses
from typing import TypeVar

from pipeline.errors import HubError, is_unreachable, redact
from pipeline.hub.client import OFFLINE, is_offline, prepare, setting
from pipeline.system.command_names import other_token

ATTEMPTS = 8
WAIT_SECONDS = 1.0  # before the second attempt, and twice as long before each one after it
LONGEST_WAIT_SECONDS = 30.0
LONGEST_ASKED_SECONDS = 600.0  # that the Hub may ask for; its limits are of five minutes

FINAL = (501, 505, 506, 508, 510, 511)  # errors of a server that another attempt gets again

T = TypeVar("T")
_log = logging.getLogger(__name__)


class HubAway(HubError):
    """No answer from the Hub, or an error of the Hub itself, in every attempt."""


def retry_or_explain(
    place: str,
    work: Callable[[], T],
    *,
    advice: str = "again later",
    also_retried: tuple[type[Exception], ...] = (),
    attempts: int | None = None,
) -> T:
    """Call `retry`, and explain the error that stays in one line.

    Args:
        advice: what people can do if every attempt fails.

    Raises:
        HubAway: if the Hub did not answer in any attempt.
        HubError: if the Hub refuses.
    """
    try:
        return retry(place, work, also_retried=also_retried, attempts=attempts)
    except HubError:
        raise
    except Exception as error:
        code = status_of(error)
        if not _is_worth_retry(error, also_retried):
            raise _explained(place, error) from None
        if code in (409, 412):
            raise HubError(f"{place}: other commits arrived in every attempt (HTTP {code}). Try: {advice}") from None
        problem = "the Hub could not be reached" if code is None else "the Hub has a problem"
        asked = _asked_seconds(error)
        pause = f"; it asks to wait {asked:.0f} s" if asked > LONGEST_ASKED_SECONDS else ""
        raise HubAway(f"{place}: {problem} ({say(error)}){pause}. Try: {advice}") from None


def retry(
    place: str,
    work: Callable[[], T],
    *,
    also_retried: tuple[type[Exception], ...] = (),
    attempts: int | None = None,
) -> T:
    """Return what `work` returns; call it again after errors that may pass.

    Each wait is shown. It is twice as long as the one before, or as long as the Hub asks for. The number of attempts
    and the first wait (seconds) can be set in TUNEPRESS_HUB_ATTEMPTS and TUNEPRESS_HUB_WAIT.

    Args:
        place: the repository or the configuration's name for it; each shown line begins with it.
        also_retried: errors that may pass, in addition to those of the connection and of the Hub.

    Raises:
        Exception: the last error of `work`.
    """
    from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    def should_retry(error: BaseException) -> bool:
        if not isinstance(error, Exception) or isinstance(error, HubError):
            return False
        return _asked_seconds(error) <= LONGEST_ASKED_SECONDS and _is_worth_retry(error, also_retried)

    def error_of(state: RetryCallState) -> BaseException:
        error = state.outcome.exception() if state.outcome else None
        assert error is not None, "only a failed attempt is waited for"
        return error

    def show(state: RetryCallState) -> None:
        then = f"again in {state.upcoming_sleep:.0f} s ({state.attempt_number + 1} of {most})"
        _log.warning("%s: %s; %s", place, _in_short(error_of(state)), then)

    prepare()
    most = attempts or max(1, int(setting("TUNEPRESS_HUB_ATTEMPTS", ATTEMPTS)))
    backoff = wait_exponential(setting("TUNEPRESS_HUB_WAIT", WAIT_SECONDS), max=LONGEST_WAIT_SECONDS)
    retrying = Retrying(
        stop=stop_after_attempt(most),
        retry=retry_if_exception(should_retry),
        wait=lambda state: max(backoff(state), _asked_seconds(error_of(state))),
        before_sleep=show,
        reraise=True,
    )
    return retrying(work)


def show_waits(show: Callable[[list[str]], None]) -> None:
    """Pass a line about each wait of this process to `show`."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show([record.getMessage()])

    _log.addHandler(Shown())
    _log.propagate = False


def _in_short(error: BaseException) -> str:
    """Return the reason of a wait."""
    code = status_of(error)
    if code is None:
        return f"the Hub could not be reached ({say(error)})"
    if code in (409, 412):
        return "another commit came first"
    told = " ".join(filter(None, (str(code), responses.get(code))))
    return f"the Hub has a problem ({told})"


def _asked_seconds(error: BaseException) -> float:
    """Return the seconds that the Hub asks clients to wait."""
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


def _is_worth_retry(error: Exception, also_retried: tuple[type[Exception], ...]) -> bool:
    """Return True if the error may pass. 409 and 412 mean that others committed first; 401 and `FINAL` never pass."""
    code = status_of(error)
    if is_offline():
        return False
    if isinstance(error, also_retried) and code not in (401, *FINAL):
        return True
    if code is not None:
        return code in (408, 409, 412, 429) or (code >= 500 and code not in FINAL)
    return any(is_unreachable(cause) for cause in _causes(error))


def _explained(place: str, error: Exception) -> Exception:
    """Return a refusal of the Hub in plain words; any other error unchanged, so that a bug keeps its traceback."""
    from huggingface_hub.errors import RepositoryNotFoundError

    code = status_of(error)
    if is_offline() and is_unreachable(error):
        return HubAway(f"{place}: the Hub is needed{OFFLINE}")
    if code is None:
        return error
    if code == 404 and any(isinstance(cause, RepositoryNotFoundError) for cause in _causes(error)):
        return HubError(f"{place}: no such repository, or this token cannot see it. Try: {other_token()}")
    if code == 401:
        return HubError(f"{place}: the Hub refuses this token. Try: {other_token()}")
    if code == 403:
        return HubError(f"{place}: this token cannot write here. Try: {other_token()}")
    return HubError(f"{place}: the Hub refuses it ({say(error)})")


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of the Hub's answer, or None without one."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code if cause.response is not None else 500
    return None


def say(error: BaseException | str | None) -> str:
    """Return an error in one line, without secrets and at most 200 characters long; the server's own words come first.

    The client puts them behind an address, where they would be cut off.
    """
    from huggingface_hub.errors import HfHubHTTPError

    text = str(error)
    for cause in _causes(error if isinstance(error, BaseException) else None):
        if isinstance(cause, HfHubHTTPError) and cause.server_message:
            text = f"{cause.server_message} ({status_of(cause)}) {text}"
            break
    return redact(" ".join(text.split()))[:200]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and its causes: the client wraps the errors of an upload."""
    while error is not None:
        yield error
        error = error.__cause__
