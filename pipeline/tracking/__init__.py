"""Record what every stage does, and send it to experiment trackers."""
