"""Lay out a model of the spoken experiment as a checkpoint that people can talk to.

python research/memory_model.py --runs runs/recall/gpu_spoken --out example/memory
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from finetune.recall.model import lm_kwargs
from finetune.recall.spoken.presets import preset
from ttt import build_model, ttt_parameters

CODEC = Path("example/demo/model")


def main() -> None:
    parser = argparse.ArgumentParser(description="Lay out a model of the spoken experiment.")
    parser.add_argument("--runs", type=Path, required=True, help="the experiment's folder")
    parser.add_argument("--arm", default="delta_hidden")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    chosen = preset("gpu")
    kwargs, ttt = lm_kwargs(chosen.model, chosen.streams), chosen.ttt_args(args.arm)
    names = ttt_parameters(build_model(kwargs, ttt, device="meta")).keys()
    weights = load_file(args.runs / "runs" / f"{args.arm}_seed{args.seed}.model.safetensors")
    args.out.mkdir(parents=True, exist_ok=True)
    own = {name: weights.pop(name) for name in names}
    metadata = {"ttt_args": json.dumps(dataclasses.asdict(ttt))}
    save_file(own, args.out / "ttt.safetensors", metadata=metadata)
    save_file(weights, args.out / "model.safetensors")
    for name in ("mimi.safetensors", "mimi_config.json"):
        shutil.copyfile(CODEC / name, args.out / name)
    shutil.copyfile(args.runs / "data" / "tokenizer.model", args.out / "tokenizer.model")
    config = {
        "model_type": "moshi",
        "moshi_name": "model.safetensors",
        "mimi_name": "mimi.safetensors",
        "mimi_config_name": "mimi_config.json",
        "tokenizer_name": "tokenizer.model",
        **kwargs,
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
