"""The part of a W&B server that its client needs, on loopback: runs, lines of history by offset, alerts and files.

W&B's own server cannot run here. This one keeps what the real client sends, in the form in which it sends it: a line
of history that comes again with its offset takes the place of the same line.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pipeline.tracking.trackers.contents import event_values

KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "ada"


@dataclass
class StoredRun:
    """A run as the server keeps it."""

    name: str
    project: str
    display: str = ""
    config: str = "{}"
    state: str = "running"
    summary: str = "{}"
    history: dict[int, str] = field(default_factory=dict)
    alerts: list[dict] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict]:
        return [json.loads(self.history[offset]) for offset in sorted(self.history)]

    def as_json(self) -> dict:
        rows = self.rows
        tail = [json.dumps({key: rows[-1][key] for key in ("_step", "_runtime")})] if rows else []
        empty = ("sweepName", "group", "jobType", "commit", "runInfo", "notes", "description")
        moment = "2026-01-01T00:00:00"
        return dict.fromkeys(empty) | {
            "id": self.name, "name": self.name, "displayName": self.display, "config": self.config, "tags": [],
            "summaryMetrics": self.summary, "systemMetrics": "{}", "wandbConfig": '{"t": 1}', "state": self.state,
            "historyLineCount": len(rows), "historyTail": json.dumps(tail), "eventsLineCount": 0, "eventsTail": "[]",
            "historyKeys": {"lastStep": rows[-1]["_step"] if rows else -1, "sets": [], "keys": {}}, "logLineCount": 0,
            "readOnly": False, "createdAt": moment, "heartbeatAt": moment, "projectId": "1",
            "user": {"name": ENTITY, "username": ENTITY}, "projectName": self.project,
            "project": {"id": "1", "name": self.project, "entity": {"id": "1", "name": ENTITY}},
        }  # fmt: skip


class WandbServer:
    """A server that can be stopped and started again, with what it has received."""

    def __init__(self):
        self.runs: dict[str, StoredRun] = {}
        self.requests: list[str] = []
        self.port, self._http = 0, None
        self.connections: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def track(self) -> dict:
        return {"tracker": "wandb", "server": self.url}

    def start(self) -> WandbServer:
        handler = type("Handler", (_Handler,), {"board": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        if self._http:
            self._http.shutdown()
            self._http.server_close()
            self._http = None
        for connection in list(self.connections):  # the client keeps them open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def run(self) -> StoredRun:
        """Return the only run."""
        (run,) = self.runs.values()
        return run

    def count(self) -> int:
        """Return how many records are stored."""
        return sum(len(run.history) for run in self.runs.values())

    def assert_once_each(self, records: list[dict]) -> None:
        """Check that one run holds each record once and in order, with its time and step."""
        assert_rows(self.run.rows, records)

    def graphql(self, name: str, variables: dict) -> dict:
        """Return the answer to a query of the client."""
        if name == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], StoredRun(variables["name"], variables["project"]))
            run.display = variables.get("displayName") or run.display
            run.config = variables.get("config") or run.config
            run.state = variables.get("state") or run.state
            run.summary = variables.get("summaryMetrics") or run.summary
            return {"upsertBucket": {"bucket": run.as_json(), "inserted": True}}
        if name == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            return {
                "model": {
                    "id": "1",
                    "name": variables["project"],
                    "entity": {"id": "1", "name": ENTITY},
                    "bucket": run and run.as_json(),
                }
            }
        if name == "NotifyScriptableRunAlert":
            self.runs[variables["runName"]].alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{variables['run']}/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if "Viewer" in name or name == "GetDefaultEntity":
            return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "teams": {"edges": []}, "flags": "{}"}}
        if "run" in variables or "name" in variables:
            run = self.runs.get(variables.get("run") or variables.get("name"))
            return {"project": {"internalId": "1", "run": run and run.as_json()}}
        return {}

    def stream(self, name: str, content: dict) -> None:
        """Keep lines that the client appends."""
        run = self.runs[name]
        for file, part in content.get("files", {}).items():
            if file == "wandb-history.jsonl":
                for number, line in enumerate(part["content"]):
                    run.history[part["offset"] + number] = line
        if "complete" in content:
            run.state = "finished" if content.get("exitcode") == 0 else "failed"


def assert_rows(rows: list[dict], records: list[dict]) -> None:
    """Check that the rows of a history are these records, each once and in order."""
    step = 0
    assert [row["_step"] for row in rows] == list(range(len(records)))
    for row, record in zip(rows, records, strict=True):
        step = record.get("step", step)
        assert (row["step"], row["_timestamp"]) == (step, record["time"])
        figures = record.get("metrics", {})
        told = {key: float(row[key]) for key in figures}  # the client writes 1.0 as 1
        assert repr(told) == repr({key: float(value) for key, value in figures.items()})  # NaN, too
        if "event" in record:
            name, values = event_values(record)
            assert (row["event"], row[name]) == (record["event"], values)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    board: WandbServer

    def handle(self):
        self.board.connections.add(self.connection)
        with contextlib.suppress(ConnectionError):
            super().handle()
        self.board.connections.discard(self.connection)

    def do_POST(self):
        body = self._body()
        if self.headers.get("Authorization") != f"Basic {base64.b64encode(f'api:{KEY}'.encode()).decode()}":
            return self._answer(401, {"errors": [{"message": "user is not logged in"}]})
        if self.path.endswith("/file_stream"):
            self.board.requests.append("file_stream")
            self.board.stream(self.path.split("/")[-2], json.loads(body))
            return self._answer(200, {"limits": {}})
        if self.path == "/graphql":
            asked = json.loads(body)
            name = asked.get("operationName") or asked["query"].split("(")[0].split("{")[0].split()[-1]
            self.board.requests.append(name)
            return self._answer(200, {"data": self.board.graphql(name, asked.get("variables") or {})})
        self.board.requests.append(self.path)
        return self._answer(200, {})

    def do_GET(self):
        self.board.requests.append(f"GET {self.path}")
        self._answer(200, {})

    def do_PUT(self):
        body = self._body()
        _, _, run, name = self.path.split("/", 3)
        self.board.requests.append(f"PUT {name}")
        self.board.runs[run].files[name] = body
        self._answer(200, {})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass
