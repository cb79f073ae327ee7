"""From JSONL files to batches of codes."""

from finetune.config.data_args import DataArgs

from .batches import Batch, open_store
from .codec import Codec
from .fill import CacheFill
from .loader import (
    EvalLoader,
    TrainLoader,
    build_eval_loader,
    build_train_loader,
    check_share,
)
from .segments import Segment, SegmentReader
from .text import FRAME_RATE_HZ, count_frames

__all__ = [
    "FRAME_RATE_HZ",
    "Batch",
    "CacheFill",
    "Codec",
    "DataArgs",
    "EvalLoader",
    "Segment",
    "SegmentReader",
    "TrainLoader",
    "build_eval_loader",
    "build_train_loader",
    "check_share",
    "count_frames",
    "open_store",
]
