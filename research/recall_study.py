"""Does one default learn? The recall task over sizes of embeddings, widths and chunks.

    python research/recall_study.py scale --out runs/recall/study_scale
    python research/recall_study.py keys --out runs/recall/study_keys

`scale` trains seven forms of the update, 27 places each; what is in the folder already is not
trained again, and the widest model belongs on a GPU. `keys` trains nothing: it asks how well fresh
models tell keys apart, in seconds.
"""

import argparse
import dataclasses
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.cli import run
from finetune.distributed import join_world
from finetune.errors import UserError
from finetune.monitoring import setup_logging
from finetune.recall.experiment import train
from finetune.recall.folder import prepare_folder, write_report
from finetune.recall.jobs import Job, run_jobs
from finetune.recall.measure import measure_trained_length
from finetune.recall.model import ModelArgs, new_model, read_codes
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
LEARNED_ACCURACY = 0.9
"""Where training stops early: all answers but those to facts that straddle chunks."""
NUM_EVAL = 64


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell is one run of the study."""

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
    """Return all combinations, the widest, which take longest, first."""
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
    sizes: dict[str, Any] = {"chunk_size": cell.chunk_size, **preset.ttt}
    args = TTTArgs(enabled=True, target="text", **sizes, **FORMS[cell.form])
    model = new_model(
        preset.model, preset.streams, args, context=None, seed=cell.seed, device=device,
        dtype=torch.float32,
    )  # fmt: skip
    curve = train(
        model, preset, seed=cell.seed, lr=preset.lr, label=cell.name, stop_at=LEARNED_ACCURACY
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
        layer.register_forward_pre_hook(
            lambda layer, inputs, index=index: found.update(
                {index: compare(layer._activations(inputs[0]))}
            )
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


def num_heads(width: int) -> int:
    """Return the number of heads of a model of this width.

    Raises:
        UserError: it cannot be divided into heads of an even size.
    """
    heads = max(4, width // 64)
    if width < 16 or width % (2 * heads):
        raise UserError(
            f"--widths: {width} cannot be divided into {heads} heads of an even size; choose a "
            f"multiple of {2 * heads} from 16 on."
        )
    return heads


def scale_report(
    out: Path, *, widths: Sequence[int], seeds: Sequence[int], device: str, workers: int
) -> str:
    """Run the study of scales; returns its report, which is in `out/report.md` as well.

    Raises:
        UserError: `out` cannot be written.
    """
    setup_logging()
    prepare_folder(out, "--study scale")
    results = run_study(
        cells(widths=widths, seeds=seeds),
        out / "runs",
        device=join_world(device).device,  # type: ignore[arg-type]
        workers=workers,
    )
    lines = [
        f"Accuracy at facts within one chunk after {NUM_STEPS} steps or less (chance "
        f"{1 / results[0]['config']['streams']['num_values']:.2f}):",
        "",
        *study_table(results),
    ]
    return write_report("\n".join(lines), out)


def keys_report(out: Path, *, widths: Sequence[int]) -> str:
    """Ask how well untrained models tell keys apart; returns a table, which is in `out/report.md`
    too.

    Raises:
        UserError: `out` cannot be written.
    """
    prepare_folder(out, "--study keys")
    lines = [
        "Cosine of z at a question and at its own fact / at the others (share of questions nearest "
        "to their own fact), before training:",
        "",
        "| width | embeddings' std | first layer | second layer |",
        "| --- | --- | --- | --- |",
    ]
    for width in widths:
        for std in EMBEDDING_STDS:
            cells = [
                f"{own:.2f} / {others:.2f} ({nearest:.2f})"
                for own, others, nearest in key_match(std, width).values()
            ]
            lines.append(f"| {width} | {std:g} | {' | '.join(cells)} |")
    return write_report("\n".join(lines), out)


def study_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: accuracy within one chunk of the study's forms, by width, embeddings and chunk; the
    mean of the seeds, and the least of them where they differ."""
    by_cell: dict[tuple[Any, ...], list[float]] = {}
    for result in results:
        cell = result["cell"]
        key = (cell["width"], cell["embedding_std"], cell["chunk_size"], cell["form"])
        accuracy = result["trained_length"]["in one chunk"]["accuracy"]
        by_cell.setdefault(key, []).append(accuracy[0])
    forms = list(dict.fromkeys(key[3] for key in by_cell))
    lines = [
        f"| width | embeddings' std | chunk | {' | '.join(forms)} |",
        "| --- " * (3 + len(forms)) + "|",
    ]
    for place in sorted({key[:3] for key in by_cell}):
        cells = [_seeds(by_cell.get((*place, form), [])) for form in forms]
        lines.append(f"| {' | '.join(f'{x:g}' for x in place)} | {' | '.join(cells)} |")
    counts = [[v for key, vs in by_cell.items() if key[3] == form for v in vs] for form in forms]
    learned = [f"{sum(v >= 0.9 for v in values)} of {len(values)}" for values in counts]
    lines.append(f"| runs that reach 0.90 | | | {' | '.join(learned)} |")
    return lines


def _seeds(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = sum(values) / len(values)
    return f"{mean:.2f}" + (f" (≥ {min(values):.2f})" if min(values) < mean - 0.01 else "")


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("scale", "keys"))
    parser.add_argument("--out", type=Path, required=True, help="folder of report and results")
    parser.add_argument("--widths", type=_numbers, default=list(WIDTHS), help="as in 64,256")
    parser.add_argument("--seeds", type=_numbers, default=[0], help="of `scale`, as in 0,1")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, default=1, help="runs of `scale` at a time")
    args = parser.parse_args()

    def study() -> None:
        for width in args.widths:
            num_heads(width)
        if args.study == "keys":
            print(keys_report(args.out, widths=args.widths))
        else:
            where = {"device": args.device, "workers": args.workers}
            print(scale_report(args.out, widths=args.widths, seeds=args.seeds, **where))

    return run(study)


if __name__ == "__main__":
    sys.exit(main())
