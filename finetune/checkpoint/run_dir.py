"""Run folders and the checkpoints in them.

    run_dir/checkpoints/checkpoint_000500/
        consolidated/   weights for people: config.json, lora.safetensors or
                        consolidated.safetensors in the layout of stock `moshi`, ttt.safetensors
        args.yaml       the configuration that made it
        resume/         the optimizer's tensors, in parts (torch.distributed.checkpoint), for any
                        number of processes
        resume.pt       what else training needs to continue as if it had not stopped
        info.json       step and eval loss
        manifest.json   all these files, with sizes and checksums

A checkpoint is written under another name and renamed when it is complete;
`finetune.checkpoint.writer` does.
"""

import json
import logging
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetune.checkpoint import manifest
from finetune.checkpoint.run_lock import RunLock
from finetune.config import (
    TrainArgs,
    changed_meaning,
    list_problems,
    load_run_config,
    save_config,
)
from finetune.distributed import Sharding, World, like_parameter
from finetune.errors import UserError
from finetune.model import trainable_by_role
from ttt import TTTLMModel, ttt_parameters

logger = logging.getLogger(__name__)

# What DCP says of every run of a single process, and of every tensor that is a piece of another.
warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")

_NAME = re.compile(r"checkpoint_(\d{6,})")

RESUME_STATE = {"optimizer", "data", "random", "effect", "counts"}
"""What resume.pt holds."""
_OF_ANOTHER_VERSION = (
    "{0} was written by another version, and this one cannot continue it. Start a new run from its "
    "weights instead: moshi_paths.init_from: {0}"
)


def open_run_dir(args: TrainArgs) -> Path | None:
    """Check that the run may write to its folder; the checkpoint to resume from, if any.

    Changes nothing, so that every process can ask.

    Raises:
        UserError: the folder cannot be read, holds something else, or nothing to resume from.
    """
    try:
        return _check_run_dir(args, Path(args.run_dir))
    except OSError as error:
        raise UserError(
            f"run_dir: cannot read {args.run_dir}: {error.strerror or error}."
        ) from error


def _check_run_dir(args: TrainArgs, run_dir: Path) -> Path | None:
    latest = max(list_checkpoints(run_dir), default=None, key=step_of)
    if args.resume is True and latest is None:
        raise UserError(
            f"resume: there is no complete checkpoint in {run_dir / 'checkpoints'}. Check run_dir, "
            f"or start without resume (resume: auto starts anew where there is nothing)."
        )
    if args.resume:
        if latest is not None:
            _require_same_rule(args, latest)
        return latest
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir: {run_dir} is a file. Choose another name.")
    if run_dir.is_dir() and any(run_dir.iterdir()) and not _has_never_begun(run_dir):
        if not args.overwrite_run_dir:
            raise UserError(
                f"run_dir: {run_dir} already holds a run. Choose another folder, continue that run "
                f"with --resume, or delete what is there with --overwrite_run_dir."
            )
        if not (run_dir / "args.yaml").is_file():
            raise UserError(
                f"run_dir: {run_dir} holds files, but no args.yaml: it is no run folder, so it is "
                f"not deleted. Choose another folder, or empty it yourself."
            )
    return None


def _require_same_rule(args: TrainArgs, checkpoint: Path) -> None:
    """
    Raises:
        UserError: by `args`, the checkpoint's TTT parameters would mean something else.
    """
    earlier = load_run_config(checkpoint / "args.yaml").ttt
    changed = list(changed_meaning(earlier, args.ttt)) if earlier.enabled else []
    if changed and args.ttt.enabled:
        lines = (
            f"ttt.{name}: was {there} when the checkpoint was made, and is {here} now; set it to "
            f"{there}, or start a new run_dir"
            for name, there, here in changed
        )
        raise UserError(list_problems(f"resuming {checkpoint}", lines))


def _has_never_begun(run_dir: Path) -> bool:
    """Whether this is what a start that failed leaves behind: the next one need not care."""
    metrics = run_dir / "metrics.train.jsonl"
    return (
        (run_dir / "args.yaml").is_file()
        and not (run_dir / "checkpoints").exists()
        and not (metrics.exists() and metrics.stat().st_size)
    )


