"""Scheduling: admits the work of many clients into one engine.

`scheduler` gives the engine its batches, `queue` decides which job is next, `window` composes batches for an engine
that pads, `share` lets bulk work proceed while interactive work never ends, `job` describes the work, `entry` keeps the
scheduler's books of it, and `watchdog` notices an engine that finishes nothing.
"""

from ..engines import EngineDeadError, EngineMemoryError, TokenSequence, WrongResultError
from .job import Job, JobResult, Ticket
from .scheduler import Scheduler
from .share import BulkShare
from .watchdog import watch_stalls

__all__ = [
    "BulkShare",
    "EngineDeadError",
    "EngineMemoryError",
    "Job",
    "JobResult",
    "Scheduler",
    "Ticket",
    "TokenSequence",
    "WrongResultError",
    "watch_stalls",
]
