"""Train again when inputs changed, and publish only what is better."""
