"""A Trackio dashboard in a Space of the Hub.

The Space's program takes the Hub token of who writes to it, so it gets one only where the Hub says that the
Space is there, where it answers, and that it belongs to whom the token belongs to. Spaces are not made here:
Trackio, when it makes one, leaves the token in it as a secret, which a dashboard does not need.

What has run here: the conversation, with Trackio's own server in the mode that it has in a Space, and the
checks, against a hub on loopback. What has not: reaching a Space at its real address.
"""

from __future__ import annotations

from pipeline.errors import HubError, TrackError
from pipeline.hub import HubAway, check_token
from pipeline.hub.trouble import persist
from pipeline.trackers.places import Server

CHECK_SECONDS = 4.0
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
        return persist(place, lambda: _address(space, token), attempts=1).rstrip("/"), token
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
