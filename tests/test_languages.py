"""The grpcurl commands of docs/languages.md, run against a real server."""

from __future__ import annotations

import os
import subprocess

import pytest

from .pages import shell_blocks
from .servers import ServerProcess
from .test_readme import GRPCURL, ROOT


@pytest.mark.parametrize("command", shell_blocks("languages.md", "grpcurl -plaintext"))
def test_the_grpcurl_commands_of_the_page_run(cross_encoder_server: ServerProcess, command: str) -> None:
    result = subprocess.run(
        ["bash", "-c", command.replace("127.0.0.1:50051", cross_encoder_server.address)],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{GRPCURL.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert '"score' in result.stdout
