"""A report of TTT at work while recordings are answered: by layer and chunk, beside the words."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.data import FRAME_RATE_HZ
from finetune.errors import UserError
from finetune.kept import MARK, make_folder, mark_of, write_whole
from finetune.report import Entry, Page, Section, Table, html_page, line_style, svg_element, tidy
from finetune.serve.engine import Engine, Row
from finetune.serve.words import Words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANING = {
    "change": "how far the fast weights are from where they start, ‖S‖ / ‖W0‖",
    "written": "how much this chunk changed them, ‖S_after − S_before‖ / ‖W0‖",
    "effect": "how much that changed the layer's output, ‖S z‖ / ‖W0 z‖, mean over the chunk",
}


@dataclass
class _Seen:
    """Measurements of a recording so far."""

    name: str
    effects: dict[int, list[float]] = field(default_factory=dict)
    """Effects of the frames of the open chunk, by layer."""
    before: dict[int, Tensor] = field(default_factory=dict)
    """Fast weights at the chunk's start, by layer."""
    chunks: list[dict[str, Any]] = field(default_factory=list)


class Report:
    """Looks on while an engine works.

    Args:
        folder: where report.json and report.html go.

    Raises:
        UserError: a model without TTT, or a folder that cannot be made.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        if not engine.model.ttt_layers:
            raise UserError("--report: this checkpoint has no TTT, so there is nothing to report.")
        try:
            make_folder(folder)
        except OSError as error:
            raise UserError(f"--report: {folder} cannot be made ({error.strerror}).") from None
        self.engine, self.folder = engine, folder
        self.layers = engine.model.ttt_layers
        self.update_frames = engine.model.ttt_args.update_frames
        self.done: list[dict[str, Any]] = []
        self._seen: dict[int, _Seen] = {}
        for module in self.layers.values():
            module.measures_stream = True

    def begin(self, row: Row, name: str) -> None:
        self._seen[row.index] = _Seen(name, before=self._weights(row))

    def look(self, rows: list[Row]) -> None:
        """After a step that these rows have heard in."""
        effects = {i: m.stream_effect.tolist() for i, m in self.layers.items()}  # type: ignore[union-attr]
        changes = None
        for row in rows:
            seen = self._seen[row.index]
            for layer, by_row in effects.items():
                seen.effects.setdefault(layer, []).append(by_row[row.index])
            if row.num_frames % self.update_frames == 0:
                changes = changes or self.engine.changes()
                self._close_chunk(row, seen, changes)

    def end(self, row: Row, words: Words) -> None:
        """After a recording's last frame."""
        seen = self._seen.pop(row.index)
        if seen.effects:
            self._close_chunk(row, seen, self.engine.changes())
        said = [{"word": w, "start_sec": start, "end_sec": end} for w, start, end in words.done]
        self.done.append({"recording": seen.name, "chunks": seen.chunks, "words": said})

    def write(self) -> None:
        """Write both files."""
        self.done.sort(key=lambda each: each["recording"])
        whole = {
            MARK: mark_of("generate"),
            "meaning": MEANING,
            "update_frames": self.update_frames,
            "layers": list(self.layers),
            "recordings": self.done,
        }
        text = json.dumps(whole, ensure_ascii=False, indent=1)
        write_whole(self.folder / "report.json", text + "\n")
        write_whole(self.folder / "report.html", _page(whole))
        for module in self.layers.values():
            module.measures_stream = False

    def _close_chunk(self, row: Row, seen: _Seen, changes: dict[int, list[float]]) -> None:
        weights = self._weights(row)
        by_layer = {}
        for layer, module in self.layers.items():
            written = (weights[layer] - seen.before[layer]).norm() / module.start_norm()
            effects = seen.effects[layer]
            by_layer[layer] = {
                "change": changes[layer][row.index],
                "written": float(written),
                "effect": sum(effects) / len(effects),
            }
        start = seen.chunks[-1]["end_sec"] if seen.chunks else 0.0
        end = round(start + len(next(iter(seen.effects.values()))) / FRAME_RATE_HZ, 2)
        seen.chunks.append({"start_sec": start, "end_sec": end, "layers": by_layer})
        seen.before, seen.effects = weights, {}

    def _weights(self, row: Row) -> dict[int, Tensor]:
        """A copy of a row's fast weights, flat, by layer."""
        return {
            layer: torch.cat(
                [w[row.index].flatten() for w in module._streaming_state.fast_weights()]
            )
            for layer, module in self.layers.items()
        }


def _page(whole: dict[str, Any]) -> str:
    entries = [Entry(name, text) for name, text in MEANING.items()]
    layers = whole["layers"]
    chapters = [_chapter(each, layers) for each in whole["recordings"]]
    return html_page(
        Page("What TTT did", [Section("", entries=entries), *chapters], generator=whole[MARK])
    )


def _chapter(recording: dict[str, Any], layers: list[int]) -> Section:
    columns = ["chunk, s", *(f"layer {i}: {name}" for i in layers for name in MEANING)]
    rows = []
    for chunk in recording["chunks"]:
        start, end = chunk["start_sec"], chunk["end_sec"]
        said = [w["word"] for w in recording["words"] if start <= w["start_sec"] < end]
        numbers = [f"{chunk['layers'][i][name]:.3g}" for i in layers for name in MEANING]
        rows.append([f"{start:.1f} to {end:.1f}", *numbers, " ".join(said)])
    return Section(
        recording["recording"],
        figure=svg_element(_figure(recording["chunks"], layers)),
        tables=[Table([*columns, "Moshi says"], rows)],
    )


def _figure(chunks: list[dict[str, Any]], layers: list[int]) -> "Figure":
    """Draw the change of each layer over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.add_subplot()
    times = [0.0, *(chunk["end_sec"] for chunk in chunks)]
    for index, layer in enumerate(layers):
        changes = [0.0, *(chunk["layers"][layer]["change"] for chunk in chunks)]
        axes.plot(times, changes, label=f"layer {layer}", **line_style(index))
    axes.set_xlabel("time, s")
    axes.set_ylabel("change")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    tidy(axes)
    return figure
