"""Tests of the workflow: its stages, its ledger, and whole runs in this process."""
