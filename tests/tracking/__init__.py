"""Tests of events and metrics on their way to the real Trackio."""
