"""Numbers of a running server, as Prometheus reads them."""

from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_STEP_BUCKETS_SEC = (
    0.005,
    0.01,
    0.02,
    0.03,
    0.04,
    0.05,
    0.06,
    0.07,
    0.08,
    0.1,
    0.15,
    0.25,
    0.5,
    1,
    5,
)


class ServerMetrics:
    """The metrics of one server; none of them holds anything that a caller says or hears."""

    def __init__(self, num_callers: Callable[[], int], state_bytes: int, max_users: int) -> None:
        """Make all metrics, at zero.

        Args:
            num_callers: says how many there are.
            state_bytes: what the conversations of all rows take.
        """
        self.registry = registry = CollectorRegistry()
        self.step_seconds = Histogram(
            "moshi_ttt_step_seconds",
            "One frame of all callers who have one: Mimi in, model, Mimi out.",
            buckets=_STEP_BUCKETS_SEC,
            registry=registry,
        )
        self.frames = Counter("moshi_ttt_frames", "Frames heard of all callers.", registry=registry)
        self.late_frames = Counter(
            "moshi_ttt_late_frames",
            "Frames that were not there when they were due.",
            registry=registry,
        )
        self.dropped_frames = Counter(
            "moshi_ttt_dropped_frames",
            "Frames that nobody heard: of callers who left, or late ones after a silence instead.",
            registry=registry,
        )
        self.refused = Counter(
            "moshi_ttt_refused", "Callers who were refused.", ["reason"], registry=registry
        )
        for reason in ("full", "token", "origin", "host", "draining", "failed", "format"):
            self.refused.labels(reason)
        self.malformed = Counter(
            "moshi_ttt_malformed_messages", "Messages of no meaning.", registry=registry
        )
        callers = Gauge("moshi_ttt_callers", "Callers now.", registry=registry)
        callers.set_function(num_callers)
        Gauge("moshi_ttt_max_callers", "Callers at most.", registry=registry).set(max_users)
        state = "State of all conversations: fast weights, attention caches, Mimi."
        Gauge("moshi_ttt_state_bytes", state, registry=registry).set(state_bytes)
        memory = Gauge("moshi_ttt_gpu_memory_bytes", "Memory in use on the GPU.", registry=registry)
        memory.set_function(_gpu_memory_bytes)

    def page(self) -> bytes:
        return generate_latest(self.registry)


def _gpu_memory_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
