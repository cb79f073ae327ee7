"""A report of TTT at work while recordings are answered: by layer and chunk, beside the words."""

import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.data import FRAME_RATE_HZ
from finetune.errors import UserError
from finetune.serve.engine import Engine, Row
from finetune.serve.words import Words

MEANING = {
    "change": "how far the fast weights are from where they start, ‖S‖ / ‖W0‖",
    "written": "how much this chunk changed them, ‖S_after − S_before‖ / ‖W0‖",
    "effect": "how much that changed the layer's output, ‖S z‖ / ‖W0 z‖, mean over the chunk",
}
_COLORS = ("#1f6feb", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 760, 180, 56, 24


@dataclass
class _Seen:
    """One recording so far."""

    name: str
    effects: dict[int, list[float]] = field(default_factory=dict)
    """By layer, of the frames of the open chunk."""
    before: dict[int, Tensor] = field(default_factory=dict)
    """By layer, the fast weights at its start."""
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
            folder.mkdir(parents=True, exist_ok=True)
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
            "meaning": MEANING,
            "update_frames": self.update_frames,
            "layers": list(self.layers),
            "recordings": self.done,
        }
        text = json.dumps(whole, ensure_ascii=False, indent=1)
        (self.folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (self.folder / "report.html").write_text(_page(whole), encoding="utf-8")
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
    """One page, with nothing from elsewhere."""
    parts = [_chapter(each, whole["layers"]) for each in whole["recordings"]]
    meaning = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in MEANING.items())
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'><title>What TTT did</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
        "color-scheme:light dark}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        "td,th{padding:.2rem .7rem;text-align:right;vertical-align:top;border-top:1px solid #8884}"
        "td:last-child,th:last-child{text-align:left}svg{max-width:100%;height:auto}"
        "svg text{font-size:12px;fill:currentColor}dt{font-weight:600}.wide{overflow-x:auto}"
        f"</style><h1>What TTT did</h1><dl>{meaning}</dl>{''.join(parts)}</html>\n"
    )


def _chapter(recording: dict[str, Any], layers: list[int]) -> str:
    heads = "".join(f"<th>layer {i}: change</th><th>written</th><th>effect</th>" for i in layers)
    lines = []
    for chunk in recording["chunks"]:
        cells = "".join(
            f"<td>{chunk['layers'][i][name]:.3g}</td>" for i in layers for name in MEANING
        )
        words = " ".join(
            html.escape(w["word"])
            for w in recording["words"]
            if chunk["start_sec"] <= w["start_sec"] < chunk["end_sec"]
        )
        times = f"{chunk['start_sec']:.1f}–{chunk['end_sec']:.1f} s"
        lines.append(f"<tr><td>{times}</td>{cells}<td>{words}</td></tr>")
    return (
        f"<h2>{html.escape(recording['recording'])}</h2>{_figure(recording['chunks'], layers)}"
        f"<div class=wide><table><tr><th>chunk</th>{heads}<th>Moshi says</th></tr>"
        f"{''.join(lines)}</table></div>"
    )


def _figure(chunks: list[dict[str, Any]], layers: list[int]) -> str:
    """The change of each layer over time."""
    last_sec = chunks[-1]["end_sec"]
    highest = max(max(c["layers"][i]["change"] for c in chunks for i in layers), 1e-9)
    lines = []
    for index, layer in enumerate(layers):
        color = _COLORS[index % len(_COLORS)]
        points = [(0.0, 0.0), *((c["end_sec"], c["layers"][layer]["change"]) for c in chunks)]
        path = " ".join(
            f"{_LEFT + (_WIDTH - _LEFT) * sec / last_sec:.1f},"
            f"{(_HEIGHT - _BOTTOM) * (1 - 0.9 * value / highest):.1f}"
            for sec, value in points
        )
        lines.append(f"<polyline points='{path}' fill=none stroke='{color}' stroke-width=2 />")
        at = _LEFT + 10 + 90 * index
        lines.append(f"<text x={at} y=14 style='fill:{color}'>layer {layer}</text>")
    base = _HEIGHT - _BOTTOM
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width={_WIDTH} role=img "
        "aria-label='Change of each layer over time'>"
        f"<path d='M{_LEFT} {base}H{_WIDTH}M{_LEFT} {0.1 * base:.1f}H{_WIDTH}' stroke='#8886' />"
        f"<text x={_LEFT - 6} y={base} text-anchor=end>0</text>"
        f"<text x={_LEFT - 6} y={0.1 * base + 4:.1f} text-anchor=end>{highest:.2g}</text>"
        f"<text x={_LEFT} y={_HEIGHT - 6}>0 s</text>"
        f"<text x={_WIDTH} y={_HEIGHT - 6} text-anchor=end>{last_sec:.0f} s</text>"
        f"{''.join(lines)}</svg>"
    )
