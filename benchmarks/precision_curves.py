"""Curves of LoRA and TTT on one base, kept in bfloat16, float8 and nf4, on spoken dialogues.

    python benchmarks/precision_curves.py --data DIR --json precision_curves.json
    python benchmarks/precision_curves.py --tiny --device cpu

A model of Moshi's structure is trained from scratch, in bfloat16, all weights, on dialogues by
espeak-ng that the demonstration's codec has encoded (those of `moshi-ttt recall --variant spoken`;
`--data` is the folder `data` of such an experiment, or one to make them in). Then LoRA and In-Place
TTT in some layers are trained on it, with its weights in each precision and for each seed. A seed
draws the adapters and the order of the dialogues: the same for all precisions. All is made of what
a training run is made of: `load_model` with `base_precision`, the losses and the optimizer.

Losses are measured on the same held-out dialogues before and after, and as the mean over the last
tenth of the steps. `apart` is the mean over seeds of the difference from bfloat16's with the same
seed, and its standard deviation. Beside it stands how far seeds alone are from each other in
bfloat16 (the standard deviation as well): a difference below that is one that nobody would notice.
If a loss is no number, or has not fallen, the exit status is 1.
"""

import argparse
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from moshi.models import loaders
from outputs import json_file
from safetensors.torch import save_file
from torch import Tensor

from finetune.config import DataArgs, LoraArgs, ModelPaths, OptimArgs, Precision, TrainArgs
from finetune.data import FRAME_RATE_HZ
from finetune.distributed import World
from finetune.errors import UserError
from finetune.kept import write_whole
from finetune.model import load_model, trainable_by_role
from finetune.recall.jobs import Job, run_jobs
from finetune.recall.model import ModelArgs, lm_kwargs
from finetune.recall.spoken.presets import SpokenStreams, preset
from finetune.spoken import (
    BankArgs,
    Dataset,
    DatasetArgs,
    DialogueArgs,
    EncodedDialogues,
    build_dataset,
)
from finetune.step import LossWeights, Optimizer, accumulate_gradients, stream_sums
from ttt import TTTArgs, TTTLMModel

PRECISIONS: tuple[str, ...] = get_args(Precision)
KINDS = ("text", "audio")
BASE_SEED = 1_000_003
"""Of the batches of the base: others than those of any seed."""
TTT: dict[str, Any] = {"enabled": True, "write": "delta", "target": "hidden", "start_layer": 1}
WEIGHTS = LossWeights(text_padding=0.2, first_codebook=4.0)
"""As in the spoken experiment."""
HELD_OUT_BATCHES = 8
TINY_DATA = DatasetArgs(
    BankArgs(num_voices=1, kinds=("thing",), num_fillers=(8, 8)),
    DialogueArgs(num_frames=300, num_facts=2, reach_frames=60),
    num_spoken=8,
    num_train=60,
    num_long=1,
    num_eval=6,
    lengths={},
)


# Training -----------------------------------------------------------------------------------------


def run_args(options: argparse.Namespace, precision: Precision | None, seed: int) -> TrainArgs:
    """The configuration of a run: LoRA and TTT on a base in `precision`; None: of the base."""
    is_base = precision is None
    ttt = TTTArgs(**TTT, layer_frequency=options.ttt_every, chunk_size=options.chunk_size)
    return TrainArgs(
        data=DataArgs(),
        run_dir="",
        moshi_paths=ModelPaths(hf_repo_id=None, random_init=is_base),
        full_finetuning=is_base,
        lora=LoraArgs(enable=not is_base, rank=options.rank),
        ttt=TTTArgs() if is_base else ttt,
        optim=OptimArgs(lr=options.base_lr if is_base else options.lr, ttt_lr=options.ttt_lr),
        duration_sec=options.frames / FRAME_RATE_HZ,
        batch_size=options.batch,
        max_steps=options.base_steps if is_base else options.steps,
        gradient_checkpointing=False,
        compile=False,
        base_precision=precision or "bfloat16",
        param_dtype=options.dtype,
        seed=seed,
    )


def new_model(args: TrainArgs, options: argparse.Namespace, base: Path) -> TTTLMModel:
    shape = ModelArgs(
        width=options.width,
        num_layers=options.layers,
        num_heads=options.heads,
        depformer_width=options.width // 4,
    )
    kwargs = lm_kwargs(shape, SpokenStreams())
    # As long as the dialogues: only the weights' precision is to make a difference.
    kwargs["context"] = options.frames
    return load_model(
        args, loaders.CheckpointInfo(base, base, base, lm_config=kwargs), options.device
    )


