"""Where Trackio's data lies: this machine's database, or behind the HTTP interface of a server.

A log or an alert is a dictionary as Trackio's interface (version 1) takes it. A place keeps
one row for each `log_id` and each `alert_id`, however often it is sent.
"""

from __future__ import annotations

import os
import sqlite3
from typing import Any, Protocol

from pipeline.errors import TrackError, redact
from pipeline.hub.auth import could_be_token

API_VERSION = 1
CONNECT_SECONDS, ANSWER_SECONDS = 4.0, 15.0
TOKEN_VARIABLE = "TRACKIO_WRITE_TOKEN"


class Place(Protocol):
    """All methods raise TrackError where the place does not do what it is asked."""

    def open(self) -> None:
        """Find out whether it is there."""

    def store(self, logs: list[dict], alerts: list[dict]) -> None:
        """Keep these entries of one run."""

    def count(self, project: str, run_id: str) -> tuple[int, int] | None:
        """Logs and alerts that it holds of a run; None if it cannot be asked."""


class Local:
    """The database in TRACKIO_DIR. On network file systems, as Trackio does, files that its dashboard takes in."""

    def open(self) -> None:
        from trackio import fragments, utils
        from trackio.sqlite_storage import SQLiteStorage

        mode = os.environ.get("TRACKIO_STORAGE_MODE", "auto").strip().lower()
        in_files = mode == "jsonl" or (mode != "sqlite" and utils.is_network_filesystem(utils.TRACKIO_DIR))
        self._folder, self._storage, self._fragments = utils.TRACKIO_DIR, SQLiteStorage, fragments
        self._files = fragments.FragmentWriter() if in_files else None

    def store(self, logs: list[dict], alerts: list[dict]) -> None:
        try:
            if self._files:
                records = [self._fragments.metric_record(log) for log in logs]
                self._files.write_local(records + [self._fragments.alert_record(alert) for alert in alerts])
            else:
                self._insert(logs, alerts)
        except (OSError, sqlite3.Error) as error:
            raise self._explained(error) from None

    def count(self, project: str, run_id: str) -> tuple[int, int] | None:
        if self._files:
            return None
        try:
            alerts = self._storage.get_alerts(project, run_id=run_id)
            return self._storage.get_log_count(project, run_id=run_id), len(alerts)
        except (OSError, sqlite3.Error) as error:
            raise self._explained(error) from None

    def _insert(self, logs: list[dict], alerts: list[dict]) -> None:
        run = {key: logs[0][key] for key in ("project", "run", "run_id")}
        self._storage.bulk_log(
            **run,
            metrics_list=[log["metrics"] for log in logs],
            steps=[log["step"] for log in logs],
            timestamps=[log["timestamp"] for log in logs],
            log_ids=[log["log_id"] for log in logs],
            config=logs[0].get("config"),
        )
        columns = ("title", "text", "level", "step", "timestamp", "alert_id")
        lists: dict[str, Any] = {f"{name}s": [alert[name] for alert in alerts] for name in columns}
        self._storage.bulk_alert(**run, **lists)

    def _explained(self, error: Exception) -> TrackError:
        return TrackError(f"{self._folder}: Trackio's database cannot be used ({error})")


class Server:
    """A Trackio server over HTTP, with the write token of the environment.

    Addresses that answer with a redirect are refused, for the token must not go to another one.
    """

    def __init__(self, address: str):
        self._address, self._where = address.rstrip("/"), f"track.server {address}"

    def headers(self) -> dict[str, str]:
        """Says who we are."""
        return {"x-trackio-write-token": check_write_token(self._address)}

    def open(self) -> None:
        import httpx

        limits = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        self._client = httpx.Client(headers=self.headers(), timeout=limits)
        version = self._request("GET", "version").get("api_version")
        if version != API_VERSION:
            raise TrackError(f"{self._where}: speaks version {version} of Trackio's interface, not {API_VERSION}")

    def store(self, logs: list[dict], alerts: list[dict]) -> None:
        self._call("bulk_log", logs=logs, hf_token=None)
        if alerts:
            self._call("bulk_alert", alerts=alerts, hf_token=None)

    def count(self, project: str, run_id: str) -> tuple[int, int] | None:
        summary = self._call("get_run_summary", project=project, run_id=run_id)
        return summary["num_logs"], len(self._call("get_alerts", project=project, run_id=run_id))

    def _call(self, name: str, **arguments: object) -> Any:
        return self._request("POST", f"api/{name}", {"args": [], "kwargs": arguments}).get("data")

    def _request(self, method: str, path: str, body: dict | None = None) -> dict:
        import httpx

        try:
            answer = self._client.request(method, f"{self._address}/{path}", json=body)
        except httpx.HTTPError as error:
            raise TrackError(f"{self._where}: no answer ({str(error) or type(error).__name__})") from None
        if answer.is_redirect:
            raise TrackError(f"{self._where}: moved to {answer.headers['location']}; name that address")
        try:
            content = answer.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise TrackError(f"{self._where}: no Trackio server answers there (status {answer.status_code})")
        if answer.is_error or content.get("error"):
            raise TrackError(f"{self._where}: {redact(str(content.get('error') or answer.status_code))}")
        return content


def check_write_token(address: str) -> str:
    """The write token of the environment.

    Raises:
        TrackError: where there is none, or one that no server could have given.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise TrackError(f"track.server {address}: no write token; set {TOKEN_VARIABLE} to the one that server has")
    if not could_be_token(token):
        raise TrackError(f"track.server {address}: {TOKEN_VARIABLE} is not a token; it has blanks or other signs in it")
    return token
