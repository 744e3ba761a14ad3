"""Observing: metrics and traces of the server's work."""
