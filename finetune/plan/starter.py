"""A first configuration for what there is, of GPUs and of data: `moshi-ttt init`."""

import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from moshi.models import loaders

from finetune.config import ModelPaths, Precision, TrainArgs, load_config, parse_sources
from finetune.data import FRAME_RATE_HZ, Entry, FileProblem, count_frames, list_entries
from finetune.errors import UserError
from finetune.kept import require_new_file, write_whole
from finetune.model import (
    exported_ttt_args,
    find_checkpoint,
    model_shape,
    plan_model,
    unused_ttt,
)
from finetune.monitoring import counting
from finetune.plan.memory import Memory, estimate, fits
from finetune.plan.plan import GB, shape_of
from finetune.plan.starter_yaml import SMALL_WIDTH, Goal, Size, Wanted, whole_gb, yaml_of
from ttt import TTTArgs, TTTLMModel

_FRAMES_A_STEP = 20_000
"""16 segments of 100 s, what the shipped examples train on at once."""
_MAX_STEPS, _MIN_STEPS, _EPOCHS = 2000, 100, 10


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
    write_whole(out, yaml_of(wanted, size, memory.peak, lengths_sec))
    yield f"its sizes are for the {source}"
    takes = f"some {whole_gb(memory.peak)} of {wanted.gpu_memory_gb:g} GB of each GPU"
    yield f"wrote {out}: it takes {takes}"
    yield from _cautions(wanted, size)
    problem = _first_problem(entries)
    if problem is not None:
        yield f"but: train will stop at these data: {problem}"
    yield from _next_steps(wanted, out, are_data_good=problem is None)


def _next_steps(wanted: Wanted, out: Path, *, are_data_good: bool) -> Iterator[str]:
    quoted = shlex.quote(str(out))
    options = f"--config {quoted} --gpus {wanted.gpus} --gpu_memory {wanted.gpu_memory_gb:g}"
    # In any folder: train.py lies in the checkout alone.
    launcher = f"torchrun --nproc-per-node {wanted.gpus} -m finetune"
    steps = [] if are_data_good else [f"moshi-ttt data check {quoted}"]
    steps += [f"moshi-ttt plan {options}"]
    steps += [f"{'moshi-ttt' if wanted.gpus == 1 else launcher} train {quoted}"]
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


def _cautions(wanted: Wanted, size: Size) -> Iterator[str]:
    """Yield what is to be known of the file before a run is started with it."""
    if size.own_ttt is not None:
        yield (
            f"note: {wanted.repo} was trained with TTT, and the run goes on from it "
            "(moshi_paths.init_from), with the values of ttt that it was trained with"
        )
    if size.is_small:
        yield (
            f"note: {wanted.repo} is far smaller than Moshi 7B ({size.width} wide), so that "
            "optim.lr, optim.ttt_lr and param_dtype are those of example/demo.yaml"
        )
    if size.attention_context is not None:
        yield (
            f"warning: attention sees {size.window_sec:g} s, which is most of a recording or all "
            "of it, so that TTT would have nothing to do: the file cuts attention to "
            f"{size.attention_context / FRAME_RATE_HZ:g} s (model.attention_context), which is an "
            "experiment, and no model to ship. --goal adapt leaves attention as it is; so does "
            f"--goal remember with recordings of more than {1.2 * size.window_sec:.0f} s"
        )
    if size.random_init:
        yield (
            f"note: {wanted.repo} has no weights of Moshi, so that all of it is trained from "
            "random ones (moshi_paths.random_init, full_finetuning)"
        )
    paths = ModelPaths(hf_repo_id=wanted.repo, random_init=size.random_init)
    if error := _missing(paths):
        yield f"but: train will end with this error: {error}"


def _missing(paths: ModelPaths) -> UserError | None:
    """Return what a local base lacks."""
    try:
        if Path(paths.hf_repo_id or "").is_dir():
            find_checkpoint(paths, is_new_run=True)
    except UserError as error:
        return error
    return None


def _own_ttt(repo: str) -> TTTArgs | None:
    """Return the TTT of a folder that `moshi-ttt export` has written with all weights, or of one
    like it; None: it has none, or is no local folder.

    Raises:
        UserError: the file is damaged, or of a later version.
    """
    file = unused_ttt(ModelPaths(hf_repo_id=repo))
    own = None if file is None else exported_ttt_args(file)
    return own if own is not None and own.enabled else None


def _begins_at_random(repo: str, width: int) -> bool:
    """Return whether a base is a small one that lacks nothing but the model's weights."""
    paths = ModelPaths(hf_repo_id=repo)
    random = ModelPaths(hf_repo_id=repo, random_init=True)
    return width < SMALL_WIDTH and _missing(paths) is not None and _missing(random) is None


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
    return list_entries(path, key)


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
            f"{data} lists no recording that has a length; "
            f"moshi-ttt data check {shlex.quote(str(data))} says why."
        )
    return np.sort(lengths)


def _fitting_size(
    wanted: Wanted, lengths_sec: np.ndarray, info: loaders.CheckpointInfo
) -> tuple[Size, Memory]:
    """Return the largest batch that fits, of segments as long as the goal wants."""
    models: dict[Precision, TTTLMModel] = {}
    peaks = []
    for size in _sizes(wanted, lengths_sec, model_shape(info)):
        args = _load(yaml_of(wanted, size, None, lengths_sec))
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


def _sizes(wanted: Wanted, lengths_sec: np.ndarray, shape: Mapping[str, Any]) -> Iterator[Size]:
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
    random_init = _begins_at_random(wanted.repo, shape["dim"])
    own_ttt = None if random_init else _own_ttt(wanted.repo)
    # In fewer bits the base is not cut, and does not train.
    ways: dict[tuple[Precision, int], None] = dict.fromkeys(
        [("bfloat16", 1), ("bfloat16", wanted.gpus)]
    )
    if not random_init:
        ways["nf4", 1] = None
    for base_precision, shard_size in ways:
        batch_size = segments_a_step
        while batch_size >= 1:
            microbatches = math.ceil(segments_a_step / batch_size)
            yield Size(
                shape["num_layers"],
                shape["dim"],
                random_init,
                window_sec,
                duration_sec,
                batch_size,
                microbatches,
                shard_size,
                max_steps,
                attention_context,
                base_precision,
                own_ttt,
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
