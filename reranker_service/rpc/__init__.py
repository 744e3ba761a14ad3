"""RPCs: messages of reranker.v1 in, replies and statuses out; the only room that knows the stubs."""
