"""An Ettin reranker as guide: serves it on its own device, and trains with its scores.

``python -m examples.ettin_reranker`` takes cross-encoder/ettin-reranker-150m-v1 from the hub, and
``python -m examples.ettin_reranker path/to/model`` a directory. The 17m model is faster, the 400m and the 1b model are
better. They read 8,192 tokens; ``--max-length`` cuts pairs, which costs less. ``--device cuda:1`` uses a second GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from examples.processes import ProcessError
from examples.serving import reranker_server
from examples.train import train


def main(arguments: list[str] | None = None) -> int:
    """Serve the model, and train the demo's student with it.

    Returns:
        The exit status: 0, or 1 if the server did not start.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.ettin_reranker", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "model", nargs="?", default="cross-encoder/ettin-reranker-150m-v1", help="hub name or directory"
    )
    parser.add_argument("--device", default="auto", help="device of the reranker, such as cuda:1")
    parser.add_argument("--max-length", type=int, default=256, help="maximum tokens of a pair")
    parser.add_argument("--output", default="build/trained-ettin", help="directory for the trained model")
    parser.add_argument("--tiny", action="store_true", help="train for two steps of four pairs")
    options = parser.parse_args(arguments)
    steps, batch_size = (2, 4) if options.tiny else (20, 32)
    flags = ["--model", options.model, "--device", options.device, "--max-length", str(options.max_length)]
    with tempfile.TemporaryDirectory() as directory:
        try:
            # A chain of sentence-transformers modules, which the torch engine runs.
            with reranker_server(Path(directory) / "server.log", "torch", flags) as server:
                train(server.wait_ready(), options.output, steps, batch_size)
        except ProcessError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
