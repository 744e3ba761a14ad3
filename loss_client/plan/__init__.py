"""Plan of a training run: measures a reranker, and computes the scoring time of a step for each mode of the loss."""
