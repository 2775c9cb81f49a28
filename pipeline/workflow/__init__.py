"""Stages of a run: each runs in a process of its own, and the ledger records which are finished."""
