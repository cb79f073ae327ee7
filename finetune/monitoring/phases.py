"""The time of a step is told by its phases, and by a profile of chosen steps."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)

Mark = float | torch.cuda.Event


class Phases:
    """Times the named phases of a run; they bear the same names in a profile.

    On a GPU the time is that of the GPU, by events, and nothing waits until `seconds` is asked
    for. A phase that the process spends waiting for something else is timed by the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def phase(self, name: str, *, on_device: bool = True) -> Iterator[None]:
        """`on_device=False`: by the clock, also on a GPU."""
        on_cuda = self._on_cuda and on_device
        start = _mark(on_cuda)
        try:
            with record_function(name):
                yield
        finally:
            self._marks.append((name, start, _mark(on_cuda)))

    def clear(self) -> None:
        """Forget what was timed: a new step begins."""
        self._marks.clear()

    def seconds(self) -> dict[str, float]:
        """`NAME_sec` of every phase since `clear`; on a GPU this waits for the last of them."""
        total: dict[str, float] = {}
        for name, start, end in self._marks:
            key = f"{name}_sec"
            total[key] = total.get(key, 0.0) + _seconds_between(start, end)
        return total


def _mark(on_cuda: bool) -> Mark:
    if not on_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


class StepProfiler:
    """Writes `profile/steps_A-B.rank0.json.gz` into the run folder, for https://ui.perfetto.dev."""

    def __init__(
        self,
        steps: Sequence[int] | None,
        run_dir: Path,
        *,
        rank: int,
        num_done: int,
        num_ranks: int = 1,
        announce: Callable[[list[str]], None] = lambda names: None,
    ) -> None:
        """
        Args:
            steps: the first and the last step to profile; None: no profile.
            num_done: steps that were done before, when a run is resumed.
            num_ranks: processes that profile the same steps.
            announce: told by the first of them what files they are about to write, by their names
                in the run folder.
        """
        if steps is not None and num_done >= steps[0]:
            logger.warning(
                "profile_steps: step %d is done already, so nothing is profiled", steps[0]
            )
            steps = None
        self._steps = steps
        self._rank = rank
        self._num_ranks = num_ranks
        self._run_dir, self._announce = run_dir, announce
        self._profile: profile | None = None
        self._last_step = num_done

    def before_step(self, step: int) -> None:
        """Begin the profile if step `step`, which comes next, is chosen."""
        if self._steps is not None and step == self._steps[0]:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def after_step(self, step: int) -> None:
        """End the profile if step `step`, which is done, was its last."""
        self._last_step = step
        if self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what there is, if a step of it is done; Python crashes if it ends while a profiler
        runs."""
        if self._profile is None or self._steps is None:
            return
        self._profile.stop()
        first, last = self._steps[0], self._last_step
        if last < first:
            self._profile = None
            return
        names = [
            f"profile/steps_{first}-{last}.rank{rank}.json.gz" for rank in range(self._num_ranks)
        ]
        path = self._run_dir / names[self._rank]
        ended, self._profile = self._profile, None
        try:
            if self._rank == 0:
                self._announce(names)
            path.parent.mkdir(parents=True, exist_ok=True)
            ended.export_chrome_trace(str(path))
        except OSError as error:
            # A run of hours does not end for a picture of its steps.
            path.unlink(missing_ok=True)
            reason = error.strerror or error
            logger.error("%s could not be written: %s. Training goes on without it.", path, reason)
        else:
            what = "profile of steps %d to %d: %s (open it in ui.perfetto.dev)"
            logger.info(what, first, last, path)
