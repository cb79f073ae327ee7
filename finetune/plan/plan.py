"""A plan says what a run will take before it is paid for: memory, steps, tokens, hours.

The model is made of `meta` tensors: no weights are read, no GPU is needed.
"""

import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moshi.models import loaders

from finetune.config import ModelPaths, TrainArgs
from finetune.data import DataSet, Reading, Recording, count_frames, load_sources
from finetune.distributed import shard_size
from finetune.errors import UserError, counted
from finetune.model import find_checkpoint, plan_model, read_codes_of, shape_from_hub
from finetune.monitoring import format_count, format_duration
from finetune.plan.advice import no_way, way_to_speed, ways_to_fit
from finetune.plan.describe import cautions_of_steps, describe_roles
from finetune.plan.memory import Memory, estimate, fits, smallest_gpu_gb
from finetune.plan.speed import StepTime, step_time
from finetune.plan.ttt_updates import cautions_of_ttt, describe_ttt
from finetune.safety import read_json
from ttt import TTTLMModel, state_bytes
from ttt.layers import layer_class

GB = 1e9

_NO_SHAPE = (
    *("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name", "model_type"),
    *("lm_gen_config", "tts_config", "stt_config", "model_id"),
)


class Verdict(NamedTuple):
    """A verdict says whether a run fits, and what else `train` would end with."""

    fits: bool
    problems: list[str]


_Lines = Generator[str, None, list[str]]
"""Lines to print; returned is what `train` would end with."""


def plan(
    args: TrainArgs, *, num_gpus: int, gpu_memory_gb: float | None, memory_only: bool = False
) -> Generator[str, None, Verdict]:
    """Yield lines to print, and return whether the run can be trained.

    Args:
        gpu_memory_gb: None: there is no GPU that it is to fit into.
        memory_only: nothing else is looked at: no data, and no files of the base.

    Raises:
        UserError: an impossible configuration.
    """
    info, source = shape_of(args.moshi_paths)
    model = plan_model(args, info)
    memory = estimate(args, model, num_gpus)
    on_gpu = args.device != "cpu"
    yield f"parameters: {', '.join(describe_roles(args, model))}; {source}"
    if on_gpu or num_gpus > 1:
        yield _describe_sharing(args, num_gpus)
    yield f"memory {'of each GPU ' if on_gpu else ''}at its peak, estimated:"
    for field in dataclasses.fields(memory):
        yield f"  {field.name:<10} {_size(getattr(memory, field.name)):>10}"
    of_all = f" of {gpu_memory_gb:g} GB" if gpu_memory_gb is not None else ""
    yield f"  {'peak':<10} {_size(memory.peak):>10}{of_all}"
    if args.ttt.enabled:
        yield f"TTT state, when it streams: {_size(state_bytes(model, 1))} a stream"
        if layer_class(args.ttt.method).cost(args.ttt) is None:
            yield f"what training with ttt.method {args.ttt.method} costs is not known, nor counted"
    problems: list[str] = []
    if not memory_only:
        problems += yield from _describe_time(args, model, num_gpus)
        problems += _problems_of_base(args)
    if gpu_memory_gb is None:
        return Verdict(True, problems)
    fits_in = yield from _describe_fit(args, info, model, num_gpus, gpu_memory_gb)
    return Verdict(fits_in, problems)


def _problems_of_base(args: TrainArgs) -> list[str]:
    """Return what a base lacks that lies on this machine."""
    try:
        if Path(args.moshi_paths.hf_repo_id or "").is_dir():
            find_checkpoint(args.moshi_paths, is_new_run=True)
    except UserError as error:
        return [str(error)]
    return []


def _describe_fit(
    args: TrainArgs,
    info: loaders.CheckpointInfo,
    model: TTTLMModel,
    num_gpus: int,
    gpu_memory_gb: float,
) -> Generator[str, None, bool]:
    """Yield whether the run fits, and what to change; return whether it does."""

    def is_enough(then: Memory) -> bool:
        return fits(then, gpu_memory_gb * GB)

    memory = estimate(args, model, num_gpus)
    if is_enough(memory):
        if faster := way_to_speed(args, model, info, num_gpus, is_enough):
            yield _describe_faster(*faster, model, num_gpus)
        yield "it fits"
        return True
    yield f"it does not fit: {memory.peak / GB:.1f} GB, and CUDA needs room of its own"
    ways = ways_to_fit(args, model, info, num_gpus, is_enough)
    for way in ways:
        yield f"  {way}"
    if not ways:
        said, then = no_way(args, model, info, num_gpus)
        yield f"  {said}; the smallest GPU that would do has {smallest_gpu_gb(then)} GB"
    return False


