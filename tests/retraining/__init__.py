"""Tests of retraining: the decision, the Job it can be run as, and the workflows that start it."""
