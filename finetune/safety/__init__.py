"""This package guards what comes in from somebody else and what goes out: files, folders, paths,
secrets, streams."""

from finetune.safety.files import (
    decode_text,
    is_recording_name,
    parse_json,
    read_json,
    read_text,
    safetensors_problem,
    stays_inside,
    with_nan,
    without_nan,
)
from finetune.safety.finite import all_finite
from finetune.safety.folders import AUDIO_SUFFIXES, all_files, find_files, kind_of
from finetune.safety.outlet import outlets
from finetune.safety.paths import not_too_long, path_problem, shown, start_of
from finetune.safety.secrets import is_secret, learn_from, learn_from_words, redact

__all__ = [
    "AUDIO_SUFFIXES",
    "all_files",
    "all_finite",
    "decode_text",
    "find_files",
    "is_recording_name",
    "is_secret",
    "kind_of",
    "learn_from",
    "learn_from_words",
    "not_too_long",
    "outlets",
    "parse_json",
    "path_problem",
    "read_json",
    "read_text",
    "redact",
    "safetensors_problem",
    "shown",
    "start_of",
    "stays_inside",
    "with_nan",
    "without_nan",
]
