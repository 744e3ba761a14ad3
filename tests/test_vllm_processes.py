"""The process that becomes vLLM's engine core: its environment, and its end with its parent."""

from __future__ import annotations

import subprocess
import sys

import psutil

PARENT = """
import os, subprocess, time
from reranker_service.engines.vllm_processes import EngineCoreContext

context = EngineCoreContext()
first = context.Process(target=time.sleep, args=(0,))
first.start()  # and with it the fork server
first.join()
os.environ["SET_LATER"] = "to this"
second = context.Process(target=subprocess.run, args=(["printenv", "SET_LATER"],))
second.start()
second.join()
third = context.Process(target=time.sleep, args=(600,))
third.start()
print(third.pid, flush=True)
time.sleep(600)
"""


def test_it_has_its_parents_environment_and_ends_when_the_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "to this\n"
        child = int(parent.stdout.readline())
        processes = psutil.Process(parent.pid).children(recursive=True)
        assert child in [one.pid for one in processes]
        parent.kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
