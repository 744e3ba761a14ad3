"""Baseline service: ``CrossEncoder.predict`` behind HTTP and JSON, with both texts of every pair in each request.

Requests are scored one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from aiohttp import web
from sentence_transformers import CrossEncoder

_MOST_BYTES = 64 << 20


def make_app(model: CrossEncoder) -> web.Application:
    """Make the app: ``POST /score`` with ``{"pairs": [[query, document], ...]}`` returns raw ``{"scores": [...]}``."""
    one_at_a_time = ThreadPoolExecutor(max_workers=1)

    def predict(pairs: list[tuple[str, str]]) -> list[float]:
        scores = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        return [float(score) for score in scores]

    async def score(request: web.Request) -> web.Response:
        pairs = [(query, document) for query, document in (await request.json())["pairs"]]
        scores = await asyncio.get_running_loop().run_in_executor(one_at_a_time, predict, pairs)
        return web.json_response({"scores": scores})

    app = web.Application(client_max_size=_MOST_BYTES)
    app.router.add_post("/score", score)
    return app


def main() -> None:
    """Serve a cross-encoder on a free loopback port until the process receives a signal to end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the cross-encoder")
    model = CrossEncoder(str(parser.parse_args().model), local_files_only=True)
    if torch.cuda.is_available():
        model.bfloat16()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host, port = listening.getsockname()
        # One write for the whole line, because other processes may write to the same pipe.
        print(f"event=ready address={host}:{port}\n", end="", flush=True)
        web.run_app(make_app(model), sock=listening, print=lambda _: None)


if __name__ == "__main__":
    main()
