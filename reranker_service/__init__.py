"""A reranker served over gRPC: scores for (query, document) pairs from a vLLM or a torch engine."""