def train(options: argparse.Namespace, args: TrainArgs, base: Path, seed: int) -> Any:
    """Train a model; returns it with the losses of every step, and of held-out dialogues before and
    after, by kind."""
    started = time.monotonic()
    model = new_model(args, options, base).train()
    batches = batches_of(options, seed)
    before = held_out(model, options)
    world = World(0, 1, model.device)
    optimizer = Optimizer(trainable_by_role(model), args.optim, max_steps=args.max_steps)
    curves: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(args.max_steps):
        codes = next(batches)
        losses = accumulate_gradients(model, [codes], WEIGHTS, world)
        is_finite = all(map(math.isfinite, losses))
        optimizer.step(max_norm=args.max_norm, world=world, is_loss_finite=is_finite)
        for kind, loss in zip(KINDS, losses, strict=True):
            curves[kind].append(loss)
    found = {"curves": curves, "before": before, "after": held_out(model, options)}
    return model, {**found, "total_sec": time.monotonic() - started}


@torch.no_grad()
def held_out(model: TTTLMModel, options: argparse.Namespace) -> dict[str, float]:
    """Return the losses of dialogues that nothing has trained on, by kind."""
    data = _dialogues(options.data, "eval")
    losses, weights = torch.zeros(2), torch.zeros(2)
    for rows in torch.arange(len(data))[: HELD_OUT_BATCHES * options.batch].split(options.batch):
        codes, _ = data.batch(rows, model.device)
        codes = codes[:, :, : options.frames]
        sums = stream_sums(model, model(codes, with_heads=False), codes, WEIGHTS)
        losses += torch.stack([kind.loss for kind in sums]).cpu()
        weights += torch.stack([kind.weight for kind in sums]).cpu()
    return dict(zip(KINDS, (losses / weights).tolist(), strict=True))


def batches_of(options: argparse.Namespace, seed: int) -> Iterator[Tensor]:
    """Yield codes [B, 17, T] without end; each dialogue once before any comes again."""
    data = _dialogues(options.data, "train")
    random = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=random)
        for rows in order[: len(order) // options.batch * options.batch].view(-1, options.batch):
            codes, _ = data.batch(rows, torch.device(options.device))
            yield codes[:, :, : options.frames]


@functools.cache
def _dialogues(folder: Path, part: str) -> EncodedDialogues:
    """Return the dialogues in `folder` for training, or those held out; read once by a process."""
    return Dataset(folder, preset("gpu").data).load(part)


def train_base(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Train the base and write its weights to `path`; returns its curves and losses."""
    model, result = train(options, run_args(options, None, seed=0), path, BASE_SEED)
    save_file({name: w.contiguous().cpu() for name, w in model.state_dict().items()}, path)
    return {**result, "parameters": sum(p.numel() for p in model.parameters())}


def tune(options: argparse.Namespace, precision: Precision, seed: int, base: Path) -> Any:
    """Train LoRA and TTT on the base in `precision`; returns curves and losses."""
    _, result = train(options, run_args(options, precision, seed), base, seed)
    losses = ", ".join(f"{kind} {result['after'][kind]:.4f}" for kind in KINDS)
    print(f"{precision}, seed {seed}: {losses} ({result['total_sec']:.0f} s)", flush=True)
    return {"precision": precision, "seed": seed, **result}


# Judging and showing ------------------------------------------------------------------------------


def last_steps(run: dict[str, Any], kind: str) -> float:
    """Return the mean over the last tenth of the steps."""
    curve = run["curves"][kind]
    return statistics.mean(curve[-max(1, len(curve) // 10) :])


def problem_of(run: dict[str, Any], kind: str) -> str | None:
    if not all(map(math.isfinite, run["curves"][kind])):
        return "is no number"
    return None if run["after"][kind] < run["before"][kind] else "has not fallen"


def judged(base: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the end losses by kind and precision, and what is wrong."""
    names = {"base": base} | {f"{run['precision']}, seed {run['seed']}": run for run in runs}
    wrong = [
        f"{name}: the loss of the {kind} {problem}"
        for name, run in names.items()
        for kind in KINDS
        if (problem := problem_of(run, kind))
    ]
    by_precision: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        by_precision.setdefault(run["precision"], []).append(run)
    ends = {}
    for kind in KINDS:
        end = {name: [run["after"][kind] for run in same] for name, same in by_precision.items()}
        steps = {name: [last_steps(run, kind) for run in r] for name, r in by_precision.items()}
        ends[kind] = {
            name: {
                "start": statistics.mean(run["before"][kind] for run in same),
                "by_seed": end[name],
                "apart": mean_and_spread(end[name], end["bfloat16"]),
                "between_seeds": spread(end["bfloat16"]),
                "last_steps": statistics.mean(steps[name]),
                "last_steps_apart": mean_and_spread(steps[name], steps["bfloat16"]),
                "last_steps_between_seeds": spread(steps["bfloat16"]),
            }
            for name, same in by_precision.items()
        }
    return {"ends": ends, "wrong": wrong}


def spread(numbers: list[float]) -> float:
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def mean_and_spread(numbers: list[float], others: list[float]) -> tuple[float, float]:
    """Return mean and standard deviation of the differences, seed by seed."""
    apart = [one - other for one, other in zip(numbers, others, strict=True)]
    return statistics.mean(apart), spread(apart)


def table(found: dict[str, Any], num_seeds: int) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    columns = ["loss", "base in", "start", *(f"end, seed {seed}" for seed in range(num_seeds))]
    columns += ["apart", "between seeds", "last steps", "apart", "between seeds"]
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for kind, ends in found["ends"].items():
        for precision, end in ends.items():
            cells = [kind, precision, f"{end['start']:.4f}"]
            cells += [f"{loss:.4f}" for loss in end["by_seed"]]
            cells += ["{:+.4f} ± {:.4f}".format(*end["apart"]), f"{end['between_seeds']:.4f}"]
            cells += [
                f"{end['last_steps']:.4f}",
                "{:+.4f} ± {:.4f}".format(*end["last_steps_apart"]),
            ]
            cells += [f"{end['last_steps_between_seeds']:.4f}"]
            yield f"| {' | '.join(cells)} |"
    for problem in found["wrong"]:
        yield f"WRONG: {problem}"


# The command --------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="of dialogues; where there are none, to make them"
    )
    parser.add_argument("--tiny", action="store_true", help="other defaults: a minute on a CPU")
    parser.add_argument("--width", type=int, help="of the model")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--frames", type=int, help="of a dialogue, from its beginning")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--base-steps", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rank", type=int, help="of LoRA")
    parser.add_argument("--ttt-every", type=int, help="layers one has TTT")
    parser.add_argument("--chunk-size", type=int)
    parser.add_argument("--workers", type=int, help="runs side by side")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--base-lr", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--ttt-lr", type=float, default=2e-3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=json_file, help="a file to write the results to")
    options = parser.parse_args(arguments)
    for key, (full, tiny) in DEFAULTS.items():
        if getattr(options, key) is None:
            setattr(options, key, tiny if options.tiny else full)
    if "bfloat16" not in options.precisions:
        options.precisions.insert(0, "bfloat16")
    return options


