"""RPCs: answers the calls of reranker.v1; the only room that knows the stubs, statuses and field names."""
