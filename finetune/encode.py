"""Encode all data ahead of training, into `data.cache_dir`."""

import logging
import time
from datetime import timedelta

from finetune.config import TrainArgs
from finetune.data import CacheFill, open_checked_store
from finetune.distributed import join_world
from finetune.errors import counted
from finetune.model import build_codec, find_checkpoint, plan_model
from finetune.monitoring import format_duration, setup_logging

logger = logging.getLogger(__name__)

_REPORT_SEC = 10.0
_WAIT_FOR_OTHERS = timedelta(days=30)
"""Shares are of like length, but not of like work: of one, all may be there already. That a process
has died is noticed without it."""


def encode_data(args: TrainArgs) -> None:
    """Fill the cache with what a run of this configuration reads; what is there stays.

    Under `torchrun` the processes share the work. Stopped at any moment, it goes on where it was.

    Raises:
        UserError: a mistake in the configuration, or in the data.
    """
    world = join_world(args.device, host_timeout=_WAIT_FOR_OTHERS)
    setup_logging(world.rank)
    try:
        # Of the language model nothing but its shape is needed.
        info = find_checkpoint(args.moshi_paths, with_weights=False)
        codec = build_codec(
            info, plan_model(args, info), world.device, word_start=args.data.word_start
        )
        store = open_checked_store(args, codec, world)
        fill = CacheFill(
            args.data,
            codec,
            duration_sec=args.duration_sec,
            store=store,
            with_eval=args.do_eval,
            rank=world.rank,
            world_size=world.size,
        )
        _run(fill, args.duration_sec)
        # Hosts leave together: torchrun waits 5 minutes for the others, and then is gone.
        world.barrier()
    finally:
        world.close()


def _run(fill: CacheFill, duration_sec: float) -> None:
    logger.info("%d of %d segments are to be encoded", fill.num_missing, len(fill))
    started_at = reported_at = time.monotonic()
    num_at_start = len(fill) - fill.num_missing
    for num_done in fill:
        now = time.monotonic()
        if now >= reported_at + _REPORT_SEC:
            reported_at = now
            pace = (num_done - num_at_start) / (now - started_at)
            logger.info(
                "%d of %d segments, %.0f times as fast as they play, eta %s",
                num_done,
                len(fill),
                pace * duration_sec,
                format_duration((len(fill) - num_done) / pace),
            )
    num_alike = fill.num_missing - fill.num_encoded - fill.num_skipped
    logger.info(
        "encoded %s in %s; %s there before%s%s",
        counted(fill.num_encoded, "segment"),
        format_duration(time.monotonic() - started_at),
        counted(num_at_start, "was", "were"),
        f", {num_alike} had codes by then, as copies of others have" if num_alike else "",
        f", {fill.num_skipped} could not be read" if fill.num_skipped else "",
    )
