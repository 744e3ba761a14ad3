"""Fuzzing and load: hostile clients against a real server process whose right scores are known in closed form.

`target` is the server with checks of its state, `messages` sends mutated messages to every RPC, `scripts` runs hostile
but valid streams, `frames` sends HTTP/2 frames that no gRPC client sends, and `load` is many clients at once.
``python -m tests.fuzz`` runs the full form; ``tests/test_fuzz.py`` is a short one.
"""
