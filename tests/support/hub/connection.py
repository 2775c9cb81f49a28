"""Sockets: take a request off a connection, have it answered, record it, write the reply."""

import contextlib
import os
import socket
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from .store import HubError
from .wire import Reply, Request


class Recorded(NamedTuple):
    """A request that was answered; status 0 stands for a connection that broke."""

    method: str
    path: str
    status: int
    body_bytes: int


class Server(ThreadingHTTPServer):
    """Knows its open connections, so that a stopped hub really falls silent."""

    request_queue_size = 64

    def __init__(self, port: int, hub):
        super().__init__(("127.0.0.1", port), Handler)
        self.hub = hub
        self._connections: set[socket.socket] = set()

    def process_request(self, request, client_address):
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """Clients that leave are nothing to report; anything else is a bug of this hub."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def drop_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the hub answer it, records it, writes the reply."""

    protocol_version = "HTTP/1.1"
    server_version = "LoopbackHub"
    disable_nagle_algorithm = True
    server: Server

    def _serve(self) -> None:
        hub = self.server.hub
        request = Request(self.command, self.path, self.headers, self.rfile)
        try:
            reply = self._reply(hub, request)
            request.drain()
        except (ConnectionError, ValueError):
            reply = None
        status = reply.status if reply else 0
        hub.requests.append(Recorded(request.method, request.path, status, request.received))
        try:
            self._reset() if reply is None else self._send(reply, f"loopback-{len(hub.requests)}")
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _reply(self, hub, request: Request) -> Reply | None:
        """The answer, or what a fault makes of it; None for a connection to break."""
        fault = hub.faults.strike(request.method, request.path)
        if fault is None:
            return hub.answer(request)
        if fault.first:
            fault.first()
        hub.stopping.wait(fault.stall)
        answer = hub.answer(request) if fault.after or not (fault.reset or fault.status) else None
        if fault.reset:
            return None
        if answer:
            answer.cut = fault.cut
        if fault.status:
            return Reply.error(HubError(fault.status, "A fault was asked for", headers=dict(fault.headers or {})))
        return answer

    def _send(self, reply: Reply, request_id: str) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(reply.content_length))
        self.send_header("X-Request-Id", request_id)
        self.end_headers()
        if self.command != "HEAD":
            for chunk in reply.content():
                self.wfile.write(chunk if reply.cut is None else chunk[: reply.cut])
                if reply.cut is not None:
                    return self._reset()

    def _reset(self) -> None:
        """Break the connection the hard way: the client sees a reset, not an end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, *args) -> None:
        """Keep the output of tests clean; `LoopbackHub.requests` has it all."""
