"""A run describes itself at its start."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from finetune.config import TrainArgs, changed_since_moshi_finetune
from finetune.data import EvalLoader, TrainLoader, count_frames
from finetune.distributed import World, shard_size
from finetune.errors import counted
from finetune.kept import write_whole
from finetune.model import count_by_role
from finetune.monitoring import format_count
from finetune.plan.ttt_updates import cautions_of_ttt, describe_ttt, num_learning
from ttt import TTTLMModel

logger = logging.getLogger(__name__)


def describe_run(
    args: TrainArgs,
    model: TTTLMModel,
    train_data: TrainLoader,
    eval_data: EvalLoader | None,
    world: World,
    config: Path | None = None,
) -> Iterator[str]:
    """A few lines: data, parameters, TTT against attention, memory, and where it writes; and which
    keys of a moshi-finetune file mean something else here.

    The main process logs a warning where TTT can have nothing to do, or takes long, and where a
    step takes more than there is.
    """
    num_frames = count_frames(args.duration_sec)
    global_batch = args.batch_size * args.num_microbatches * world.data_size
    yield (
        f"data: {counted(train_data.num_segments, 'segment')} of up to {num_frames} frames from "
        f"{train_data.total_duration_sec / 3600:.2f} h of audio"
        + (f", {eval_data.num_segments} to evaluate" if eval_data else "")
        + f"; {global_batch} a step on {world.size} x {world.device.type}"
    )
    if world.size > 1:
        size = shard_size(args, world.size)
        whole = "each holds the whole model"
        yield f"{world.size} processes: " + (
            whole if size == 1 else f"{size} share a copy of the model (parallel.shard_size)"
        )
    yield f"parameters: {', '.join(describe_roles(args, model))}"
    if args.base_precision != "bfloat16" and args.lora.enable and not args.save_adapters:
        yield (
            f"checkpoints: LoRA is merged into the base as {args.base_precision} keeps it, in "
            f"{args.param_dtype} again (save_adapters: false)"
        )
    yield describe_ttt(args, model, train_data.segment_frames)
    if world.is_main:
        for caution in _cautions(args, model, train_data, world):
            logger.warning(caution)
        if world.device.type == "cuda":
            warn_of_slow_layers(model)
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        yield f"memory: {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB taken before training"
    yield f"writes to {args.run_dir}"
    if config is not None:
        yield from changed_since_moshi_finetune(config, args)


def describe_roles(args: TrainArgs, model: TTTLMModel) -> Iterator[str]:
    """Yield what there is of each kind of weights, and whether it trains."""
    for role, (total, trained) in count_by_role(model).items():
        is_small = role == "base" and args.base_precision != "bfloat16"
        frozen = f" (frozen, {args.base_precision})" if is_small else " (frozen)"
        yield f"{role} {format_count(total)}{'' if trained else frozen}"


SUMMARY = "summary.json"


def write_summary(
    args: TrainArgs, model: TTTLMModel, train_data: TrainLoader, world: World
) -> None:
    """Write what a run's metrics do not have into `summary.json` in its folder."""
    by_role = {role: total for role, (total, _) in count_by_role(model).items()}
    segments_per_step = args.batch_size * args.num_microbatches * world.data_size
    learning = num_learning(args.ttt, train_data.segment_frames) if args.ttt.enabled else None
    content = {
        "parameters": sum(by_role.values()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters_by_role": by_role,
        "train_segments": train_data.num_segments,
        # Of these; None without TTT.
        "train_segments_in_which_ttt_learns": learning,
        "segments_per_step": segments_per_step,
        "steps_per_epoch": train_data.num_segments / segments_per_step,
        "device": str(world.device.type),
        "processes": world.size,
        "cautions": list(_cautions(args, model, train_data, world)),
    }
    write_whole(Path(args.run_dir) / SUMMARY, json.dumps(content, indent=2) + "\n")


def _cautions(
    args: TrainArgs, model: TTTLMModel, train_data: TrainLoader, world: World
) -> Iterator[str]:
    yield from cautions_of_ttt(args, model, train_data.segment_frames, train_data.segment_shares)
    yield from cautions_of_steps(args, train_data.num_segments, world.data_size)


def cautions_of_steps(args: TrainArgs, num_segments: int, num_processes: int) -> Iterator[str]:
    """Yield that a step takes more segments than there are, if so.

    Args:
        num_processes: that take batches of their own.
    """
    segments_a_step = args.batch_size * args.num_microbatches * num_processes
    if segments_a_step > num_segments:
        epochs = args.max_steps * segments_a_step / num_segments
        yield (
            f"a step takes {segments_a_step} segments, and the training data have {num_segments}: "
            f"some come more than once in it, and the run is {epochs:.1f} epochs. Lower batch_size "
            "or num_microbatches, or train on more."
        )


def warn_of_slow_layers(model: TTTLMModel) -> None:
    """Log a warning where TTT takes more time on a GPU than it need."""
    for caution in dict.fromkeys(c for m in model.ttt_layers.values() for c in m.cautions()):
        logger.warning(caution)
