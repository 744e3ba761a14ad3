"""Version 1 of the contract: ``reranker_pb2`` (messages) and ``reranker_pb2_grpc`` (service)."""