@contextmanager
def created_run_dir(args: TrainArgs, lock: RunLock) -> Iterator[None]:
    """Make the run folder with its args.yaml, after `open_run_dir`; only one process does, and
    holds the folder's `lock` from then on.

    What it replaces is deleted when the block ends well, and comes back if it does not.

    Raises:
        UserError: the folder cannot be written to.
    """
    run_dir = Path(args.run_dir).resolve()
    replaced = run_dir.with_name(f"{run_dir.name}.replaced")
    try:
        if args.overwrite_run_dir and run_dir.is_dir():
            if replaced.exists():
                shutil.rmtree(replaced)
            os.replace(run_dir, replaced)
            run_dir.mkdir()
            lock.move(replaced, run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.take()
        for leftover in (run_dir / "checkpoints").glob("*.incomplete"):
            shutil.rmtree(leftover)
        save_config(args, run_dir / "args.yaml")
    except OSError as error:
        raise UserError(
            f"run_dir: cannot write to {run_dir}: {error.strerror or error}."
        ) from error
    try:
        yield
    except BaseException:
        if replaced.exists():
            lock.move(run_dir, replaced)
            shutil.rmtree(run_dir)
            os.replace(replaced, run_dir)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run."""
    folder = run_dir / "checkpoints"
    return sorted(p for p in folder.glob("checkpoint_*") if _NAME.fullmatch(p.name))


def step_of(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def fsync(path: Path) -> None:
    """Have the disk take what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_old(args: TrainArgs, newest: Path) -> None:
    """Keep the last `num_ckpt_keep` checkpoints, and the best by eval loss."""
    if args.num_ckpt_keep is None:
        return
    # What is not whole was put there by somebody else: it does not count, and is not deleted.
    checkpoints = [p for p in list_checkpoints(Path(args.run_dir)) if manifest.is_whole(p)]
    losses = {path: _eval_loss(path) for path in checkpoints}
    rated = [path for path in checkpoints if losses[path] < math.inf]
    keep = {newest, *checkpoints[-args.num_ckpt_keep :]}
    keep |= set(sorted(rated, key=losses.__getitem__)[:1])
    for path in checkpoints:
        if path not in keep:
            try:
                _delete(path)
            except OSError as error:
                logger.warning("could not delete the old checkpoint %s: %s", path, error)


def _delete(checkpoint: Path) -> None:
    # Renamed first: half of a checkpoint must not look like a checkpoint, should this be killed.
    doomed = checkpoint.with_name(f"{checkpoint.name}.deleted.incomplete")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def _eval_loss(checkpoint: Path) -> float:
    """Infinite if it was not evaluated, or came out as NaN, or its record is damaged."""
    try:
        loss = json.loads((checkpoint / "info.json").read_text())["eval_loss"]
    except (OSError, ValueError, KeyError):
        return math.inf
    return math.inf if loss is None or math.isnan(loss) else loss


def load_resume_state(checkpoint: Path, world: World) -> dict[str, Any]:
    """What a run continues from, apart from the optimizer's tensors. All files are checked, each by
    one of the processes.

    Raises:
        UserError: a file is missing or damaged, or another version has written it.
    """
    parts = [checkpoint / name for name in ("resume.pt", manifest.NAME, "resume")]
    if [part.exists() for part in parts] == [True, False, False]:
        raise UserError(_OF_ANOTHER_VERSION.format(checkpoint))
    try:
        names = sorted(manifest.read(checkpoint))[world.rank :: world.size]
    except (OSError, ValueError):
        names = []
    problem = world.first(manifest.first_problem(checkpoint, names=names))
    if problem is not None:
        raise UserError(f"{problem}. Delete {checkpoint} to resume from the one before.")
    try:
        state = torch.load(checkpoint / "resume.pt", map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read {checkpoint / 'resume.pt'}: {error}") from error
    if not isinstance(state, dict) or state.keys() != RESUME_STATE:
        raise UserError(_OF_ANOTHER_VERSION.format(checkpoint))
    return state


def fill_shards(
    checkpoint: Path,
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    world: World,
    sharding: Sharding | None,
) -> None:
    """Read the optimizer's tensors, in place: of each, this process's part alone, however many
    processes have written it.

    Args:
        tensors: by name, with the parameter that each is of.
    """
    dcp.load(
        {
            name: like_parameter(tensor.detach(), parameter, sharding)
            for name, (tensor, parameter) in tensors.items()
        },
        storage_reader=dcp.FileSystemReader(checkpoint / "resume"),
        process_group=world.host_group,
        no_dist=world.size == 1,
    )


def load_trained_weights(model: TTTLMModel, args: TrainArgs, checkpoint: Path) -> None:
    """Put a checkpoint's trained weights into a model that was built as for training.

    `args` are the checkpoint's own.

    Raises:
        UserError: a file is missing or damaged, or does not belong to this model.
    """
    folder = checkpoint / "consolidated"
    trained: dict[str, torch.Tensor] = {}
    names = []
    if args.lora.enable or args.full_finetuning:
        adapters_only = args.lora.enable and args.save_adapters
        names.append("lora.safetensors" if adapters_only else "consolidated.safetensors")
    if args.ttt.enabled:
        names.append("ttt.safetensors")
    for name in names:
        try:
            trained |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {folder / name}: {error}") from error
    expected = model.state_dict()
    needed = {name for named in trainable_by_role(model).values() for name in named}
    if "consolidated.safetensors" in names and args.lora.enable:
        # LoRA is merged: the adapters stay as they start, and change nothing.
        needed = set(ttt_parameters(model))
        trained = _as_frozen_weights(trained, expected)
    wrong = [f"it lacks {name}" for name in sorted(needed - trained.keys())]
    for name, weight in trained.items():
        if name not in expected:
            wrong.append(f"it has {name}, which the model has not")
        elif weight.shape != expected[name].shape:
            wrong.append(f"its {name} has shape {tuple(weight.shape)}")
    if wrong:
        raise UserError(
            f"{folder} does not belong to the model that {checkpoint / 'args.yaml'} describes: "
            f"{wrong[0]}."
        )
    model.load_state_dict(trained, strict=False)


def _as_frozen_weights(
    weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Merged weights under the names that they have inside a model with LoRA."""
    renamed = {}
    for name, weight in weights.items():
        owner, _, part = name.rpartition(".")
        frozen = f"{owner}.frozen_W.{part}"
        renamed[frozen if frozen in expected else name] = weight
    return renamed
