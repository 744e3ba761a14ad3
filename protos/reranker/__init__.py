"""The reranker contract as Python stubs; generated from ``protos/`` by the build."""
