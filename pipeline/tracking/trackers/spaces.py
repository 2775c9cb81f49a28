"""A Trackio dashboard in a Space of the Hub.

The program of a Space receives the writer's Hub token. It is sent only if the Hub confirms that the Space exists,
at which address it answers, and that the token's owner may write to it. Spaces are not created here: Trackio would
leave the token in a new Space as a secret, which a dashboard does not need.

Tested against Trackio's own server in its mode for Spaces, and a hub on loopback, but not against a real Space.
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
HOW_TO_MAKE = "a new Gradio Space with trackio in requirements.txt, and with app.py: import trackio; trackio.show()"


class Space(Server):
    """The Trackio server in a Space."""

    def __init__(self, space: str):
        super().__init__("")  # `open` asks the Hub for the address
        self._space, self._label, self._token = space, f"track.space {space}", ""

    def headers(self) -> dict[str, str]:
        """Return the headers with the Hub token."""
        return {"authorization": f"Bearer {self._token}"}

    def open(self) -> None:
        """Ask the Hub for the address, and connect to it."""
        try:
            self._address, self._token = find(self._space)
        except HubAway as error:
            raise TrackError(f"{error}; no token is sent to a Space that the Hub does not confirm") from None
        super().open()


def find(space: str) -> tuple[str, str]:
    """Return the address of a Space's program on the Hub, and the token that may write to it.

    Raises:
        HubAway: if the Hub does not answer.
        TrackError: if the Space does not exist, takes no data, or refuses the token.
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
        raise TrackError(f"track.space {space}: no such Space on the Hub. Try: {HOW_TO_MAKE}") from None
    if found.sdk == "static":
        raise TrackError(f"track.space {space}: static, so it takes no data. Try: --set track.space=USER/OTHER")
    if not found.host:
        page = f"https://huggingface.co/spaces/{space}"
        raise TrackError(f"track.space {space}: has no running program. Try: open {page} and start it")
    return found.host


def space_at(address: str) -> str | None:
    """Return the Space USER/NAME of an address: its page on the Hub, or its program; None for other servers.

    Raises:
        TrackError: if the address is invalid, another page of the Hub, or a program whose Space cannot be found.
    """
    try:
        parts = urlsplit(address)
    except ValueError:
        raise TrackError(f"{address}: not an address. Try: https://huggingface.co/spaces/USER/NAME") from None
    if parts.hostname in ("huggingface.co", "hf.co"):
        if page := re.match(r"/spaces/([^/]+/[^/]+)", parts.path):
            return page[1]
        raise TrackError(f"{address}: not the page of a Space. Try: https://huggingface.co/spaces/USER/NAME")
    name = (parts.hostname or "").removesuffix(".hf.space")
    if name == parts.hostname or not name:
        return None
    words = name.split("-")
    candidates = ["/".join(("-".join(words[:n]), "-".join(words[n:]))) for n in range(1, len(words))]
    return candidates[0] if len(candidates) == 1 else _served_at(name, candidates)


def _served_at(name: str, candidates: list[str]) -> str:
    """Return which of these Spaces the Hub serves at `name`.hf.space; a '-' may stand for '/', '_' or '.' too."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def is_it(space: str) -> bool:
        try:
            return urlsplit(HfApi().space_info(space, timeout=CHECK_SECONDS).host or "").hostname == f"{name}.hf.space"
        except RepositoryNotFoundError:
            return False

    place = f"https://{name}.hf.space"
    for space in candidates:
        if retry_or_explain(place, partial(is_it, space), attempts=1):
            return space
    raise TrackError(f"{place}: does not name its Space. Try: https://huggingface.co/spaces/USER/NAME")


def keep_in(space: str, dataset: str) -> None:
    """Set the variable by which the Trackio in a Space keeps its data in a data set.

    A Space restarts if a variable changes, so it is set only if it differs.

    Raises:
        HubError: if the Hub refuses.
        TrackError: if the Space does not exist, or refuses the token.
    """
    from huggingface_hub import HfApi

    _, token = find(space)

    def attempt() -> None:
        api = HfApi(token=token)
        known = api.get_space_variables(space).get(DATASET_VARIABLE)
        if known is None or known.value != dataset:
            api.add_space_variable(space, DATASET_VARIABLE, dataset)

    retry_or_explain(f"track.space {space}", attempt)
