"""Where it goes: a repository on the Hub, who may see it, and where Trackio shows the run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from pipeline.cli.wizard.draft import Draft
from pipeline.cli.wizard.prompts import Question, yes_or_no
from pipeline.errors import HubError, TrackError
from pipeline.hub.auth import check_access, check_token
from pipeline.hub.retry import HubAway
from pipeline.tracking.trackers import tracker
from pipeline.tracking.trackers.places import TOKEN_VARIABLE

NOWHERE, HERE = "none", "local"
HUB = ("HF_TOKEN", "Hub token that may write")
SERVER = (TOKEN_VARIABLE, "Write token of that server")


def _take_repo(draft: Draft, answer: str) -> None:
    if answer.lower() in (NOWHERE, "no"):
        return draft.set({"publish.repo": None})
    config = draft.config({"publish.repo": answer})
    _with_token(draft, HUB, NOWHERE, lambda: check_access(answer))
    draft.check_fits(config)
    draft.set({"publish.repo": answer})


def _take_track(draft: Draft, answer: str) -> None:
    if answer.lower() == HERE:
        return draft.set({"track.space": None, "track.server": None})
    is_server = "://" in answer
    settings = {"track.space": None if is_server else answer, "track.server": answer if is_server else None}
    config = draft.config(settings)

    def check_space() -> None:
        """One token serves the Space and the repository."""
        with contextlib.suppress(HubAway):  # it gets its events later
            check_token(f"track.space {answer}", answer.split("/")[0], attempts=1)
            if config.publish.repo:
                check_access(config.publish.repo)
        tracker(config.track.tracker).check(config.track)

    if is_server:
        _with_token(draft, SERVER, HERE, lambda: tracker(config.track.tracker).check(config.track))
    else:
        _with_token(draft, HUB, HERE, check_space)
    draft.set(settings)


def _with_token(draft: Draft, token_of: tuple[str, str], instead: str, check: Callable[[], object]) -> None:
    """Check access with the token that there is; where that is not enough, ask the person for one, without echo.

    The token goes into the environment of this process alone, and only where the check accepts it.

    Args:
        token_of: the variable that it is taken from, and what it is for people.
        instead: the answer that needs no token.
    """
    variable, what = token_of
    try:
        check()
        return
    except HubAway:  # another token does not help
        raise
    except (HubError, TrackError) as error:
        if draft.secret is None:
            raise
        draft.tell(str(error))
    token = draft.secret(f"{what}, not shown and not stored (empty: answer the question anew): ").strip()
    if not token:
        raise HubError(f"without a token nothing can be sent; {instead} keeps it here")
    before = os.environ.get(variable)
    os.environ[variable] = token
    try:
        check()
    except BaseException:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before
        raise


QUESTIONS = (
    Question(
        "repo",
        "Hub repository",
        lambda draft: f"Where to publish, as USER/NAME on the Hub; {NOWHERE} keeps everything on this machine.",
        lambda draft: NOWHERE,
        _take_repo,
    ),
    Question(
        "private",
        "Private",
        lambda draft: "Whether only you see a repository that is new; one that is there stays as it is.",
        lambda draft: "yes",
        lambda draft, answer: draft.set({"publish.private": yes_or_no(answer)}),
        lambda draft: draft.config().publish.repo is not None,
        "public",
    ),
    Question(
        "track",
        "Trackio",
        lambda draft: f"Place of curves and events: {HERE} (this machine), a Space USER/NAME, or a server's URL.",
        lambda draft: HERE,
        _take_track,
    ),
)
