"""Places for Trackio's data: the database on this machine, or a server with an HTTP interface.

A log or an alert is a dictionary as Trackio's interface (version 1) takes it. A place stores
one row for each `log_id` and each `alert_id`, however often it is sent.
"""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.errors import TrackError, redact
from pipeline.hub.auth import could_be_token
from pipeline.system.files import write_bytes

API_VERSION = 1
CONNECT_SECONDS, ANSWER_SECONDS = 4.0, 15.0
TOKEN_VARIABLE = "TRACKIO_WRITE_TOKEN"


@dataclass(frozen=True)
class Picture:
    """A picture that a log names.

    Attributes:
        name: its file name, the same whenever it is sent.
        png: its content.
    """

    project: str
    run: str
    step: int
    name: str
    png: bytes

    def logged(self, caption: str) -> dict:
        """Return the value that stands for the picture in a log, as Trackio writes it."""
        from trackio.media.image import TrackioImage
        from trackio.utils import canonical_project_name

        path = f"{canonical_project_name(self.project)}/{self.run}/{self.step}/{self.name}"
        return {"_type": TrackioImage.TYPE, "file_path": path, "caption": caption}


class Place(Protocol):
    """A place for Trackio's data. All methods raise TrackError if the place does not answer or refuses."""

    def open(self) -> None:
        """Connect to the place."""

    def store(self, logs: list[dict], alerts: list[dict], pictures: list[Picture]) -> None:
        """Store entries of one run, and first the pictures that they name."""

    def count(self, project: str, run_id: str) -> tuple[int, int] | None:
        """Return how many logs and alerts of a run are stored; None if that is unknown."""

    def close(self) -> None:
        """End the connection."""


class Local:
    """The database in TRACKIO_DIR; on a network file system, files that Trackio's dashboard imports."""

    def open(self) -> None:
        """Import Trackio, and choose between database and files as Trackio does."""
        from trackio import fragments, utils
        from trackio.media.utils import get_project_media_path
        from trackio.sqlite_storage import SQLiteStorage

        mode = os.environ.get("TRACKIO_STORAGE_MODE", "auto").strip().lower()
        in_files = mode == "jsonl" or (mode != "sqlite" and utils.is_network_filesystem(utils.TRACKIO_DIR))
        self._folder, self._storage, self._fragments = utils.TRACKIO_DIR, SQLiteStorage, fragments
        self._media_folder = get_project_media_path
        self._files = fragments.FragmentWriter() if in_files else None

    def store(self, logs: list[dict], alerts: list[dict], pictures: list[Picture]) -> None:
        """Store entries of one run, and first the pictures that they name."""
        try:
            for picture in pictures:
                write_bytes(self._media_folder(picture.project, picture.run, picture.step) / picture.name, picture.png)
            if self._files:
                records = [self._fragments.metric_record(log) for log in logs]
                self._files.write_local(records + [self._fragments.alert_record(alert) for alert in alerts])
            else:
                self._insert(logs, alerts)
        except (OSError, sqlite3.Error) as error:
            raise self._explained(error) from None

    def count(self, project: str, run_id: str) -> tuple[int, int] | None:
        """Return how many logs and alerts of a run are stored; None of files, which Trackio imports later."""
        if self._files:
            return None
        try:
            alerts = self._storage.get_alerts(project, run_id=run_id)
            return self._storage.get_log_count(project, run_id=run_id), len(alerts)
        except (OSError, sqlite3.Error) as error:
            raise self._explained(error) from None

    def close(self) -> None:
        """Do nothing: the database is opened for each access."""

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

    An address that redirects is refused, because the token must not go to another address.
    """

    def __init__(self, address: str):
        self._address, self._label = address.rstrip("/"), f"track.server {address}"

    def headers(self) -> dict[str, str]:
        """Return the headers with the token."""
        return {"x-trackio-write-token": check_write_token(self._address)}

    def open(self) -> None:
        """Connect, and check the version of the interface."""
        import httpx

        limits = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        self._client = httpx.Client(headers=self.headers(), timeout=limits)
        version = self._request("GET", "version").get("api_version")
        if version != API_VERSION:
            raise TrackError(f"{self._label}: has version {version} of Trackio's interface, not {API_VERSION}")

    def store(self, logs: list[dict], alerts: list[dict], pictures: list[Picture]) -> None:
        """Store entries of one run, and first the pictures that they name."""
        for picture in pictures:
            self._upload(picture)
        self._call("bulk_log", logs=logs, hf_token=None)
        if alerts:
            self._call("bulk_alert", alerts=alerts, hf_token=None)

    def count(self, project: str, run_id: str) -> tuple[int, int] | None:
        """Return how many logs and alerts of a run are stored."""
        summary = self._call("get_run_summary", project=project, run_id=run_id)
        return summary["num_logs"], len(self._call("get_alerts", project=project, run_id=run_id))

    def close(self) -> None:
        """Close the HTTP connections."""
        self._client.close()

    def _upload(self, picture: Picture) -> None:
        """Store a picture; sent again, it takes the place of the same picture."""
        (staged,) = self._request("POST", "api/upload", files={"files": (picture.name, picture.png)})["paths"]
        upload = {
            "project": picture.project,
            "run": picture.run,
            "step": picture.step,
            "relative_path": None,
            "uploaded_file": {"path": staged, "orig_name": picture.name},
        }
        self._call("bulk_upload_media", uploads=[upload], hf_token=None)

    def _call(self, name: str, **arguments: object) -> Any:
        return self._request("POST", f"api/{name}", json={"args": [], "kwargs": arguments}).get("data")

    def _request(self, method: str, path: str, **body: Any) -> dict:
        import httpx

        try:
            answer = self._client.request(method, f"{self._address}/{path}", **body)
        except httpx.HTTPError as error:
            raise TrackError(f"{self._label}: no answer ({str(error) or type(error).__name__})") from None
        if answer.is_redirect:
            location = answer.headers["location"]
            raise TrackError(f"{self._label}: moved to {location}. Try: --set track.server={location}")
        try:
            content = answer.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise TrackError(f"{self._label}: no Trackio server answers at this address (status {answer.status_code})")
        if answer.is_error or content.get("error"):
            raise TrackError(f"{self._label}: {redact(str(content.get('error') or answer.status_code))}")
        return content


def check_write_token(address: str) -> str:
    """Return the write token of the environment.

    Raises:
        TrackError: if it is missing, or contains invalid characters.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise TrackError(f"track.server {address}: no write token. Try: export {TOKEN_VARIABLE}=TOKEN_OF_THAT_SERVER")
    if not could_be_token(token):
        raise TrackError(
            f"track.server {address}: the write token contains invalid characters. Try: export {TOKEN_VARIABLE}=TOKEN"
        )
    return token
