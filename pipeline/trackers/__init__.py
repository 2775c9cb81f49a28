"""Places where events are shown. Each takes the spool's records, in order."""
