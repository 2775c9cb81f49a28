"""The settings of experiment trackers. A tracker has a section here and an entry in `pipeline.tracking.trackers`."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Section
from pipeline.config.names import repository_id

DEFAULT_TRACKER = "trackio"


def _has_host(address: str) -> bool:
    """Return True if an address has a host and, if it has a port, a valid one."""
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _without_login(address: str, example: str) -> str:
    """Return the address of a server; refuse one with a login, because the configuration is published."""
    if not (re.match(r"https?://[^\s@?#]+\Z", address) and _has_host(address)):
        raise ValueError(f"an address such as {example}")
    return address


def _is_default(name: object) -> bool:
    """Return True for the default tracker, which is left out of files."""
    return name == DEFAULT_TRACKER


class Track(Section):
    """The settings that every experiment tracker has."""

    tracker: str = Field(default=DEFAULT_TRACKER, exclude_if=_is_default, description="experiment tracker")
    project: str = Field(
        default="tunepress", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the tracker's project"
    )

    @field_validator("tracker")
    @classmethod
    def _tracker(cls, value: str) -> str:
        if value not in TRACK_SECTIONS:
            raise ValueError(f"{value!r} is no tracker; allowed are {', '.join(TRACK_SECTIONS)}")
        return value


class TrackioSettings(Track):
    """Trackio on this machine, in a Space of the Hub, or on a server."""

    space: str | None = Field(default=None, description="USER/NAME of a Space that shows the dashboard")
    server: str | None = Field(default=None, description="address of your own Trackio server")

    @field_validator("space")
    @classmethod
    def _space(cls, value: str | None) -> str | None:
        return repository_id(value)

    @field_validator("server")
    @classmethod
    def _server(cls, value: str | None) -> str | None:
        return value and _without_login(value, "https://trackio.example.org; its token goes in TRACKIO_WRITE_TOKEN")

    @model_validator(mode="after")
    def _one_place(self) -> TrackioSettings:
        if self.space and self.server:
            raise ValueError("a Space or a server, not both")
        return self


class WandbSettings(Track):
    """Weights & Biases: its own service, your own server, or a folder for `wandb sync`."""

    tracker: Literal["wandb"] = Field(description="this tracker")
    mode: Literal["online", "offline"] = Field(
        default="online", description="`offline` writes folders that `wandb sync` sends later"
    )
    entity: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="user or team; by default that of the login"
    )
    server: str | None = Field(default=None, description="address of your own W&B server")
    folder: str = Field(default=".", min_length=1, description="parent of the folder `wandb` of offline runs")

    @field_validator("server")
    @classmethod
    def _server(cls, value: str | None) -> str | None:
        return value and _without_login(value, "https://wandb.example.org; its key goes in WANDB_API_KEY")


class MlflowSettings(Track):
    """MLflow: a tracking server, or a database on this machine."""

    tracker: Literal["mlflow"] = Field(description="this tracker")
    uri: str = Field(default="sqlite:///mlflow.db", description="`sqlite:///FILE`, or the address of a tracking server")

    @field_validator("uri")
    @classmethod
    def _uri(cls, value: str) -> str:
        if re.match(r"sqlite:///[^\s?#]+\Z", value):
            return value
        return _without_login(
            value, "sqlite:///FILE, or https://mlflow.example.org; its login is in MLFLOW_TRACKING_TOKEN"
        )


TRACK_SECTIONS: dict[str, type[Track]] = {
    DEFAULT_TRACKER: TrackioSettings,
    "wandb": WandbSettings,
    "mlflow": MlflowSettings,
}
