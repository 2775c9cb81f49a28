"""What tests share: the loopback Hub, a warm Python, and watchers."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
