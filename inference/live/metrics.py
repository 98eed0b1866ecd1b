"""What a live server counts, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# A frame is 80 ms: a step that takes longer is too slow to talk with.
_STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.15, 0.3, 0.6, 1.2)


class Metrics:
    """The numbers of `/metrics`.

    Args:
        slots: conversations that fit.
    """

    def __init__(self, slots: int):
        self.registry = CollectorRegistry()
        prefix, registry = "moshi_ttt", self.registry
        Gauge("slots", "Conversations that fit", namespace=prefix, registry=registry).set(slots)
        self.active = Gauge("slots_active", "Conversations held", namespace=prefix, registry=registry)
        self.steps = Histogram(
            "step_seconds",
            "Time of a step of the model and the codec for all slots with a frame waiting",
            namespace=prefix,
            registry=registry,
            buckets=_STEP_BUCKETS,
        )
        self.heard = Counter("frames", "Frames of users heard", namespace=prefix, registry=registry)
        self.dropped = Counter(
            "frames_dropped",
            "Frames that came too late: of the user (in) or of Moshi (out)",
            ["direction"],
            namespace=prefix,
            registry=registry,
        )
        self.conversations = Counter(
            "conversations", "Conversations ended, by how", ["ending"], namespace=prefix, registry=registry
        )
        self.rejected = Counter(
            "rejected", "Requests refused, by why", ["reason"], namespace=prefix, registry=registry
        )
        self.malformed = Counter(
            "malformed_messages", "Messages without sense", namespace=prefix, registry=registry
        )
        self.errors = Counter(
            "errors", "What went wrong in the server", ["kind"], namespace=prefix, registry=registry
        )
        self.sessions = Counter(
            "sessions", "Sessions saved and restored", ["what"], namespace=prefix, registry=registry
        )
        # Shown as 0 before the first.
        for direction in ("in", "out"):
            self.dropped.labels(direction)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
