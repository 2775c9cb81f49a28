"""What goes over the wire: a request as handlers see it, a reply as they make it, and the table of routes."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

from .store import HubError

CHUNK = 1 << 18


class Request:
    """One HTTP request: what was asked, by which headers, and a body that is counted in `received`.

    Handlers find the body in `body`; only those whose route streams take it from `chunks`.
    """

    def __init__(self, method: str, target: str, headers, stream: BinaryIO):
        split = urlsplit(target)
        self.method, self.path, self.headers = method, split.path, headers
        self.query = parse_qs(split.query, keep_blank_values=True)
        self.args: dict[str, str] = {}
        self.body = b""
        self.received = 0
        self._chunks = self._read(stream)

    def chunks(self) -> Iterator[bytes]:
        """The rest of the body, piece by piece."""
        return self._chunks

    def load(self) -> None:
        """Read the whole body into memory."""
        self.body = b"".join(self._chunks)

    def drain(self) -> None:
        """Read what nobody asked for, so that the connection can be used again."""
        for _ in self._chunks:
            pass

    def json(self) -> dict:
        """The body as a JSON object; 400 if it is none."""
        try:
            value = json.loads(self.body)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise HubError(400, "The body has to be a JSON object")
        return value

    def form(self) -> dict[str, list[str]]:
        """The body as form fields, each a list of values; a JSON object does as well."""
        if "json" in self.headers.get("Content-Type", ""):
            return {key: value if isinstance(value, list) else [str(value)] for key, value in self.json().items()}
        return parse_qs(self.body.decode())

    def flag(self, name: str) -> bool:
        """Whether the query switches `name` on."""
        return self.query.get(name, ["false"])[-1].lower() in ("1", "true", "")

    def _read(self, stream: BinaryIO) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while length := int(stream.readline().split(b";")[0] or b"0", 16):
                yield from self._take(stream, length)
                stream.readline()
            while stream.readline().strip():
                pass
        else:
            yield from self._take(stream, int(self.headers.get("Content-Length") or 0))

    def _take(self, stream: BinaryIO, length: int) -> Iterator[bytes]:
        while length:
            chunk = stream.read1(min(length, CHUNK))
            if not chunk:
                raise ConnectionError("the client left in the middle of its request")
            self.received += len(chunk)
            length -= len(chunk)
            yield chunk


@dataclass
class Reply:
    """An answer: bytes, or a stretch of a file; after `cut` bytes of it the connection breaks."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    start: int = 0
    length: int | None = None
    cut: int | None = None

    @classmethod
    def json(cls, value, status: int = 200, **headers: str) -> "Reply":
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})

    @classmethod
    def error(cls, error: HubError) -> "Reply":
        """An error as the Hub words it: in the body, and in two headers."""
        reply = cls.json({"error": error.message, **error.extra.get("body", {})}, error.status)
        reply.headers["X-Error-Message"] = error.message.encode("ascii", "replace").decode().replace("\n", " ")
        if error.code:
            reply.headers["X-Error-Code"] = error.code
        reply.headers.update(error.extra.get("headers", {}))
        return reply

    def content(self) -> Iterator[bytes]:
        """The body, piece by piece."""
        if self.file is None:
            yield self.body
            return
        remaining = self.content_length
        with self.file.open("rb") as file:
            file.seek(self.start)
            while remaining > 0 and (chunk := file.read(min(remaining, CHUNK))):
                remaining -= len(chunk)
                yield chunk

    @property
    def content_length(self) -> int:
        return len(self.body) if self.file is None else self.length


@dataclass(frozen=True)
class Route:
    """Who answers a method and a path, and whether the body is streamed to them."""

    method: str
    pattern: re.Pattern
    handler: Callable
    streams: bool


ROUTES: list[Route] = []

_PLACEHOLDERS = {
    "kind": "models|datasets|spaces",
    "repo": "[^/]+/[^/]+",
    "rev": "refs/(?:pr|heads|tags)/[^/]+|[^/]+",
    "path": ".+",
    "number": "[0-9]+",
}


def route(method: str, template: str, *, streams: bool = False):
    """Register a handler ``(hub, request) -> Reply`` for paths such as ``/api/{kind}/{repo}/refs``.

    What is in square brackets may be absent. The values are in ``request.args``, unquoted.
    A handler runs while the store is locked, unless its body streams.
    """
    pattern = template.replace(".", r"\.").replace("[", "(?:").replace("]", ")?")
    pattern = re.sub(r"\{(\w+)\}", lambda name: f"(?P<{name[1]}>{_PLACEHOLDERS.get(name[1], '[^/]+')})", pattern)

    def register(handler):
        ROUTES.append(Route(method, re.compile(pattern), handler, streams))
        return handler

    return register


def route_of(request: Request) -> Route:
    """Find who answers this request, and fill in its ``args``; 404 if nobody does."""
    method = "GET" if request.method == "HEAD" else request.method
    for candidate in ROUTES:
        if candidate.method == method and (match := candidate.pattern.fullmatch(request.path)):
            request.args = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            return candidate
    raise HubError(404, f"Nothing is served here: {request.method} {request.path}")


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The (start, length) that a Range header asks for; None for everything; 416 beyond the end."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not match or match[0] == "bytes=-":
        return None
    if match[1]:
        start, end = int(match[1]), min(int(match[2] or size), size - 1)
    else:
        start, end = max(size - int(match[2]), 0), size - 1
    if start > end:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end - start + 1
