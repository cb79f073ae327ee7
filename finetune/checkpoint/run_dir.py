"""Run folders and the checkpoints in them.

    run_dir/checkpoints/checkpoint_000500/
        consolidated/   weights for people: config.json, lora.safetensors or
                        consolidated.safetensors in the layout of stock `moshi`, ttt.safetensors
        args.yaml       the configuration that made it
        resume/         the optimizer's tensors, in parts (torch.distributed.checkpoint), for any
                        number of processes
        resume.pt       what else training needs to continue as if it had not stopped
        info.json       step and eval loss, and parts of the training before that had another
                        configuration
        manifest.json   all these files, with sizes and checksums

A checkpoint is written under another name and renamed when it is complete;
`finetune.checkpoint.writer` does.
"""

import logging
import math
import os
import warnings
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetune.checkpoint import manifest
from finetune.checkpoint.resume_file import read_resume_file
from finetune.checkpoint.run_record import RunRecord
from finetune.checkpoint.soundness import problem_of_weights
from finetune.checkpoint.tensor_reader import TensorReader
from finetune.config import TrainArgs
from finetune.distributed import Sharding, World, like_parameter
from finetune.errors import UserError
from finetune.kept import checkpoints_in, require_part, step_of
from finetune.model import trainable_by_role
from finetune.safety import read_json
from ttt import TTTLMModel, ttt_parameters
from ttt.layers.frozen import frozen_linears

logger = logging.getLogger(__name__)

# What DCP says of every run of a single process, and of every tensor that is a piece of another.
warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")

