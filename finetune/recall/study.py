"""Does one default learn? The recall task over sizes of embeddings, widths and chunks."""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.recall.experiment import train
from finetune.recall.jobs import Job, run_jobs
from finetune.recall.measure import measure_trained_length
from finetune.recall.model import ModelArgs, new_model, read_codes
from finetune.recall.options import num_heads
from finetune.recall.presets import Preset
from finetune.recall.streams import StreamArgs, draw
from ttt import TTTArgs

logger = logging.getLogger(__name__)

EMBEDDING_STDS = (0.02, 0.14, 1.0)
WIDTHS = (64, 256, 1024)
CHUNK_SIZES = (16, 64, 256)
FORMS: dict[str, dict[str, Any]] = {
    "sum, none, η 1e-3": {"write": "sum", "lr_scale": "none", "learning_rate": 1e-3},
    "sum, none, η 0.01": {"write": "sum", "lr_scale": "none", "learning_rate": 0.01},
    "sum, none, η 0.1": {"write": "sum", "lr_scale": "none", "learning_rate": 0.1},
    "sum, none, η 1": {"write": "sum", "lr_scale": "none", "learning_rate": 1.0},
    "delta, none": {"write": "delta", "lr_scale": "none"},
    "sum, relative": {"write": "sum", "lr_scale": "relative"},
    "delta, relative": {"write": "delta", "lr_scale": "relative"},
}
NUM_STEPS = 200
LEARNT_ACCURACY = 0.9
"""Where training stops early: all answers but those to facts that straddle chunks."""
NUM_EVAL = 64


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the study."""

    form: str
    embedding_std: float
    width: int
    chunk_size: int
    seed: int

    @property
    def name(self) -> str:
        form = "".join(c if c.isalnum() or c in ".-" else "_" for c in self.form)
        return (
            f"{form}_std{self.embedding_std:g}_width{self.width}_chunk{self.chunk_size}"
            f"_seed{self.seed}"
        )


def cells(
    *,
    stds: Sequence[float] = EMBEDDING_STDS,
    widths: Sequence[int] = WIDTHS,
    chunk_sizes: Sequence[int] = CHUNK_SIZES,
    forms: Sequence[str] = tuple(FORMS),
    seeds: Sequence[int] = (0,),
) -> list[Cell]:
    """All combinations, the widest, which take longest, first."""
    everything = itertools.product(sorted(widths, reverse=True), chunk_sizes, stds, forms, seeds)
    return [Cell(form, std, width, size, seed) for width, size, std, form, seed in everything]


def preset_of(cell: Cell) -> Preset:
    """The experiment that a cell is. Sequences are 256 frames long, and 1024 with chunks of 256,
    with as many answers in a batch."""
    model = ModelArgs(
        width=cell.width,
        num_heads=num_heads(cell.width),
        embedding_std=cell.embedding_std,
    )
    is_long = cell.chunk_size > 64
    # As is usual, wider models are trained with lower rates; the same in all forms.
    lr = 2e-3 * (64 / cell.width) ** 0.5
    return Preset(
        StreamArgs(
            reach_frames=model.reach_frames,
            num_frames=1024 if is_long else 256,
            num_pairs=24 if is_long else 12,
        ),
        model,
        arms=(),
        ttt={"start_layer": 0, "layer_frequency": 1},
        chunk_size=cell.chunk_size,
        mini_batch_size=16,
        num_steps=NUM_STEPS,
        batch_size=8 if is_long else 16,
        num_eval=NUM_EVAL,
        lengths={},
        lr=lr,
        ttt_lr=lr,
    )


def run_cell(cell: Cell, preset: Preset, device: torch.device) -> dict[str, Any]:
    """Train and measure one cell."""
    args = TTTArgs(enabled=True, chunk_size=cell.chunk_size, **preset.ttt, **FORMS[cell.form])
    model = new_model(
        preset.model, preset.streams, args, context=None, seed=cell.seed, device=device,
        dtype=torch.float32,
    )  # fmt: skip
    curve = train(
        model, preset, seed=cell.seed, lr=preset.lr, label=cell.name, stop_at=LEARNT_ACCURACY
    )
    found = measure_trained_length(
        model.eval(),
        preset.streams,
        num_sequences=preset.num_eval,
        batch=preset.batch_size,
        update_frames=cell.chunk_size,
    )
    return {"cell": dataclasses.asdict(cell), "curve": curve, "trained_length": found}


@torch.no_grad()
def key_match(embedding_std: float, width: int) -> dict[int, tuple[float, float, float]]:
    """Return how well an untrained model's activations tell a key from the others when it comes
    again.

    Returns:
        By layer: mean cosine of z at a question and at its own fact, at the other facts, and the
        share of questions whose own fact is the most similar.
    """
    preset = preset_of(Cell("delta, relative", embedding_std, width, 64, 0))
    args = TTTArgs(enabled=True, **preset.ttt)
    model = new_model(
        preset.model, preset.streams, args, context=None, seed=0, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    found = {}
    streams = draw(preset.streams, batch=8, seed=0)

    def compare(z: Tensor) -> tuple[float, float, float]:
        # A model reads the code of frame t at position t + 1.
        asked, facts = (
            F.normalize(z.gather(1, at[:, :, None].expand(-1, -1, z.shape[2])), dim=-1)
            for at in (streams.answers, streams.facts + 1)
        )
        cosines = asked @ facts.transpose(1, 2)
        own = torch.eye(cosines.shape[1], dtype=torch.bool).expand_as(cosines)
        nearest = cosines.argmax(-1) == torch.arange(cosines.shape[1])
        return (
            cosines[own].mean().item(), cosines[~own].mean().item(), nearest.float().mean().item()
        )  # fmt: skip

    for index, layer in model.ttt_layers.items():
        layer.linear_out.register_forward_pre_hook(
            lambda _, inputs, index=index: found.update({index: compare(inputs[0])})
        )
    model.forward_text(read_codes(model, streams.codes)[:, :, :-1])
    return found


def run_study(
    chosen: Sequence[Cell], out: Path, *, device: torch.device, workers: int
) -> list[dict[str, Any]]:
    """The results of the chosen cells.

    Raises:
        UserError: see `run_jobs`.
    """
    jobs = []
    for cell in chosen:
        preset = preset_of(cell)
        config = {"form": FORMS[cell.form], "device": device.type, **dataclasses.asdict(preset)}
        config = {k: v for k, v in config.items() if k not in ("arms", "lengths", "dtype")}
        jobs.append(Job(cell.name, config, run_cell, (cell, preset, device)))
    return run_jobs(jobs, out, workers=workers)
