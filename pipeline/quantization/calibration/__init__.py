"""Calibration: statistics of the layers' inputs over calibration text, in a pass of one decoder block at a time."""
