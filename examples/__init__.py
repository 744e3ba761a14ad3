"""Complete programs: training against a running server, mining, and a demo that compares our loss with others."""
