"""What a client may do, so that no other client notices it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields


@dataclass
class LimitsConfig:
    """Limits of each conversation."""

    message_bytes: int = 16384
    """Largest message; a larger one ends the conversation. Moshi's clients send less than 1,000 bytes."""

    message_sec: float = 10.0
    """Most audio that one message may hold: a few bytes of Opus can stand for minutes."""

    messages_per_sec: float = 100.0
    """Messages a second, over any time; twice as many may come at once. More end the conversation. Moshi's
    clients send 12.5 to 50."""

    malformed: int = 20
    """Messages without sense (other kinds, text frames, broken Opus) that a conversation may hold; one more
    ends it."""

    late_sec: float = 2.0
    """Audio that may wait to be heard, or to be sent. Beyond it the oldest frames are dropped and counted."""

    idle_sec: float = 60.0
    """A conversation without audio for so long is ended."""

    session_sec: float = 3600.0
    """A conversation is ended after so long. A saved one can go on."""

    heartbeat_sec: float = 20.0
    """Time between pings; a client that does not answer one within half of it is gone."""

    leave_sec: float = 2.0
    """How long a client has to answer a goodbye."""

    def check(self) -> None:
        """Raise ValueError for a limit that lets nothing through."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0 and not (field.name == "malformed" and value == 0):
                raise ValueError(f"limits.{field.name} must be more than 0, got {value}")


class RateLimit:
    """A bucket of allowances that fills at a rate and holds two seconds' worth.

    Args:
        per_sec: the rate.
        clock: seconds.
    """

    def __init__(self, per_sec: float, clock: Callable[[], float] = time.monotonic):
        self._per_sec = per_sec
        self._clock = clock
        self._left = 2 * per_sec
        self._seen = clock()

    def allows_one(self) -> bool:
        """Take an allowance; false if there is none."""
        now = self._clock()
        self._left = min(2 * self._per_sec, self._left + (now - self._seen) * self._per_sec)
        self._seen = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
