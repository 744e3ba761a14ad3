"""Command ``python -m loss_client score``: adds a reranker's scores to the rows of a file."""
