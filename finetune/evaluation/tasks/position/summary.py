"""Records of recordings become loss by position, with intervals."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from finetune.data import FRAME_RATE_HZ
from finetune.evaluation.streams import STREAMS
from finetune.statistics import Array, Bootstrap, Estimate, slope_parts

COMPARISONS = (
    ("on", "off"),
    ("reset", "off"),
    ("carried", "off"),
    ("baseline", "off"),
    ("on", "reset"),
    ("on", "carried"),
    ("on", "baseline"),
)
"""Arms whose difference is of interest, where both are there."""
MIN_DOUBLINGS = 2
MIN_HOURS = 0.1
"""Least that a recording must cover for its part in a slope per doubling and in one per hour. What
is seen of less would be multiplied by more than ten to make an hour of it, noise included."""

Json = dict[str, Any]


class _Sums:
    """Sums of one arm and stream over the recordings: Σ w · CE and Σ w, [R, bins]."""

    def __init__(self, records: Sequence[Mapping[str, Any]], stream: str, num_bins: int) -> None:
        self.loss, self.weight = (
            np.array([_padded(r["streams"][stream][name], num_bins) for r in records])
            for name in ("loss", "weight")
        )


def _padded(values: Sequence[float], length: int) -> list[float]:
    return [*values, *[0.0] * (length - len(values))]


def summarize_positions(
    records: Iterable[Mapping[str, Any]],
    *,
    bin_frames: int,
    window_frames: int,
    vocabulary: Mapping[str, int],
    seed: int = 0,
) -> Json:
    """Loss by position of every arm, and paired differences between arms.

    Only recordings that every arm has are counted, so that the arms are of the same data.

    Args:
        records: of `PositionRun`.
        window_frames: what attention sees; `beyond_window` is of the positions after it.
        vocabulary: of each stream, for the loss of guessing.
    """
    by_arm: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        by_arm.setdefault(record["arm"], {})[record["recording"]] = record
    arms = list(by_arm)
    everyone = [by_arm[arm].keys() for arm in arms]
    names = [name for name in next(iter(by_arm.values()), {}) if all(name in e for e in everyone)]
    if not names:
        return {"arms": {}, "num_recordings": 0}
    rows = {arm: [by_arm[arm][name] for name in names] for arm in arms}
    num_frames = [record["num_frames"] for record in rows[arms[0]]]
    num_bins = -(-max(num_frames) // bin_frames)
    view = _View(bin_frames, num_bins, window_frames, Bootstrap(len(names), seed=seed))
    sums = {arm: {s: _Sums(rows[arm], s, num_bins) for s in STREAMS} for arm in arms}
    compared = COMPARISONS if "on" in arms else (*COMPARISONS, ("off", "baseline"))
    differences = [pair for pair in compared if {*pair} <= {*arms}]
    return {
        "num_recordings": len(names),
        "duration_sec": sum(num_frames) / FRAME_RATE_HZ,
        "longest_sec": max(num_frames) / FRAME_RATE_HZ,
        "attention_window_sec": window_frames / FRAME_RATE_HZ,
        "bin_sec": bin_frames / FRAME_RATE_HZ,
        "guessing": {stream: math.log(size) for stream, size in vocabulary.items()},
        "arms": {
            arm: {stream: view.describe(sums[arm][stream]) for stream in STREAMS} for arm in arms
        },
        "differences": [
            {
                "arms": [one, other],
                **{s: view.describe(sums[one][s], sums[other][s]) for s in STREAMS},
            }
            for one, other in differences
        ],
    }


class _View:
    """The places that a loss is looked at: overall, beyond the window, in bins, and its slopes."""

    def __init__(
        self, bin_frames: int, num_bins: int, window_frames: int, bootstrap: Bootstrap
    ) -> None:
        self.bin_frames = bin_frames
        self.num_bins = num_bins
        self.bootstrap = bootstrap
        self.first_beyond = min(-(-window_frames // bin_frames), num_bins)
        self.centers_sec = (np.arange(num_bins) + 0.5) * bin_frames / FRAME_RATE_HZ

    def describe(self, sums: _Sums, other: _Sums | None = None) -> Json:
        """Return the description of a loss, or of its difference to another."""
        beyond = slice(self.first_beyond, None)
        doublings, hours = np.log2(self.centers_sec), self.centers_sec / 3600
        # From the first bin's start to the last one's end; of doublings, from center to center,
        # since the first bin starts at 0.
        least_hours = MIN_HOURS - self.bin_frames / FRAME_RATE_HZ / 3600
        curve = []
        for start, stop in pairwise_edges(self.num_bins):
            estimate = self._mean(sums, other, slice(start, stop))
            if estimate.value is not None:
                weight = sums.weight[:, start:stop].sum(1)
                place = {
                    "start_sec": start * self.bin_frames / FRAME_RATE_HZ,
                    "stop_sec": stop * self.bin_frames / FRAME_RATE_HZ,
                    "weight": float(weight.sum()),
                }
                curve.append({**place, **dataclasses.asdict(estimate)})
        return {
            "mean": self._json(self._mean(sums, other, slice(None))),
            "beyond_window": self._json(self._mean(sums, other, beyond)),
            "slope_per_doubling": self._json(
                self._slope(sums, other, doublings, slice(None), MIN_DOUBLINGS)
            ),
            "slope_per_hour_beyond_window": self._json(
                self._slope(sums, other, hours, beyond, least_hours)
            ),
            "curve": curve,
        }

    @staticmethod
    def _json(estimate: Estimate) -> Json:
        return dataclasses.asdict(estimate)

    def _mean(self, sums: _Sums, other: _Sums | None, bins: slice) -> Estimate:
        loss, weight = sums.loss[:, bins].sum(1), sums.weight[:, bins].sum(1)
        if other is None:
            return self.bootstrap.ratio(loss, weight)
        return self.bootstrap.ratio_difference(
            (loss, other.loss[:, bins].sum(1)), (weight, other.weight[:, bins].sum(1))
        )

    def _slope(
        self, sums: _Sums, other: _Sums | None, x: Array, bins: slice, least: float
    ) -> Estimate:
        """Return the slope over x within the recordings that cover at least `least` of it."""

        def parts(s: _Sums) -> tuple[Array, Array]:
            weight = s.weight[:, bins]
            is_enough = _covered(x[bins], weight) >= least - 1e-9
            rise, spread = slope_parts(x[bins], s.loss[:, bins], weight)
            return np.where(is_enough, rise, 0.0), np.where(is_enough, spread, 0.0)

        rise, spread = parts(sums)
        if other is None:
            return self.bootstrap.ratio(rise, spread)
        other_rise, other_spread = parts(other)
        return self.bootstrap.ratio_difference((rise, other_rise), (spread, other_spread))


def _covered(x: Array, weight: Array) -> Array:
    """Return how far the bins of each recording lie apart, [R], those without weight left out."""
    counts = weight > 0
    last = np.where(counts, x, -np.inf).max(axis=1, initial=-np.inf)
    return last - np.where(counts, x, np.inf).min(axis=1, initial=np.inf)


def pairwise_edges(num_bins: int) -> list[tuple[int, int]]:
    """Ranges of bins for a curve: single ones first, then two to a doubling of the position."""
    edges, edge = [0, 1, 2, 3], 4
    while edge < num_bins:
        edges += [edge, edge * 3 // 2]
        edge *= 2
    inner = [e for e in edges if e < num_bins]
    # A rest that is short beside its neighbor is part of it.
    if len(inner) > 1 and num_bins - inner[-1] < (inner[-1] - inner[-2]) / 2:
        inner.pop()
    return list(zip(inner, [*inner[1:], num_bins], strict=True))
