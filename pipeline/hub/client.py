"""The Hub's client, set up to send each request once and with a time limit.

By itself the client has no time limit for most requests, repeats some of them silently, and sleeps as long as a server
tells it to. `pipeline.hub.retry` decides what is sent again, and shows it.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from typing import Any

from pipeline.errors import HubError

OFFLINE = ", and the Hub is switched off. Try: unset HF_HUB_OFFLINE"
TIMEOUT_SECONDS = 60.0  # without a byte coming or going; a large commit takes the Hub half a minute


_sent_bytes = 0
_count = threading.Lock()


def sent_bytes() -> int:
    """Return the bytes in the bodies of all requests of this process that were answered; those of Xet not included."""
    return _sent_bytes


def setting(name: str, default: float) -> float:
    """Return a number of at least 0 from the environment.

    Raises:
        HubError: if it is none.
    """
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise HubError(f"{name}: not a number of at least 0 ({text!r}). Try: unset {name}")
    return value


def is_offline() -> bool:
    """Return True if the Hub is switched off (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@functools.cache
def prepare() -> None:
    """Make the Hub's client send each request of this process once."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory  # it has no other name

    def factory() -> Any:
        client: Any = default_client_factory()
        client.send = functools.partial(_send, client.send)
        return client

    set_client_factory(factory)


def _send(send: Any, request: Any, **options: Any) -> Any:
    """Return the answer to a request; raise failures as errors that the client does not retry by itself."""
    from huggingface_hub.utils import hf_raise_for_status

    transport = sys.modules[type(request).__module__.partition(".")[0]].TransportError  # httpx, or what follows it
    seconds = setting("TUNEPRESS_HUB_TIMEOUT", TIMEOUT_SECONDS)
    known = request.extensions.get("timeout", {})  # downloads have a limit of their own
    limits = {kind: min(seconds, known.get(kind) or math.inf) for kind in ("connect", "read", "write", "pool")}
    request.extensions["timeout"] = limits
    try:
        answer = send(request, **options)
    except transport as error:
        raise transport(str(error) or type(error).__name__, request=request) from error
    if answer.status_code in (408, 429) or answer.status_code >= 500:
        answer.read()
        hf_raise_for_status(answer)
    with _count:
        global _sent_bytes
        _sent_bytes += int(request.headers.get("Content-Length") or 0)
    return answer
