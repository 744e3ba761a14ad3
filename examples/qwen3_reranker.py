"""Qwen3-Reranker as guide: serves it, ranks with the default and a custom instruction, and trains with the latter.

``python -m examples.qwen3_reranker`` takes Qwen/Qwen3-Reranker-0.6B from the hub;
``python -m examples.qwen3_reranker path/to/Qwen3-Reranker-4B`` takes a directory. The server ends with the program.
With ``--serve`` it runs until Ctrl-C instead, so that ``python -m examples.train`` in another terminal can use it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from examples.processes import ProcessError
from examples.serving import reranker_server
from examples.train import train
from loss_client import RerankerClient

INSTRUCTION = "Given the summary of a Python function, retrieve the text that describes the function in detail"
QUERY = "Return the absolute value of a number."
DOCUMENTS = [
    "The argument may be an integer or a floating point number. If it is a complex number, its magnitude is returned.",
    "Opens the file and returns a corresponding file object. If the file cannot be opened, an OSError is raised.",
    "Rounds the number to ndigits precision after the decimal point. If ndigits is omitted, the nearest integer.",
]


def main(arguments: list[str] | None = None) -> int:
    """Serve the model, rank the documents, and train the demo's student.

    Returns:
        The exit status: 0, or 1 if the server did not start.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.qwen3_reranker", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="Qwen/Qwen3-Reranker-0.6B", help="hub name or directory")
    parser.add_argument("--engine", choices=("auto", "vllm", "torch"), default="auto", help="engine of the server")
    parser.add_argument("--serve", action="store_true", help="do not train, and keep the server running until Ctrl-C")
    parser.add_argument("--output", default="build/trained-qwen3", help="directory for the trained model")
    parser.add_argument("--tiny", action="store_true", help="train for two steps of four pairs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        # A directory has no name on the hub that would say which template the model needs.
        flags = ["--model", options.model, "--family", "qwen3-reranker"]
        try:
            with reranker_server(Path(directory) / "server.log", options.engine, flags) as server:
                address = server.wait_ready()
                _rank(address)
                if options.serve:
                    print(f"The server is running at {address}; press Ctrl-C to end it")
                    signal.sigwait({signal.SIGINT, signal.SIGTERM})
                else:
                    steps, batch_size = (2, 4) if options.tiny else (20, 32)
                    train(address, options.output, steps, batch_size, INSTRUCTION)
        except ProcessError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def _rank(address: str) -> None:
    with RerankerClient(address) as client:
        info = client.model_info()
        print(f"{info.model}: at most {info.max_length} tokens, default instruction {info.default_instruction!r}")
        for instruction in (None, INSTRUCTION):
            print(f"Instruction: {instruction or 'the default'}")
            for found in client.rerank(QUERY, DOCUMENTS, instruction=instruction, return_documents=True):
                print(f"  {found.score:.3f}  {found.document}")


if __name__ == "__main__":
    sys.exit(main())
