"""Benchmark on a GPU: rerankers of real shapes, scored by the service and by what a user would take instead.

python -m benchmarks.gpu [--shape NAME ...] [--dtype bfloat16 float16] [--tiny] [--output DIRECTORY]

Only torch, transformers and sentence-transformers are needed. Sides that need more are left out, and the log says so.
"""
