"""Fixtures that read configuration files."""

import pytest

from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    """`load(text, *settings)`: a configuration file of that text, read."""

    def load(text: str | bytes, *settings: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path, settings)

    return load


@pytest.fixture
def refusal(load):
    """`refusal(text, *settings)`: the one line with which it is refused."""

    def refusal(text: str | bytes, *settings: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *settings)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 600
        return message

    return refusal
