"""Retraining of a published model: train if its inputs changed, and publish only a better model."""
