"""Serving of Qwen3-Reranker, and ranking with the default and a custom instruction.

``python -m examples.qwen3_reranker path/to/Qwen3-Reranker-0.6B`` starts the server with the model in that directory,
ranks a few documents, and ends the server. With ``--serve`` the server runs until Ctrl-C, so that
``python -m examples.train`` in another terminal can train with it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from examples.processes import ProcessError
from examples.serving import reranker_server
from loss_client import RerankerClient

INSTRUCTION = "Given the summary of a Python function, retrieve the text that describes the function in detail"
QUERY = "Return the absolute value of a number."
DOCUMENTS = [
    "The argument may be an integer or a floating point number. If it is a complex number, its magnitude is returned.",
    "Opens the file and returns a corresponding file object. If the file cannot be opened, an OSError is raised.",
    "Rounds the number to ndigits precision after the decimal point. If ndigits is omitted, the nearest integer.",
]


def main(arguments: list[str] | None = None) -> int:
    """Serve the model and rank the documents.

    Returns:
        The exit status: 0, or 1 if the server did not start.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.qwen3_reranker", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("--engine", choices=("auto", "vllm", "torch"), default="auto", help="engine of the server")
    parser.add_argument("--serve", action="store_true", help="keep the server running until Ctrl-C")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        # A directory has no name on the hub that would say which template the model needs.
        flags = ["--model", str(options.model), "--family", "qwen3-reranker"]
        try:
            with reranker_server(Path(directory) / "server.log", options.engine, flags) as server:
                address = server.wait_ready()
                _rank(address)
                if options.serve:
                    print(f"The server is running at {address}; press Ctrl-C to end it")
                    signal.sigwait({signal.SIGINT, signal.SIGTERM})
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
