"""A run's estimated memory against the memory that is there, before any of the model is made.

Without this, a run that cannot fit loads for minutes and ends with an allocator's error; on a CPU
the system kills it without a word.
"""

import dataclasses
import logging
import shutil
from collections import defaultdict
from pathlib import Path

from moshi.models import loaders

from finetune.config import TrainArgs
from finetune.distributed import World
from finetune.errors import UserError
from finetune.plan.advice import no_way, ways_to_fit
from finetune.plan.available import Place, device_place, host_places
from finetune.plan.memory import Memory, estimate
from ttt import TTTLMModel

logger = logging.getLogger(__name__)

UNCERTAIN = 0.25
"""Share of an estimate's activations that may be missing in the end: on a GPU estimates were 1 to
6 % above what was measured, see docs/distributed.md; there are other shapes and other devices."""
SMALL_BYTES = 1e9
"""What takes less is never refused. The libraries alone take half of it."""
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that one process takes for certain, of memory of one kind."""

    training: float = 0.0
    checkpoint: float = 0.0
    """Copied before it is written."""

    @property
    def total(self) -> float:
        return self.training + self.checkpoint


def at_least(memory: Memory) -> float:
    """Bytes below which a training step will not stay: weights, gradients and moments, which are
    known; and of all else what the estimate cannot be wrong by."""
    # Two moments, and a gradient at least as wide as one.
    known = memory.weights + 1.5 * memory.optimizer
    return max(known, memory.peak - UNCERTAIN * (memory.kept + memory.working + memory.ttt))


def require_room(
    args: TrainArgs,
    info: loaders.CheckpointInfo,
    model: TTTLMModel,
    world: World,
    copied_bytes: float = 0.0,
    written_bytes: float = 0.0,
    num_at_once: int = 1,
    *,
    force: bool = False,
) -> None:
    """Compare what a run takes at least with what there is. All processes come to the same result.

    Args:
        model: as `plan_model` makes it, on `meta`.
        copied_bytes: that this process copies into the host's memory for a checkpoint.
        written_bytes: that a checkpoint has on the disk. It may be cleaned up meanwhile: where they
            find no room now, there is a warning.
        num_at_once: how many such are to lie there at the same time.
        force: a run that cannot fit gets a warning, and goes on.

    Raises:
        UserError: it cannot fit; names what to change.
    """
    if world.is_main:
        _warn_of_disk(args, written_bytes, num_at_once)
    memory = estimate(args, model, world.size)
    on_gpu = world.device.type == "cuda"
    training = at_least(memory)
    on_host = Need(0.0 if on_gpu else training, copied_bytes)
    places = [(place, on_host) for place in host_places()]
    if on_gpu:
        places.insert(0, (device_place(world.device), Need(training)))
    shared: dict[str, list[tuple[Place, Need]]] = defaultdict(list)
    for each in world.gather(places):
        for place, need in each:
            shared[place.key].append((place, need))
    for users in shared.values():
        # Processes look one after the other, and what they see need not be the same.
        place = min((place for place, _ in users), key=lambda place: place.free_bytes)
        total = sum(need.total for _, need in users)
        if total > max(place.free_bytes, SMALL_BYTES * len(users)):
            problem = _explain(args, info, model, world, memory, place, [n for _, n in users])
            if not force:
                raise UserError(f"{problem} --force on the command line tries it all the same.")
            if world.is_main:
                logger.warning("%s It is tried all the same (--force).", problem)
            return


def _warn_of_disk(args: TrainArgs, num_bytes: float, num_at_once: int) -> None:
    run_dir = Path(args.run_dir)
    folder = next((each for each in (run_dir, *run_dir.parents) if each.is_dir()), run_dir)
    free_bytes = shutil.disk_usage(folder).free
    if num_at_once * num_bytes <= free_bytes:
        return
    if num_bytes > free_bytes:
        logger.warning(
            "run_dir: a checkpoint takes %.2f GB, and %.2f GB are free on the disk of %s: free "
            "some space before the first one is saved (ckpt_freq: %d), or name another folder.",
            num_bytes / GB,
            free_bytes / GB,
            run_dir,
            args.ckpt_freq,
        )
    else:
        logger.warning(
            "run_dir: %d more checkpoints of %.2f GB are to lie there at once (num_ckpt_keep: %s), "
            "and %.2f GB are free on the disk of %s, which is enough for %d: free some space until "
            "then, keep fewer, or name another folder.",
            num_at_once,
            num_bytes / GB,
            "null" if args.num_ckpt_keep is None else args.num_ckpt_keep,
            free_bytes / GB,
            run_dir,
            free_bytes // num_bytes,
        )


def _explain(
    args: TrainArgs,
    info: loaders.CheckpointInfo,
    model: TTTLMModel,
    world: World,
    memory: Memory,
    place: Place,
    needs: list[Need],
) -> str:
    """Return what does not fit where, and what to change."""
    training = sum(need.training for need in needs)
    checkpoint = sum(need.checkpoint for need in needs)
    parts = ", ".join(
        f"{field.name} {getattr(memory, field.name) / GB:.1f}"
        for field in dataclasses.fields(memory)
        if getattr(memory, field.name) >= 0.05 * GB
    )
    each = " each" if len(needs) > 1 else ""
    takes = []
    if training:
        takes.append(f"training at least {training / GB:.1f} GB (estimated{each}: {parts})")
    if checkpoint:
        takes.append(f"the copy of a checkpoint {checkpoint / GB:.1f} GB")
    who = f"{len(needs)} processes take" if len(needs) > 1 else "it takes"
    ways, on_gpu = [], world.device.type == "cuda"
    if training:

        def is_enough(then: Memory) -> bool:
            # A checkpoint is of what trains, as the moments are.
            copied = checkpoint * then.optimizer / memory.optimizer
            return len(needs) * then.peak + copied <= place.free_bytes

        ways += ways_to_fit(args, model, info, world.size, is_enough, on_gpu=on_gpu)
    if checkpoint and training <= place.free_bytes:
        ways += ["ckpt_async: false (training waits)"] if args.ckpt_async else []
        ways += ["do_ckpt: false"]
    if ways:
        remedy = f"Change one of: {'; '.join(ways)}"
    else:
        said, _ = no_way(args, model, info, world.size, on_gpu=on_gpu)
        remedy = f"Here {said}{', in each process' * (len(needs) > 1)}"
    return (
        f"this run cannot fit into {place.name}: {place.free_bytes / GB:.1f} GB are free, and "
        f"{who} for {' and '.join(takes)}. {remedy}."
    )
