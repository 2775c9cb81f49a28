"""Tests of grids, roundings and formats."""
