"""Events and metrics on their way to the real Trackio: in its database, and behind a server that comes and goes."""