INFO = "info.json"
RESUME_STATE = {"optimizer", "data", "base", "effect", "counts"}
"""What resume.pt holds; that of an earlier version may lack `base`, and hold a state of random
numbers, which nothing reads."""
_OF_ANOTHER_VERSION = (
    "{0} was written by another version, and this one cannot continue it. Start a new run from its "
    "weights instead: moshi_paths.init_from: {0}"
)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the earliest step first."""
    return checkpoints_in(run_dir / "checkpoints")


def delete_old(args: TrainArgs, newest: Path, record: RunRecord) -> None:
    """Keep the last `num_ckpt_keep` checkpoints, and the best by eval loss.

    One whose loss is not finite displaces no other.
    """
    if args.num_ckpt_keep is None:
        return
    # What is not whole was put there by somebody else: it does not count, and is not deleted.
    checkpoints = [p for p in list_checkpoints(Path(args.run_dir)) if manifest.is_whole(p)]
    losses = {path: eval_loss_of(path) for path in checkpoints}
    rated = {path: loss for path, loss in losses.items() if loss is not None and loss < math.inf}
    sound = [path for path in checkpoints if losses[path] is None or path in rated]
    keep = {newest, *sound[-args.num_ckpt_keep :]}
    keep |= set(sorted(rated, key=rated.__getitem__)[:1])
    for path in checkpoints:
        if path not in keep:
            try:
                _delete(path, record)
            except OSError as error:
                logger.warning("could not delete the old checkpoint %s: %s", path, error)


def _delete(checkpoint: Path, record: RunRecord) -> None:
    name, doomed = (f"checkpoints/{checkpoint.name}{end}" for end in ("", ".deleted.incomplete"))
    if record.found_at(name).units != [name]:
        logger.warning("kept %s: something in it was not written by this run", checkpoint)
        return
    # Renamed first: half of a checkpoint must not look like a checkpoint, should this be killed.
    record.add(trees=[doomed])
    os.replace(checkpoint, record.run_dir / doomed)
    record.delete(doomed)


def eval_loss_of(checkpoint: Path) -> float | None:
    """Return a checkpoint's loss, which may be NaN; None: it was not evaluated, or its info.json
    is damaged."""
    try:
        loss = read_json(checkpoint / INFO)["eval_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, int | float) else None


def first_whole(candidates: Sequence[Path], world: World) -> tuple[Path | None, list[Path]]:
    """The first of some checkpoints that is whole, and those before it, which are damaged. All
    files are checked, each by one of the processes.

    Raises:
        UserError: there are some, and none is whole.
    """
    damaged: list[Path] = []
    for checkpoint in candidates:
        problem = _problem(checkpoint, world)
        if problem is None:
            return checkpoint, damaged
        damaged.append(checkpoint)
        following = candidates[len(damaged) : len(damaged) + 1]
        if following and world.is_main:
            logger.warning("%s; trying the one before, %s", problem, following[0])
    if damaged:
        raise UserError(f"{problem}. {world.done_by_first(lambda: _ways_on(damaged))}")
    return None, []


def _ways_on(damaged: Sequence[Path]) -> str:
    """Return what to do about damaged checkpoints, the newest first.

    Those that are older than the last one were not looked at.
    """
    last = damaged[-1]
    older = [each for each in checkpoints_in(last.parent) if step_of(each) < step_of(last)]
    ways = [f"Delete {last} to resume from the one before"] if older else []
    usable = next((each for each in damaged if problem_of_weights(each) is None), None)
    if usable is not None:
        ways.append(
            "Start a new run, in another run_dir, from its weights, which are whole: "
            f"moshi_paths.init_from: {usable}"
        )
    if not ways:
        ways.append("No checkpoint of this run is whole: start anew with --overwrite_run_dir")
    return f"{'. Or: '.join(ways)}."


def _problem(checkpoint: Path, world: World) -> str | None:
    parts = [checkpoint / name for name in ("resume.pt", manifest.NAME, "resume")]
    if [part.exists() for part in parts] == [True, False, False]:
        raise UserError(_OF_ANOTHER_VERSION.format(checkpoint))
    problem = manifest.first_problem(
        checkpoint, chosen=lambda names: names[world.rank :: world.size]
    )
    return world.first(problem)


def load_resume_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a run continues from, apart from the optimizer's tensors.

    Raises:
        UserError: it cannot be read, or another version has written it.
    """
    state = read_resume_file(checkpoint)
    if (
        not isinstance(state, dict)
        or {"base", *state} - {"random"} != RESUME_STATE
        or not all(isinstance(part, dict) for part in state.values())
        or state["counts"].get("step") != step_of(checkpoint)
    ):
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

    Raises:
        UserError: the files hold something else than these tensors.
    """
    try:
        TensorReader(checkpoint / "resume").read_metadata()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint / 'resume/.metadata'} does not say where the optimizer's tensors are, "
            f"and nothing of it was run: {error}. {_ways_on([checkpoint])}"
        ) from error
    dcp.load(
        {
            name: like_parameter(tensor.detach(), parameter, sharding)
            for name, (tensor, parameter) in tensors.items()
        },
        storage_reader=TensorReader(checkpoint / "resume"),
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
        require_part(folder / name)
        try:
            trained |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read {folder / name}: {error}. The checkpoint is damaged: copy it again, "
                "or use another one."
            ) from error
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # What is kept in fewer bits takes a weight in full.
    expected |= {f"{name}.weight": each.frozen_weight.shape for name, each in frozen_linears(model)}
    needed = {name for named in trainable_by_role(model).values() for name in named}
    if "consolidated.safetensors" in names and args.lora.enable:
        # LoRA is merged: the adapters stay as they start, and change nothing.
        needed = set(ttt_parameters(model))
        trained = _as_frozen_weights(trained, expected)
    wrong = [f"it lacks {name}" for name in sorted(needed - trained.keys())]
    for name, weight in trained.items():
        if name not in expected:
            wrong.append(f"it has {name}, which the model has not")
        elif weight.shape != expected[name]:
            wrong.append(f"its {name} has shape {tuple(weight.shape)}")
    if wrong:
        raise UserError(
            f"{folder} does not belong to the model that {checkpoint / 'args.yaml'} describes: "
            f"{wrong[0]}."
        )
    model.load_state_dict(trained, strict=False)


def _as_frozen_weights(
    weights: Mapping[str, torch.Tensor], expected: Container[str]
) -> dict[str, torch.Tensor]:
    """Merged weights under the names that they have inside a model with LoRA."""
    renamed = {}
    for name, weight in weights.items():
        owner, _, part = name.rpartition(".")
        frozen = f"{owner}.frozen_W.{part}"
        renamed[frozen if frozen in expected else name] = weight
    return renamed