def shape_of(
    paths: ModelPaths, key: str = "moshi_paths.hf_repo_id"
) -> tuple[loaders.CheckpointInfo, str]:
    """Return a checkpoint without its weights, and where its shape is from.

    Args:
        key: what names the repository, for messages.

    Raises:
        UserError: there is no such repository, or its `config.json` is not valid.
    """
    config_path = Path(paths.config_path) if paths.config_path else None
    why_none, repo = "", paths.hf_repo_id
    if config_path is None and repo is not None:
        if Path(repo).is_dir():
            config_path = Path(repo) / "config.json"
            why_none = f"{repo} has no config.json"
        else:
            config_path, why_none = shape_from_hub(repo, key)
    source = f"shape of Moshi 7B, as {why_none}" if why_none else "shape of Moshi 7B"
    config: dict[str, Any] | None = None
    if config_path is not None and config_path.is_file():
        try:
            config = read_json(config_path)
        except ValueError as error:
            raise UserError(f"moshi_paths: {config_path} is not valid JSON: {error}.") from error
        if not isinstance(config, dict):
            raise UserError(f"moshi_paths: {config_path} is not valid: expected keys and values.")
        source = f"shape of {config_path}"
        config = {key: value for key, value in config.items() if key not in _NO_SHAPE}
    nothing = Path("none")
    return loaders.CheckpointInfo(nothing, nothing, nothing, lm_config=config), source


def _describe_sharing(args: TrainArgs, num_gpus: int) -> str:
    size = shard_size(args, num_gpus)
    if num_gpus == 1:
        return "one GPU is to hold everything"
    if size == 1:
        return f"{num_gpus} GPUs: each holds everything (parallel.shard_size: 1)"
    copies = num_gpus // size
    where = "one copy" if copies == 1 else f"{copies} copies"
    return f"{num_gpus} GPUs: {where} of the model, each over {size} (parallel.shard_size)"


def _describe_time(args: TrainArgs, model: TTTLMModel, num_gpus: int) -> _Lines:
    num_frames = count_frames(args.duration_sec)
    segments_per_step = args.batch_size * args.num_microbatches * num_gpus
    tokens_per_step = segments_per_step * num_frames * (1 + model.dep_q)
    yield (
        f"a step: {counted(segments_per_step, 'segment')} of {num_frames} frames, "
        f"{format_count(tokens_per_step)} tokens; {counted(args.max_steps, 'step')}: "
        f"{format_count(args.max_steps * tokens_per_step)} tokens"
    )
    segment_frames = segment_shares = None
    cautions: list[str] = []
    problems: list[str] = []
    said: set[str] = set()
    trained: list[Recording] = []
    try:
        data = _load(args, said, training=True)
        trained = data.recordings
        segment_frames, segment_shares = data.segment_frames, data.segment_shares
        steps = data.num_segments / segments_per_step
        yield (
            f"data: {counted(data.num_segments, 'segment')}, {steps:.1f} steps an epoch; the run "
            f"is {args.max_steps / steps:.2f} epochs"
        )
        cautions += cautions_of_steps(args, data.num_segments, num_gpus)
    except UserError as error:
        problems.append(str(error))
        yield "data: how many steps an epoch has is not known; the end of this page says why"
    try:
        if args.do_eval:
            _load(args, said, trained, training=False)
    except UserError as error:
        problems.append(str(error))
    yield describe_ttt(args, model, segment_frames)
    for caution in (*cautions_of_ttt(args, model, segment_frames, segment_shares), *cautions):
        yield f"warning: {caution}"
    if args.device != "cpu":
        yield _describe_step_time(args, step_time(args, model, num_gpus))
    return problems


def _load(
    args: TrainArgs, said: set[str], beside: Sequence[Recording] = (), *, training: bool
) -> DataSet:
    """Inspect the data as a run does at its start.

    Raises:
        UserError: see `load_sources`.
    """
    return load_sources(
        args.data.train_data if training else args.data.eval_data,
        key="data.train_data" if training else "data.eval_data",
        num_frames=count_frames(args.duration_sec),
        on_error=args.data.on_error,
        reads=read_codes_of(args.moshi_paths),
        reading=Reading.of(args.data, training=training),
        said=said,
        beside=beside,
    )


def _describe_faster(what: str, args: TrainArgs, model: TTTLMModel, num_gpus: int) -> str:
    peak_gb = estimate(args, model, num_gpus).peak / GB
    step = step_time(args, model, num_gpus)
    sec = f"about {step.low_sec:.2f} s a step" if step.is_known else "by how much was not measured"
    return f"faster, in the memory that is left: {what} ({peak_gb:.1f} GB, {sec})"


def _size(num_bytes: float) -> str:
    """`1.2 GB`; what is small in MB."""
    return f"{num_bytes / GB:.1f} GB" if num_bytes >= 0.1 * GB else f"{num_bytes / 1e6:.1f} MB"


def _describe_step_time(args: TrainArgs, step: StepTime) -> str:
    seconds = [
        f"{sec:.2f}" if sec >= 0.1 else f"{sec:.1g}" for sec in (step.low_sec, step.high_sec)
    ]
    durations = [format_duration(args.max_steps * sec) for sec in (step.low_sec, step.high_sec)]
    if step.is_known:
        said = f"about {seconds[0]} s a step, {durations[0]} for all"
    elif not step.why:
        said = f"{step.not_measured} was not measured; its arithmetic alone takes {seconds[0]} s"
    else:
        said = (
            f"{step.not_measured} was not measured; it should lie between {seconds[0]} and "
            f"{seconds[1]} s a step, {durations[0]} and {durations[1]} for all, as {step.why}"
        )
    return f"time on H100s or H200s (no other GPUs were measured): {said}"
