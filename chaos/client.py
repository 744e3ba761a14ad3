"""Client in a process of its own: runs jobs until SIGTERM, and then prints its ledger.

It prints each jump of the system's clock that it sees meanwhile.

python -m chaos.client '{"addresses": [...], "side": 448}'
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time

from chaos.jobs import Jobs
from chaos.ledger import Ledger, counted_matrices
from chaos.parent import end_with_parent
from chaos.run import STALL_SECONDS, TIMEOUT_SECONDS
from loss_client import RerankerClient

_LOOK_SECONDS = 0.05
_JUMP_SECONDS = 0.5


def main() -> None:
    """Run jobs, and watch the system's clock meanwhile."""
    end_with_parent()
    task = json.loads(sys.argv[1])
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ending.set())
    ledger = Ledger()
    client = RerankerClient(task["addresses"], timeout=TIMEOUT_SECONDS, stall_timeout=STALL_SECONDS)
    with counted_matrices(), client, Jobs(client, ledger, task["side"]):
        jumps, ahead = 0, time.time() - time.monotonic()
        print(f"jumps={jumps}", flush=True)
        while not ending.wait(_LOOK_SECONDS):
            now = time.time() - time.monotonic()
            if abs(now - ahead) > _JUMP_SECONDS:
                jumps, ahead = jumps + 1, now
                print(f"jumps={jumps}", flush=True)
    print(f"ledger={json.dumps(ledger.record())}", flush=True)


if __name__ == "__main__":
    main()
