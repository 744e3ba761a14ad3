"""Complete programs: a training run against a running server, and the demo that compares it with the usual losses."""
