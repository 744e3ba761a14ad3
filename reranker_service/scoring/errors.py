"""Errors of scoring. The RPC layer turns each of them into a status."""

from __future__ import annotations


class ScoringError(Exception):
    """Pairs could not be scored; the message is for the client."""


class OverLongError(ScoringError):
    """Input is over-long, and the options say to reject such input."""

    def __init__(self, found: str, max_length: int) -> None:
        """Make the error.

        Args:
            found: The over-long input, and its length.
            max_length: The length limit in tokens.
        """
        super().__init__(
            f"{found}; the limit is {max_length} tokens: shorten the texts, raise max_length, or leave over_long at "
            "OVER_LONG_TRUNCATE"
        )


class TooShortLimitError(ScoringError):
    """The length limit leaves no room for the texts beside the template."""


class EngineFailedError(ScoringError):
    """The engine is dead, and the process is about to end."""


class OutOfMemoryError(ScoringError):
    """The memory of the engine's device does not suffice for a pair; the same pair would fail again."""
