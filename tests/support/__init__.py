"""Support for tests: the loopback Hub, a warm Python, tiny models, runs, releases and watches."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
