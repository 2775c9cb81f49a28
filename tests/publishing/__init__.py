"""Tests of publishing, in this process, with the real client against the loopback Hub."""
