"""From JSONL files to batches of codes."""

from .args import DataArgs
from .batches import Batch
from .codec import Codec
from .loader import EvalLoader, TrainLoader, build_eval_loader, build_train_loader
from .segments import Segment, SegmentReader
from .text import FRAME_RATE_HZ, count_frames

__all__ = [
    "FRAME_RATE_HZ",
    "Batch",
    "Codec",
    "DataArgs",
    "EvalLoader",
    "Segment",
    "SegmentReader",
    "TrainLoader",
    "build_eval_loader",
    "build_train_loader",
    "count_frames",
]
