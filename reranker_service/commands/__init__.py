"""Commands that ask a running server: ``reranker-service health``, ``bench`` and ``top``."""
