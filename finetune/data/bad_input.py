"""What happens to recordings that cannot be used: the run stops, or goes on without a few of them."""

import logging

logger = logging.getLogger(__name__)

ON_ERROR = ("raise", "skip")
# How many of the skipped a message names; the log has each.
_NAMED = 5


class BadInput:
    """Counts recordings that cannot be used, or refuses the first.

    Args:
        on_error: raise: the first is an error. skip: each is logged and counted.
        max_error_fraction: with skip, the largest share of all recordings that may be left out.
    """

    def __init__(self, on_error: str = "raise", max_error_fraction: float = 0.01):
        self.on_error = on_error
        self.max_error_fraction = max_error_fraction
        self.total = 0
        self.reasons: dict[str, str] = {}

    def expect(self, count: int) -> None:
        """Count recordings that are about to be looked at."""
        self.total += count

    def skip(self, name: str, error: ValueError) -> None:
        """Leave out what `name` says, or raise the error where nothing may be left out.

        Args:
            name: the line of the list or the file. It counts once, however often it fails.
        """
        if self.on_error == "raise":
            raise error
        if name not in self.reasons:
            self.reasons[name] = str(error)
            logger.warning("skipped %s", error)

    def lose(self, name: str, error: ValueError) -> None:
        """`skip` what was there when the run started; raises as well when that makes too many."""
        self.skip(name, error)
        self.require_enough()

    def require_enough(self) -> None:
        """Raise ValueError if more has been left out than may be."""
        if len(self.reasons) <= self.max_error_fraction * self.total:
            return
        first = "; ".join(list(self.reasons.values())[:_NAMED])
        raise ValueError(
            f"{self.summary()}, more than data.max_error_fraction={self.max_error_fraction:g} allows; repair "
            f"them or take them out of the list. The first: {first}"
        )

    def summary(self) -> str:
        """How many of how many cannot be used."""
        share = len(self.reasons) / max(self.total, 1)
        return f"{len(self.reasons)} of {self.total} recordings cannot be used ({share:.2%})"
