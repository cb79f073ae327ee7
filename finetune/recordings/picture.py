"""The picture of a segment: what sounds on each side, what is said, and what a model is fed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data import FRAME_RATE_HZ, Word
from finetune.recordings.annotate import SPEAKERS
from finetune.recordings.options import SHOW
from finetune.recordings.shown import SAMPLE_RATE_HZ, Shown, Streams
from finetune.report import ALARM, COLORS, DARK, GRID, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIDES = ("left: Moshi", "right: the user")
_QUIET = 0.1
"""A word whose own channel has less than this share of the other's power is on the wrong side."""
_SILENT_POWER = 1e-7
_MAX_WIDTH = 60.0


def draw(shown: Shown, out: Path) -> None:
    """Draw a segment into a PNG.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.figure import Figure

    streams = shown.streams
    heights = [2.0, 2.0] + ([0.6, 1.8, 1.0] if streams else [])
    width = min(max(12.0, 0.9 * shown.duration_sec), _MAX_WIDTH)
    figure = Figure(figsize=(width, 1.0 + sum(heights)), dpi=110, layout="constrained")
    all_axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for channel in (0, 1):
        _draw_channel(all_axes[channel], shown, channel)
    if streams is not None:
        _draw_streams(all_axes[2:], streams, shown.start_sec)
    last = all_axes[-1]
    last.set_xlim(shown.start_sec, shown.start_sec + shown.duration_sec)
    last.set_xlabel("seconds from the start of the recording")
    all_axes[0].set_title(_title(shown), loc="left", fontsize=10)
    save_png(figure, out, SHOW)


def _title(shown: Shown) -> str:
    kinds = dict.fromkeys(f"{f.severity}: {f.code}" for f in shown.findings)
    # Names may hold what matplotlib takes for formulas.
    name = shown.recording.path.name.replace("$", r"\$")
    return "   ".join([name, *(kinds or ["nothing wrong was found"])])


def _draw_channel(axes: Axes, shown: Shown, channel: int) -> None:
    """Draw a waveform and, above it, the words of its speaker."""
    low, high = _envelope(shown.samples[channel])
    times = shown.start_sec + np.arange(len(low)) * shown.duration_sec / max(1, len(low))
    axes.fill_between(times, low, high, color=COLORS[channel], linewidth=0.4)
    axes.set_ylim(-1.05, 2.3)
    axes.set_yticks([-1, 0, 1])
    axes.set_ylabel(_SIDES[channel], color=COLORS[channel])
    axes.spines[["top", "right"]].set_visible(False)
    main = SPEAKERS[0]
    for word in shown.words:
        if (word.speaker == main) == (channel == 0):
            _draw_word(axes, word, _is_elsewhere(shown, word, channel))


def _draw_word(axes: Axes, word: Word, is_elsewhere: bool) -> None:
    color = ALARM if is_elsewhere else DARK
    start, end = word.start_sec, word.end_sec
    axes.axvspan(start, max(end, start), ymax=2.05 / 3.35, color=color, alpha=0.1, linewidth=0)
    axes.plot([start, start], [-1, 1.05], color=color, linewidth=0.6, alpha=0.6)
    text: dict[str, Any] = {"rotation": 55, "fontsize": 7.5, "rotation_mode": "anchor"}
    axes.text(start, 1.1, word.text.replace("$", r"\$"), color=color, clip_on=True, **text)


def _is_elsewhere(shown: Shown, word: Word, channel: int) -> bool:
    """Return whether a word's own side is silent, or far below the other one, while it is said."""
    start, end = (
        round((time - shown.start_sec) * SAMPLE_RATE_HZ) for time in (word.start_sec, word.end_sec)
    )
    piece = shown.samples[:, max(0, start) : max(0, end)]
    if not piece.size:
        return True
    own, other = (piece[[channel, 1 - channel]].astype(np.float64) ** 2).mean(axis=1)
    return bool(own < max(_SILENT_POWER, _QUIET * other))


def _envelope(samples: np.ndarray, num_points: int = 2400) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest sample of each of many short pieces."""
    size = max(1, len(samples) // num_points)
    pieces = samples[: len(samples) // size * size].reshape(-1, size)
    return pieces.min(axis=1), pieces.max(axis=1)


def _draw_streams(axes: np.ndarray, streams: Streams, start_sec: float) -> None:
    """Draw text tokens, codes and weights, frame by frame."""
    from matplotlib.colors import ListedColormap

    text, codes, weights = axes
    num_frames = len(streams.text)
    edges = start_sec + np.arange(num_frames + 1) / FRAME_RATE_HZ
    kinds = np.array([0 if not piece else 1 if piece == "·" else 2 for piece in streams.text])
    palette = ListedColormap([GRID, COLORS[4], COLORS[5]])  # padding, its end, words
    text.pcolormesh(edges, [0, 1], kinds[None], cmap=palette, vmin=0, vmax=2)
    size = 7.5 if num_frames <= 170 else 6
    for frame, piece in enumerate(streams.text):
        if piece and piece != "·":
            where = (start_sec + (frame + 0.5) / FRAME_RATE_HZ, 0.5)
            shown = piece.strip().replace("$", r"\$") or "▁"
            text.text(*where, shown, rotation=90, fontsize=size, ha="center", va="center")
    text.set_yticks([])
    text.set_ylabel("text", rotation=0, ha="right", va="center")
    valid = np.ma.masked_less(streams.codes, 0)
    codes.pcolormesh(edges, np.arange(17), valid, cmap="viridis")
    codes.invert_yaxis()
    codes.axhline(8, color="white", linewidth=1.5)
    codes.set_yticks([4, 12], ["Moshi's\ncodes", "the user's\ncodes"])
    codes.tick_params(axis="y", length=0)
    first, others = streams.audio_weights[0], streams.audio_weights[1:].mean(axis=0)
    for values, color, label, width in (
        (first, COLORS[0], "Moshi's first codebook", 4.0),
        (others, COLORS[2], "Moshi's others", 2.0),
        (streams.text_weights, DARK, "text", 1.2),
    ):
        style: dict[str, Any] = {"color": color, "linewidth": width, "label": label}
        weights.step(edges, np.append(values, values[-1]), where="post", **style)
    highest = max(1.0, float(streams.audio_weights.max(initial=0.0)))
    weights.set_yscale("symlog", linthresh=1)
    weights.set_ylim(-0.1, highest * 15)  # room for the legend
    weights.set_yticks([0, 1, highest], ["0", "1", f"{highest:g}"])
    weights.set_ylabel("loss\nweight", rotation=0, ha="right", va="center")
    weights.legend(fontsize=7, ncols=3, frameon=False, loc="upper right")
    weights.spines[["top", "right"]].set_visible(False)
