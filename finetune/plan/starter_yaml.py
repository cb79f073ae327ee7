"""The text of a first configuration, with its comments."""

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from finetune.config import Precision
from finetune.data import FRAME_RATE_HZ, count_frames
from finetune.errors import counted
from ttt.config import TTTArgs

Goal = Literal["remember", "adapt"]
GB = 1e9

_CHUNK_FRAMES = 256
_FEWEST_TTT_LAYERS = 2
"""With fewer by default, every other layer of a model has TTT."""
SMALL_WIDTH = 2048
"""Models that are narrower learn with far larger rates than Moshi 7B, which is 4096 wide."""


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
class Size:
    """Sizes that depend on memory, on data and on the model."""

    num_layers: int
    width: int
    random_init: bool
    """The model is a small one that has no weights yet."""
    window_sec: float
    """What attention sees."""
    duration_sec: int
    batch_size: int
    num_microbatches: int
    shard_size: int
    max_steps: int
    attention_context: int | None
    base_precision: Precision
    own_ttt: TTTArgs | None
    """The TTT that lies beside the model's weights, which the run goes on from."""

    @property
    def is_small(self) -> bool:
        return self.width < SMALL_WIDTH


def _chunk_frames(num_frames: int) -> int:
    """Return how many frames a chunk has, so that some eight are in a segment."""
    return min(_CHUNK_FRAMES, max(5, num_frames // 8))


_MADE_FOR = re.compile(r"# Made by moshi-ttt init: to \w+, on (\d+) x ([\d.e+]+) GB")


def made_for(config: Path) -> tuple[int, float] | None:
    """Return how many GPUs `init` has made a file for, and how many GB each has; None: the file is
    not of `init`, or no longer says so."""
    with config.open(encoding="utf-8", errors="replace") as file:
        found = _MADE_FOR.match(file.readline())
    return (int(found[1]), float(found[2])) if found else None


def yaml_of(wanted: Wanted, size: Size, peak_bytes: float | None, lengths_sec: np.ndarray) -> str:
    """Return the YAML, with comments."""
    num_frames = count_frames(size.duration_sec)
    size_of_data = f"{counted(len(lengths_sec), 'recording')}, {lengths_sec.sum() / 3600:.2f} h"
    peak = f", some {whole_gb(peak_bytes)} GB at the peak" if peak_bytes else ""
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
        *_start_lines(wanted, size),
        *_trained_lines(size),
        "",
    ]
    if size.own_ttt is not None:
        lines += _own_ttt_lines(size.own_ttt)
    else:
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
        *_rate_lines(size),
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


def whole_gb(num_bytes: float) -> str:
    """Return `12`; of what is less than one, the first digit."""
    return f"{num_bytes / GB:.0f}" if num_bytes >= GB else f"{num_bytes / GB:.1g}"


def _start_lines(wanted: Wanted, size: Size) -> list[str]:
    if size.own_ttt is None:
        return []
    return [f"  init_from: {_quoted(wanted.repo)}   # of its weights TTT's as well, which goes on"]


def _own_ttt_lines(own: TTTArgs) -> list[str]:
    """Return the TTT that a model was trained with: all that is not as by default."""
    default = TTTArgs(method=own.method)
    values = {
        each.name: getattr(own, each.name)
        for each in dataclasses.fields(own)
        if each.name in ("enabled", "method", "chunk_size")
        or getattr(own, each.name) != getattr(default, each.name)
    }
    lines = [f"  {name}: {json.dumps(value)}" for name, value in values.items()]
    return [
        "# As the model was trained: with other values its TTT would mean something else.",
        "ttt:",
        *lines,
        "",
    ]


def _trained_lines(size: Size) -> list[str]:
    if size.random_init:
        return [
            "  random_init: true   # it has no model.safetensors to start from",
            "",
            "full_finetuning: true   # LoRA would leave random weights as they are",
        ]
    return ["", "lora:", "  enable: true", "  rank: 128", "  scaling: 2."]


def _rate_lines(size: Size) -> list[str]:
    start = "start from nothing" if size.own_ttt is None else "go on from the model's"
    if size.is_small:
        return [
            "optim:",
            f"  lr: 2e-3       # for a model of this width, {size.width}; Moshi 7B takes 2e-6",
            f"  ttt_lr: 2e-3   # TTT parameters, which {start}",
        ]
    return [
        "optim:",
        "  lr: 2e-6       # LoRA",
        f"  ttt_lr: 3e-4   # TTT parameters, which {start}",
    ]


def _precision_lines(size: Size) -> list[str]:
    if size.is_small:
        lines = ["param_dtype: float32   # a small model has room for it, and a CPU is faster so"]
    else:
        lines = ["param_dtype: bfloat16"]
    base = f"base_precision: {size.base_precision}   # 4.5 bits a frozen weight: all 16 do not fit"
    return lines if size.base_precision == "bfloat16" else [*lines, base]


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
