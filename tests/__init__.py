"""Tests of tunepress."""
