"""A first configuration for what there is, of GPUs and of data: `moshi-ttt init`."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from moshi.models import loaders

from finetune.config import ModelPaths, Precision, TrainArgs, load_config, parse_sources
from finetune.data import FRAME_RATE_HZ, Entry, FileProblem, count_frames, open_source
from finetune.errors import UserError, counted
from finetune.kept import require_new_file, write_whole
from finetune.model import find_checkpoint, model_shape, plan_model
from finetune.monitoring import counting
from finetune.plan.memory import Memory, estimate, fits
from finetune.plan.plan import GB, shape_of
from ttt import TTTLMModel
from ttt.config import TTTArgs

Goal = Literal["remember", "adapt"]

_FRAMES_A_STEP = 20_000
"""16 segments of 100 s, what the shipped examples train on at once."""
_CHUNK_FRAMES = 256
_FEWEST_TTT_LAYERS = 2
"""With fewer by default, every other layer of a model has TTT."""
_MAX_STEPS, _MIN_STEPS, _EPOCHS = 2000, 100, 10
_SMALL_WIDTH = 2048
"""Models that are narrower learn with far larger rates than Moshi 7B, which is 4096 wide."""
_SMALL_EXAMPLE = "Such models learn with some 2e-3, and on a CPU in float32 (example/demo.yaml)"


@dataclass(frozen=True)
class Wanted:
    """Wishes that a configuration is made for.

    Args:
        repo: where Moshi's weights are.
        eval_data: None: there is none.
    """

    data: Path
    eval_data: Path | None
    goal: Goal
    gpus: int
    gpu_memory_gb: float
    run_dir: Path
    repo: str


@dataclass(frozen=True)
class _Size:
    """Sizes that depend on memory, on data and on the model."""

    num_layers: int
    width: int
    window_sec: float
    """What attention sees."""
    duration_sec: int
    batch_size: int
    num_microbatches: int
    shard_size: int
    max_steps: int
    attention_context: int | None
    base_precision: Precision


def write_config(wanted: Wanted, out: Path) -> Iterator[str]:
    """Write a commented YAML file that fits the memory. Yields lines to print.

    Raises:
        UserError: `out` is there already, the data or the model cannot be found, or nothing fits.
    """
    require_new_file(out)
    lengths_sec = recording_lengths("--data", wanted.data)
    entries = _entries("--data", wanted.data)
    if wanted.eval_data is not None:
        entries += _entries("--eval_data", wanted.eval_data)
    info, source = shape_of(ModelPaths(hf_repo_id=wanted.repo), key="--repo")
    size, memory = _fitting_size(wanted, lengths_sec, info)
    write_whole(out, _text(wanted, size, memory, lengths_sec))
    yield f"its sizes are for the {source}"
    yield (
        f"wrote {out}: it takes some {memory.peak / GB:.0f} of {wanted.gpu_memory_gb:g} GB of each "
        "GPU"
    )
    yield from (f"but: {caution}" for caution in _cautions(wanted, size))
    problem = _first_problem(entries)
    if problem is not None:
        yield f"but: train will stop at these data: {problem}"
    yield from _next_steps(wanted, out, are_data_good=problem is None)


def _next_steps(wanted: Wanted, out: Path, *, are_data_good: bool) -> Iterator[str]:
    options = f"--config {out} --gpus {wanted.gpus} --gpu_memory {wanted.gpu_memory_gb:g}"
    # In any folder: train.py lies in the checkout alone.
    launcher = f"torchrun --nproc-per-node {wanted.gpus} -m finetune"
    steps = [] if are_data_good else [f"moshi-ttt data check {out}"]
    steps += [f"moshi-ttt plan {options}"]
    steps += [f"{'moshi-ttt' if wanted.gpus == 1 else launcher} train {out}"]
    for number, step in enumerate(steps):
        yield f"{'then' if number else 'next'}: {step}"


def _first_problem(entries: Sequence[Entry]) -> str | None:
    """Return what stands in the way of training and can be seen without listening: a line that
    names no recording, files that are not there, or words that cannot be read."""
    with counting("reading transcripts", len(entries)) as advance:
        for entry in entries:
            if entry.recording is None:
                return f"{entry.origin}: {entry.problem}"
            try:
                gone = [each for each in entry.recording.audio_files if not each.exists()]
                entry.recording.read_words()
            except FileProblem as problem:
                return f"{entry.origin}: {problem}"
            if gone:
                return f"{entry.origin}: there is no file {gone[0]}; correct the path."
            advance()
    return None


def _cautions(wanted: Wanted, size: _Size) -> Iterator[str]:
    """Yield what is to be known of the file before a run is started with it."""
    if Path(wanted.repo).is_dir():
        try:
            find_checkpoint(ModelPaths(hf_repo_id=wanted.repo), is_new_run=True)
        except UserError as error:
            yield f"train will end with this error: {error}"
    if size.width < _SMALL_WIDTH:
        yield (
            f"optim.lr, optim.ttt_lr and param_dtype are those of Moshi 7B, and {wanted.repo} is "
            f"far smaller ({size.width} wide). {_SMALL_EXAMPLE}."
        )


def _entries(key: str, path: Path) -> list[Entry]:
    """Return what a configuration reads that names a path as its data.

    Raises:
        UserError: it would read several paths, or another; or nothing is there to read.
    """
    text = os.fspath(path)
    if parse_sources(text, key) != [(path, 1.0)]:
        raise UserError(
            f"{key}: {text} cannot stand in a configuration, where a comma separates paths, a "
            "number after a colon is a weight, and ~ is a home folder. Give it another name, or a "
            "link."
        )
    return open_source(path, key).entries()


def recording_lengths(key: str, data: Path) -> np.ndarray:
    """Return how many seconds the recordings have, as the lines of the data promise, sorted.

    Args:
        key: what has named the data, for messages.

    Raises:
        UserError: a configuration would read another path, or nothing is there that has a length.
    """
    entries = _entries(key, data)
    lengths = []
    with counting("measuring", len(entries)) as advance:
        for entry in entries:
            if entry.recording is not None:
                # Where the listing does not say how long a recording is, its header does.
                length = entry.recording.duration_sec or entry.recording.inspect().duration_sec
                lengths.append(length)
            advance()
    lengths = [length for length in lengths if length > 0]
    if not lengths:
        raise UserError(
            f"{data} lists no recording that has a length; moshi-ttt data check {data} says why."
        )
    return np.sort(lengths)


def _fitting_size(
    wanted: Wanted, lengths_sec: np.ndarray, info: loaders.CheckpointInfo
) -> tuple[_Size, Memory]:
    """Return the largest batch that fits, of segments as long as the goal wants."""
    models: dict[Precision, TTTLMModel] = {}
    peaks = []
    for size in _sizes(wanted, lengths_sec, model_shape(info)):
        args = _load(_text(wanted, size, None, lengths_sec))
        # All else leaves its shape as it is.
        if size.base_precision not in models:
            models[size.base_precision] = plan_model(args, info)
        memory = estimate(args, models[size.base_precision], wanted.gpus)
        if fits(memory, wanted.gpu_memory_gb * GB):
            return size, memory
        peaks.append(memory.peak)
    raise UserError(
        f"Moshi does not fit: at the least it takes {min(peaks) / GB:.1f} GB of each GPU, with "
        f"room of CUDA's own beside it. Raise --gpu_memory or --gpus."
    )


def _load(text: str) -> TrainArgs:
    with TemporaryDirectory() as folder:
        path = Path(folder, "init.yaml")
        path.write_text(text, encoding="utf-8")
        return load_config(path)


def _sizes(wanted: Wanted, lengths_sec: np.ndarray, shape: Mapping[str, Any]) -> Iterator[_Size]:
    """Yield sizes, those that are to be preferred first, for a model of this shape."""
    window_sec = shape["context"] / FRAME_RATE_HZ
    duration_sec, attention_context = _segment(wanted.goal, lengths_sec, window_sec)
    num_frames = count_frames(duration_sec)
    # A rest of less than half a segment, which is mostly padding, is none.
    num_segments = int(np.maximum(1, np.round(lengths_sec / duration_sec)).sum())
    most = max(1, num_segments // wanted.gpus)
    segments_a_step = min(max(1, round(_FRAMES_A_STEP / num_frames)), most)
    segments_a_step = 2 ** int(math.log2(segments_a_step))
    steps = math.ceil(_EPOCHS * num_segments / (segments_a_step * wanted.gpus))
    max_steps = min(max(steps, _MIN_STEPS), _MAX_STEPS)
    # In fewer bits the base is not cut.
    ways: dict[tuple[Precision, int], None] = dict.fromkeys(
        [("bfloat16", 1), ("bfloat16", wanted.gpus), ("nf4", 1)]
    )
    for base_precision, shard_size in ways:
        batch_size = segments_a_step
        while batch_size >= 1:
            microbatches = math.ceil(segments_a_step / batch_size)
            yield _Size(
                shape["num_layers"],
                shape["dim"],
                window_sec,
                duration_sec,
                batch_size,
                microbatches,
                shard_size,
                max_steps,
                attention_context,
                base_precision,
            )
            batch_size //= 2


def _segment(goal: Goal, lengths_sec: np.ndarray, window_sec: float) -> tuple[int, int | None]:
    """Return how long segments are, in seconds, and what attention may see of them, in frames."""
    typical_sec = float(np.quantile(lengths_sec, 0.5))
    if goal == "adapt":
        return max(4, math.ceil(min(100.0, typical_sec))), None
    if typical_sec > 1.2 * window_sec:
        return math.ceil(min(600.0, typical_sec)), None
    # Attention would see all of them, and TTT would have nothing to do.
    duration_sec = max(4, math.ceil(typical_sec))
    return duration_sec, max(1, count_frames(duration_sec) // 3)


def _chunk_frames(num_frames: int) -> int:
    """Return how many frames a chunk has, so that some eight are in a segment."""
    return min(_CHUNK_FRAMES, max(5, num_frames // 8))


def _text(wanted: Wanted, size: _Size, memory: Memory | None, lengths_sec: np.ndarray) -> str:
    """Return the YAML, with comments."""
    num_frames = count_frames(size.duration_sec)
    size_of_data = f"{counted(len(lengths_sec), 'recording')}, {lengths_sec.sum() / 3600:.2f} h"
    peak = f", some {memory.peak / GB:.0f} GB at the peak" if memory else ""
    lines = [
        f"# Made by moshi-ttt init: to {wanted.goal}, on {wanted.gpus} x {wanted.gpu_memory_gb:g} "
        f"GB{peak}.",
        "# moshi-ttt config KEY explains a key; docs/configuration.md has all of them.",
        "",
        "data:",
        f"  train_data: {_quoted(wanted.data)}   # {size_of_data}",
    ]
    if wanted.eval_data is not None:
        lines.append(f"  eval_data: {_quoted(wanted.eval_data)}")
    lines += [
        "  shuffle: true",
        "  cache_dir: data/codes   # keeps Mimi's codes, so that audio is encoded only once",
        "",
        f"run_dir: {_quoted(wanted.run_dir)}",
        "",
        "moshi_paths:",
        f"  hf_repo_id: {_quoted(wanted.repo)}",
        "",
        "lora:",
        "  enable: true",
        "  rank: 128",
        "  scaling: 2.",
        "",
    ]
    lines += _ttt_lines(wanted.goal, num_frames, size.num_layers)
    if size.attention_context is not None:
        lines += [
            "# Most recordings are hardly longer than what attention sees "
            f"({size.window_sec:g} s), so that TTT would",
            "# have nothing to do. Attention is cut to a third of a segment: an experiment, no "
            "model to ship. With",
            f"# recordings of more than {1.2 * size.window_sec:.0f} s, remove this and make "
            "segments as long.",
            "model:",
            f"  attention_context: {size.attention_context}",
            "",
        ]
    lines += [
        f"duration_sec: {size.duration_sec}   # {num_frames} frames a segment",
        f"batch_size: {size.batch_size}   # segments a GPU at once: what memory has room for",
        f"num_microbatches: {size.num_microbatches}   # passes a step",
        f"max_steps: {size.max_steps}",
        "",
        "gradient_checkpointing: true",
        "selective_layers: 0   # more is faster, where memory allows it: plan says how many",
        *_precision_lines(size),
        "first_codebook_weight_multiplier: 100.",
        "text_padding_weight: .5",
        "optim:",
        "  lr: 2e-6       # LoRA",
        "  ttt_lr: 3e-4   # TTT parameters, which start from nothing",
        "",
        f"do_eval: {str(wanted.eval_data is not None).lower()}",
        "eval_freq: 100",
        "ckpt_freq: 100",
    ]
    if size.shard_size > 1:
        lines += [
            "",
            "parallel:",
            f"  shard_size: {size.shard_size}   # the GPUs share one copy of the model",
        ]
    return "\n".join(lines) + "\n"


def _precision_lines(size: _Size) -> list[str]:
    small = [f"# {_SMALL_EXAMPLE}:"] if size.width < _SMALL_WIDTH else []
    base = f"base_precision: {size.base_precision}   # 4.5 bits a frozen weight: all 16 do not fit"
    lines = [*small, "param_dtype: bfloat16", base]
    return lines[:-1] if size.base_precision == "bfloat16" else lines


def _ttt_lines(goal: Goal, num_frames: int, num_layers: int) -> list[str]:
    if goal == "adapt":
        return ["ttt:", "  enabled: false   # true: see moshi-ttt init --goal remember", ""]
    chunk = _chunk_frames(num_frames)
    return [
        "ttt:",
        "  enabled: true",
        "  method: in_place",
        *_layer_lines(num_layers),
        "  write: delta   # stays bounded on streams much longer than the segments",
        f"  chunk_size: {chunk}   # frames between two updates: {chunk / FRAME_RATE_HZ:.1f} s",
        "",
    ]


def _layer_lines(num_layers: int) -> list[str]:
    """Return which layers have TTT, where the defaults, which are for Moshi 7B, have too few."""
    default = TTTArgs()
    if len(range(default.start_layer, num_layers, default.layer_frequency)) >= _FEWEST_TTT_LAYERS:
        return []
    start = min(1, num_layers - 1)
    return [
        f"  start_layer: {start}   # of {num_layers} layers, every other one",
        "  layer_frequency: 2",
    ]


def _quoted(value: object) -> str:
    text = os.fspath(value) if isinstance(value, Path) else str(value)
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
