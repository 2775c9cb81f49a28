"""A Trackio dashboard in a Space of the Hub.

The Space's program takes the Hub token of who writes to it, so it gets one only where the Hub says that the
Space is there, where it answers, and that it belongs to whom the token belongs to. Spaces are not made here:
Trackio, when it makes one, leaves the token in it as a secret, which a dashboard does not need.

What has run here: the conversation, with Trackio's own server in the mode that it has in a Space, and the
checks, against a hub on loopback. What has not: reaching a Space at its real address.
"""

from __future__ import annotations

import re
from functools import partial
from urllib.parse import urlsplit

from pipeline.errors import HubError, TrackError
from pipeline.hub.auth import check_token
from pipeline.hub.retry import HubAway, retry_or_explain
from pipeline.tracking.trackers.places import Server

CHECK_SECONDS = 4.0
DATASET_VARIABLE = "TRACKIO_DATASET_ID"
BY_HAND = "make a Gradio Space whose requirements.txt says trackio, and whose app.py: import trackio; trackio.show()"


class Space(Server):
    """The server that runs in a Space."""

    def __init__(self, space: str):
        super().__init__("")  # the Hub names its address when it is opened
        self._space, self._where, self._token = space, f"track.space {space}", ""

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._token}"}

    def open(self) -> None:
        try:
            self._address, self._token = find(self._space)
        except HubAway as error:
            raise TrackError(f"{error}; no token is sent to a Space that the Hub does not know") from None
        super().open()


def find(space: str) -> tuple[str, str]:
    """The address at which the Hub serves a Space's program, and the token that may write there.

    Raises:
        HubAway: where the Hub cannot be asked.
        TrackError: where there is no such Space, it takes no data, or the token may not write to it.
    """
    place = f"track.space {space}"
    try:
        token = check_token(place, space.split("/")[0], attempts=1)
        return retry_or_explain(place, lambda: _address(space, token), attempts=1).rstrip("/"), token
    except HubAway:
        raise
    except HubError as error:
        raise TrackError(str(error)) from None


def _address(space: str, token: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = HfApi(token=token).space_info(space, timeout=CHECK_SECONDS)
    except RepositoryNotFoundError:
        raise TrackError(f"track.space {space}: there is no such Space; {BY_HAND}") from None
    if found.sdk == "static":
        raise TrackError(f"track.space {space}: frozen, it takes no data; name another one")
    if not found.host:
        raise TrackError(f"track.space {space}: the Hub does not say where its program answers; look at its page")
    return found.host


def space_at(address: str) -> str | None:
    """The Space USER/NAME that an address belongs to: its page on the Hub, or its program's; None for other servers.

    Raises:
        TrackError: where it is no address, or another page of the Hub; where that of a program does not tell whose
            it is, and the Hub neither.
    """
    try:
        parts = urlsplit(address)
    except ValueError:
        raise TrackError(f"{address}: not an address such as https://huggingface.co/spaces/USER/NAME") from None
    if parts.hostname in ("huggingface.co", "hf.co"):
        if page := re.match(r"/spaces/([^/]+/[^/]+)", parts.path):
            return page[1]
        raise TrackError(f"{address}: not the page of a Space; that is https://huggingface.co/spaces/USER/NAME")
    name = (parts.hostname or "").removesuffix(".hf.space")
    if name == parts.hostname or not name:
        return None
    words = name.split("-")
    known = ["/".join(("-".join(words[:n]), "-".join(words[n:]))) for n in range(1, len(words))]
    return known[0] if len(known) == 1 else _served_at(name, known)


def _served_at(name: str, known: list[str]) -> str:
    """Which of these Spaces the Hub serves at `name`.hf.space, where a '-' may stand for '/', '_' or '.' too."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def is_it(space: str) -> bool:
        try:
            return urlsplit(HfApi().space_info(space, timeout=CHECK_SECONDS).host or "").hostname == f"{name}.hf.space"
        except RepositoryNotFoundError:
            return False

    place = f"https://{name}.hf.space"
    for space in known:
        if retry_or_explain(place, partial(is_it, space), attempts=1):
            return space
    raise TrackError(f"{place}: does not tell whose Space it is; give https://huggingface.co/spaces/USER/NAME")


def keep_in(space: str, dataset: str) -> None:
    """Let the Trackio in a Space keep its data in a data set, by the variable that Trackio itself sets for that.

    A Space that is told something new starts again, so it is told once.

    Raises:
        HubError: where the Hub does not take it.
        TrackError: where there is no such Space, or the token may not write to it.
    """
    from huggingface_hub import HfApi

    _, token = find(space)

    def attempt() -> None:
        api = HfApi(token=token)
        known = api.get_space_variables(space).get(DATASET_VARIABLE)
        if known is None or known.value != dataset:
            api.add_space_variable(space, DATASET_VARIABLE, dataset)

    retry_or_explain(f"track.space {space}", attempt)
