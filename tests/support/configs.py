"""Texts of configuration files."""

from __future__ import annotations

SMALLEST = "name: demo\nmodel: {source: user/model}\ndata: {source: tickets.jsonl}\n"
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx"
