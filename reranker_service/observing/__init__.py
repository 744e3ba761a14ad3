"""Observing: metrics and traces of the server's work. Every room may report to it; it knows none of them."""
