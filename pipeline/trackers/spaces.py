"""A Trackio dashboard in a Space of the Hub, which is made when there is none.

What has run here: the conversation, with Trackio's own server in the mode that it has in a Space, and the
checks, against a hub on loopback. What has not: making a Space, which is Trackio's own work, and reaching
one at its real address.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from pipeline.errors import TrackError
from pipeline.trackers.places import Server

CHECK_SECONDS = 4.0
MAKING_SECONDS = 120.0
# Trackio makes the Space and the bucket that keeps its data; its lines and its questions are not for our terminal.
_MAKE = (
    "import sys, trackio\n"
    "trackio.init(project=sys.argv[2], space_id=sys.argv[1], private=True, embed=False,"
    " auto_log_gpu=False, auto_log_cpu=False)\n"
    "trackio.finish()\n"
    "import huggingface_hub; huggingface_hub.HfApi().space_info(sys.argv[1])\n"
)


class Space(Server):
    """The server that runs in a Space; it takes the Hub token of who may write to the Space."""

    def __init__(self, space: str, project: str, address: str | None = None):
        super().__init__(address or address_of(space))
        self._space, self._project, self._where = space, project, f"track.space {space}"

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {check_token(self._space)}"}

    def open(self) -> None:
        try:
            super().open()
        except TrackError as silence:
            raise (self._reason() or silence) from None

    def _reason(self) -> TrackError | None:
        """Why it does not answer, as far as the Hub knows. Where there is no such Space, it is made now."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            if HfApi().space_info(self._space, timeout=CHECK_SECONDS).sdk == "static":
                return TrackError(f"{self._where}: frozen, it takes no data; name another one")
        except RepositoryNotFoundError:
            return self._make()
        except Exception:  # the Hub does not say
            return None
        return None

    def _make(self) -> TrackError:
        # In a process without a terminal: Trackio prints, and asks for a login where a token does not suffice.
        command = [sys.executable, "-W", "ignore", "-c", _MAKE, self._space, self._project]
        with tempfile.TemporaryDirectory() as scratch:
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=MAKING_SECONDS,
                    start_new_session=True,
                    env=os.environ | {"TRACKIO_DIR": scratch},
                )
            except subprocess.TimeoutExpired:
                return TrackError(f"{self._where}: could not be made within {MAKING_SECONDS:g} seconds")
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
            return TrackError(f"{self._where}: could not be made: {reason[0]}")
        return TrackError(f"{self._where}: has just been made, and takes data when it is built, in some minutes")


def address_of(space: str) -> str:
    """The address at which the Hub serves a Space's program."""
    return f"https://{space.replace('/', '-').replace('_', '-').replace('.', '-').lower()}.hf.space"


def check_token(space: str) -> str:
    """The Hub token of this machine.

    Raises:
        TrackError: where there is none.
    """
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise TrackError(f"track.space {space}: no Hub token; set HF_TOKEN or run: hf auth login")
    return token


def check_hub_token(space: str) -> None:
    """Refuse a token that the Hub says cannot write to the Space; a Hub that does not answer says nothing.

    Raises:
        TrackError: saying why it cannot.
    """
    import httpx
    from huggingface_hub import constants

    headers = {"authorization": f"Bearer {check_token(space)}"}
    try:
        answer = httpx.get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=CHECK_SECONDS)
        who = answer.json() if answer.is_success else {}
    except (httpx.HTTPError, ValueError):
        return
    if answer.status_code in (401, 403):
        raise TrackError(f"track.space {space}: the Hub does not know this token; log in again with: hf auth login")
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise TrackError(f"track.space {space}: the token may only read; make one that may write")
    names = [who.get("name"), *(o.get("name") for o in who.get("orgs", []))]
    if who and space.split("/")[0] not in names:
        raise TrackError(f"track.space {space}: this token belongs to {names[0]}, who cannot write to it")