DEFAULTS = {
    "width": (512, 128),
    "layers": (8, 2),
    "heads": (8, 4),
    "frames": (800, 40),
    "batch": (16, 4),
    "base_steps": (500, 10),
    "steps": (200, 5),
    "rank": (64, 8),
    "ttt_every": (3, 1),
    "chunk_size": (32, 16),
    "workers": (9, 1),
    "seeds": (3, 2),
}
"""Of the experiment, and of `--tiny`."""


def require_data(options: argparse.Namespace) -> None:
    """See that there are dialogues, or make them.

    Raises:
        UserError: they cannot be made, or are shorter or fewer than asked for.
    """
    wanted = preset("gpu").data
    if Dataset(options.data, wanted).mark.read() is None:
        full = dataclasses.replace(wanted, num_long=1, lengths={})
        chosen = TINY_DATA if options.tiny else full
        workers = os.cpu_count() or 1
        build_dataset(options.data, chosen, torch.device(options.device), workers=workers)
    data = _dialogues(options.data, "train")
    if data.text.shape[1] < options.frames or len(data) < options.batch:
        raise UserError(
            f"--data: {options.data} has {len(data)} dialogues of {data.text.shape[1]} frames; a "
            f"batch needs {options.batch} of {options.frames}: lower --batch or --frames."
        )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING)
    work = Path(tempfile.mkdtemp())
    try:
        options.data = options.data or work / "data"
        require_data(options)
        return run(options, work)
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        shutil.rmtree(work)


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    started = time.monotonic()
    base_path = work / "base.safetensors"
    base = train_base(options, base_path)
    print(
        f"{name}, torch {torch.__version__}, {base['parameters'] / 1e6:.1f}M parameters, "
        f"base: text {base['after']['text']:.4f}, audio {base['after']['audio']:.4f} after "
        f"{options.base_steps} steps ({base['total_sec']:.0f} s)",
        flush=True,
    )
    jobs = [
        Job(f"{precision}_{seed}", {}, tune, (options, precision, seed, base_path))
        for seed in range(options.seeds)
        for precision in options.precisions
    ]
    runs = run_jobs(jobs, work, workers=options.workers)
    found = {
        "machine": name,
        "torch": str(torch.__version__),
        **{key: str(value) for key, value in vars(options).items()},
        **judged(base, runs),
        "base": base,
        "runs": runs,
        "total_sec": time.monotonic() - started,
    }
    print("\n".join(table(found, options.seeds)))
    print(f"{found['total_sec']:.0f} s")
    if options.json:
        write_whole(options.json, json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    sys.exit(int(bool(main()["wrong"])))
