"""Commands that talk to a running server: ``reranker-service bench`` and ``reranker-service top``."""
