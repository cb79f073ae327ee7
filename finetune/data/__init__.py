"""This package makes batches of codes from recordings."""

from finetune.data.audio import AudioInfo, AudioReader, inspect_audio, read_audio
from finetune.data.batches import Batch, open_store
from finetune.data.codec import Codec
from finetune.data.codes import Codes, ReadCodes
from finetune.data.fill import CacheFill
from finetune.data.inspection import (
    HOP_SEC,
    Finding,
    Inspection,
    as_errors,
    in_training,
    inspect_listing,
    inspect_recording,
    num_different,
    power_of,
    wordless_speech,
    wrong_in_all,
)
from finetune.data.inspection import VERSION as INSPECTION_VERSION
from finetune.data.layouts import (
    SOURCES,
    Entry,
    MonoPair,
    Source,
    StereoFile,
    list_entries,
    list_together,
)
from finetune.data.lines import parse_line
from finetune.data.loader import (
    EvalLoader,
    TrainLoader,
    build_eval_loader,
    build_loaders,
    build_train_loader,
    check_share,
    open_checked_store,
    warn_if_shared,
)
from finetune.data.problems import FileProblem, damaged
from finetune.data.reading import Reading
from finetune.data.recording import Recording, SegmentRef
from finetune.data.segments import Segment, SegmentReader
from finetune.data.sides import Sides
from finetune.data.sources import DataSet, check_recordings, listed_recordings, load_sources
from finetune.data.text import (
    FRAME_RATE_HZ,
    TextEncoder,
    TimedTokens,
    count_frames,
    text_stream,
    tokenize_segment,
)
from finetune.data.transcripts import (
    MAIN_SPEAKER,
    OTHER_SPEAKER,
    USER_SPEAKER,
    Word,
    read_transcript,
    shared_transcripts,
)

__all__ = [
    "FRAME_RATE_HZ",
    "HOP_SEC",
    "INSPECTION_VERSION",
    "MAIN_SPEAKER",
    "OTHER_SPEAKER",
    "SOURCES",
    "USER_SPEAKER",
    "AudioInfo",
    "AudioReader",
    "Batch",
    "CacheFill",
    "Codec",
    "Codes",
    "DataSet",
    "Entry",
    "EvalLoader",
    "FileProblem",
    "Finding",
    "Inspection",
    "MonoPair",
    "ReadCodes",
    "Reading",
    "Recording",
    "Segment",
    "SegmentReader",
    "SegmentRef",
    "Sides",
    "Source",
    "StereoFile",
    "TextEncoder",
    "TimedTokens",
    "TrainLoader",
    "Word",
    "as_errors",
    "build_eval_loader",
    "build_loaders",
    "build_train_loader",
    "check_recordings",
    "check_share",
    "count_frames",
    "damaged",
    "in_training",
    "inspect_audio",
    "inspect_listing",
    "inspect_recording",
    "list_entries",
    "list_together",
    "listed_recordings",
    "load_sources",
    "num_different",
    "open_checked_store",
    "open_store",
    "parse_line",
    "power_of",
    "read_audio",
    "read_transcript",
    "shared_transcripts",
    "text_stream",
    "tokenize_segment",
    "warn_if_shared",
    "wordless_speech",
    "wrong_in_all",
]
