"""One server of several: runs a module, and ends when the process that started it ends.

python -m reranker_service.replica PARENT MODULE [FLAG ...]
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the system send SIGTERM to this process when its parent ends, even if that is killed; on Linux only.

    Without it, a killed supervisor would leave servers behind that hold their ports and GPUs.

    Args:
        parent: Process id of the parent.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before this call
        sys.exit(1)


def main() -> None:
    """Run the module as ``python -m`` does."""
    parent, module, *flags = sys.argv[1:]
    end_with_parent(int(parent))
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
