"""Scheduling: admits the work of many clients into one engine.

`scheduler` gives the engine its batches, `queue` decides which job is next, `window` composes batches for an engine
that pads, `job` describes the work, and `entry` keeps the scheduler's books of it.
"""

from ..engines import EngineDeadError, TokenSequence
from .job import Job, JobResult, Ticket
from .scheduler import Scheduler

__all__ = ["EngineDeadError", "Job", "JobResult", "Scheduler", "Ticket", "TokenSequence"]
