"""Questions about the destination: the Hub repository, its visibility, and the place of curves and events."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from pipeline.cli.wizard.draft import Draft
from pipeline.cli.wizard.prompts import Question, TokenRefused, yes_or_no
from pipeline.config.track import DEFAULT_TRACKER
from pipeline.errors import HubError, TrackError
from pipeline.hub.auth import check_access, check_token
from pipeline.hub.retry import HubAway
from pipeline.tracking.trackers import TRACKERS, check, tracker
from pipeline.tracking.trackers.places import TOKEN_VARIABLE

NOWHERE, HERE = "none", "local"
HUB = ("HF_TOKEN", "Hub token with write access")
OTHERS = [name for name in TRACKERS if name != DEFAULT_TRACKER]
SERVER = (TOKEN_VARIABLE, "Write token of the server")


def _take_repo(draft: Draft, answer: str) -> None:
    if answer.lower() in (NOWHERE, "no"):
        return draft.set({"publish.repo": None})
    config = draft.config({"publish.repo": answer})
    _with_token(draft, HUB, NOWHERE, lambda: check_access(answer))
    draft.check_fits(config)
    draft.set({"publish.repo": answer})


def _take_track(draft: Draft, answer: str) -> None:
    """Take the name of a tracker, or a place of the default one."""
    if answer.lower() in TRACKERS:
        section = {"track": {"tracker": answer.lower()}}
        named, track = tracker(answer.lower()), draft.config(section).track
        for variable in named.SECRETS[:1]:
            _with_token(draft, (variable, f"Token for {named.LABEL}"), HERE, lambda: check(track))
        return draft.set(section)
    if "tracker" in draft.tree.get("track", {}):
        draft.set({"track": {}})
    if answer.lower() == HERE:
        return draft.set({"track.space": None, "track.server": None})
    is_server = "://" in answer
    settings = {"track.space": None if is_server else answer, "track.server": answer if is_server else None}
    config = draft.config(settings)

    def check_space() -> None:
        """Check the token for the Space and for the repository: both use the same one."""
        with contextlib.suppress(HubAway):  # events are sent later
            check_token(f"track.space {answer}", answer.split("/")[0], attempts=1)
            if config.publish.repo:
                check_access(config.publish.repo)
        check(config.track)

    if is_server:
        _with_token(draft, SERVER, HERE, lambda: check(config.track))
    else:
        _with_token(draft, HUB, HERE, check_space)
    draft.set(settings)


def _with_token(draft: Draft, token_of: tuple[str, str], instead: str, check: Callable[[], object]) -> None:
    """Check access with the present token. If it is not enough, ask for another one without echo.

    The token goes only into the environment of this process, and only if the check accepts it.

    Args:
        token_of: the environment variable of the token, and its description for people.
        instead: the answer that needs no token.

    Raises:
        TokenRefused: if no such token was typed, so that the question is asked again.
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
    token = draft.secret(f"{what} (not shown, not stored; press Enter to answer the question again): ").strip()
    if not token:
        raise TokenRefused(
            f"{variable}: no token, so nothing can be sent. Try: answer {instead} to keep everything here"
        )
    before = os.environ.get(variable)
    os.environ[variable] = token
    try:
        check()
    except BaseException as error:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before
        if isinstance(error, (HubError, TrackError)) and not isinstance(error, HubAway):
            raise TokenRefused(str(error)) from None
        raise


QUESTIONS = (
    Question(
        "repo",
        "Hub repository",
        lambda draft: f"Publish to USER/NAME on the Hub, or {NOWHERE} to keep everything on this machine.",
        lambda draft: NOWHERE,
        _take_repo,
    ),
    Question(
        "private",
        "Private",
        lambda draft: "A new repository is visible to you only. An existing repository keeps its visibility.",
        lambda draft: "yes",
        lambda draft, answer: draft.set({"publish.private": yes_or_no(answer)}),
        lambda draft: draft.config().publish.repo is not None,
        "public",
    ),
    Question(
        "track",
        "Tracker",
        lambda draft: (
            f"Curves and events go to {tracker(DEFAULT_TRACKER).LABEL}: {HERE} (this machine), a Space USER/NAME, or "
            f"the URL of a server. Or name another tracker: {', '.join(OTHERS)}."
        ),
        lambda draft: HERE,
        _take_track,
    ),
)
