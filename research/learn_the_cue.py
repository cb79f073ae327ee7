"""Teach the shipped model a cue, on a CPU: what Moshi repeats, and what it does not.

    python research/learn_the_cue.py --start OLD --out runs/recall/cue
    python research/memory_model.py --runs runs/recall/cue --out NEW

`example/memory` was first trained on dialogues in which nothing told whether Moshi would repeat a
fact. Speaking on its own it repeated many at will, over the user's next words. Some steps on
dialogues with the cue mend that. `moshi-ttt recall --variant spoken` has it from the start.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from finetune.monitoring import setup_logging
from finetune.recall.spoken import training
from finetune.recall.spoken.presets import SpokenPreset, preset
from finetune.spoken import build_dataset

ARM, SEED = "delta_hidden", 0


def small(
    steps: int,
    acknowledgment_weight: float = 10.0,
    *,
    num_spoken: int = 420,
    long_share: float = 0.0,
    pauses: bool = False,
) -> SpokenPreset:
    """Return the preset with fewer dialogues, which a CPU encodes in some minutes."""
    chosen = preset("gpu")
    data = dataclasses.replace(
        chosen.data,
        bank=dataclasses.replace(chosen.data.bank, num_fillers=(160, 60)),
        num_spoken=num_spoken,
        num_train=4000 * num_spoken // 420,
        num_long=8 + round(4 * long_share * num_spoken),
        pauses=pauses,
        num_eval=64,
        lengths={},
    )
    return dataclasses.replace(
        chosen,
        data=data,
        dtype="float32",
        num_steps=steps,
        batch_size=8,
        audio_rows=2,
        long_share=long_share,
        acknowledgment_weight=acknowledgment_weight,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--start", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--lr", type=float, default=3e-4, help="of TTT parameters: twice that")
    parser.add_argument("--acknowledgment_weight", type=float, default=10.0)
    parser.add_argument("--num_spoken", type=int, default=420, help="dialogues that are encoded")
    parser.add_argument(
        "--long_share", type=float, default=0.0, help="of the steps: on talks of 4 times the length"
    )
    parser.add_argument("--pauses", action="store_true", help="in the dialogues: DatasetArgs")
    args = parser.parse_args(argv)
    setup_logging()
    chosen = small(
        args.steps,
        args.acknowledgment_weight,
        num_spoken=args.num_spoken,
        long_share=args.long_share,
        pauses=args.pauses,
    )
    cpu = torch.device("cpu")
    dataset = build_dataset(
        args.out / "data",
        chosen.data,
        cpu,
        workers=os.cpu_count() or 1,
        tokenizer=(args.start / "tokenizer.model").read_bytes(),
    )
    model = training.untrained(chosen, ARM, seed=SEED, device=cpu)
    weights = load_file(args.start / "model.safetensors")
    model.load_state_dict(weights | load_file(args.start / "ttt.safetensors"))
    training.train(
        model,
        chosen,
        chosen.stages(ARM, dataset),
        dataset.text,
        seed=7,
        lr=args.lr,
        ttt_lr=2 * args.lr,
        label="with the cue",
    )
    half = {
        name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()
    }
    (args.out / "runs").mkdir(exist_ok=True)
    save_file(half, args.out / "runs" / f"{ARM}_seed{SEED}.model.safetensors")


if __name__ == "__main__":
    main()
