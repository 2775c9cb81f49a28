"""Publishing, against the hub on loopback and with the real client, in this process."""
