"""From recordings to batches of codes."""

from finetune.data.audio import AudioInfo, inspect_audio, read_audio
from finetune.data.batches import Batch, open_store
from finetune.data.codec import Codec
from finetune.data.fill import CacheFill
from finetune.data.loader import (
    EvalLoader,
    TrainLoader,
    build_eval_loader,
    build_train_loader,
    check_share,
)
from finetune.data.problems import FileProblem
from finetune.data.segments import Segment, SegmentReader
from finetune.data.sources import Recording, check_recordings, load_sources, parse_sources
from finetune.data.text import (
    FRAME_RATE_HZ,
    Word,
    count_frames,
    read_transcript,
    text_stream,
    tokenize_segment,
)

__all__ = [
    "FRAME_RATE_HZ",
    "AudioInfo",
    "Batch",
    "CacheFill",
    "Codec",
    "EvalLoader",
    "FileProblem",
    "Recording",
    "Segment",
    "SegmentReader",
    "TrainLoader",
    "Word",
    "build_eval_loader",
    "build_train_loader",
    "check_recordings",
    "check_share",
    "count_frames",
    "inspect_audio",
    "load_sources",
    "open_store",
    "parse_sources",
    "read_audio",
    "read_transcript",
    "text_stream",
    "tokenize_segment",
]
