"""Import of vLLM in the fork server; see ``vllm_processes``.

Garbage collection stays off meanwhile (a tenth of the import) and leaves the imported objects alone afterwards: writing
to them would copy their memory for each forked process.
"""

from __future__ import annotations

import gc

gc.disable()

import vllm.v1.engine.core  # noqa: E402, F401

gc.freeze()
gc.enable()
