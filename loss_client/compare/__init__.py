"""Command ``python -m loss_client compare``: trains with and without a reranker, and compares the models."""
