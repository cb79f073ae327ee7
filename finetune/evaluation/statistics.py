"""Intervals: bootstrap over recordings, and over pairs the score interval of a proportion.

All intervals are of 95 %. A recording is what is drawn: its frames are no independent samples.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
Z_95 = 1.959964

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; None where there is too little to tell."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and self.low * self.high > 0


class Bootstrap:
    """How often each of R recordings is drawn in each resample; the same for all that is compared,
    so that differences are paired."""

    def __init__(self, num_recordings: int, *, seed: int = 0) -> None:
        self.num_recordings = num_recordings
        generator = np.random.default_rng(seed)
        shares = np.full(num_recordings, 1 / num_recordings)
        self._draws = generator.multinomial(num_recordings, shares, NUM_RESAMPLES).astype(float)

    def ratio(self, numerator: Array, denominator: Array) -> Estimate:
        """Σ numerator / Σ denominator over recordings, both [R]."""
        value = _divide(numerator.sum(), denominator.sum())
        samples = _divide(self._draws @ numerator, self._draws @ denominator)
        return self._estimate(value, samples, denominator)

    def ratio_difference(
        self, numerators: tuple[Array, Array], denominators: tuple[Array, Array]
    ) -> Estimate:
        """The first ratio minus the second, over the same recordings."""
        value, other = (
            _divide(n.sum(), d.sum()) for n, d in zip(numerators, denominators, strict=True)
        )
        samples, others = (
            _divide(self._draws @ n, self._draws @ d)
            for n, d in zip(numerators, denominators, strict=True)
        )
        return self._estimate(value - other, samples - others, denominators[0])

    def _estimate(self, value: Array, samples: Array, denominator: Array) -> Estimate:
        if not np.isfinite(value):
            return Estimate(None, None, None)
        # Of one recording alone nothing can be said about others.
        if (denominator > 0).sum() < 2:
            return Estimate(float(value), None, None)
        low, high = np.nanpercentile(samples, [2.5, 97.5])
        return Estimate(float(value), float(low), float(high))


def slope_parts(x: Array, loss: Array, weight: Array) -> tuple[Array, Array]:
    """Of each recording, Σ w (x − x̄)(l − l̄) and Σ w (x − x̄)²: summed over recordings, their ratio
    is the slope of the loss within recordings.

    Each recording has a level of its own, so that late positions, which only long recordings have,
    are compared with early ones of the same recordings.

    Args:
        x: [b]. loss: [R, b], Σ w · CE of a bin. weight: [R, b].
    """
    mean = _divide(loss, weight)
    total = weight.sum(1, keepdims=True)
    x_centred = x - _divide((weight * x).sum(1, keepdims=True), total)
    centred = np.nan_to_num(mean - _divide(loss.sum(1, keepdims=True), total))
    x_centred = np.nan_to_num(x_centred)
    return (weight * x_centred * centred).sum(1), (weight * x_centred**2).sum(1)


def proportion(successes: float, count: int) -> Estimate:
    """successes / count with Wilson's score interval, which is sensible at 0 and 1 too."""
    if count == 0:
        return Estimate(None, None, None)
    share, z2 = successes / count, Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def mean(values: Array) -> Estimate:
    """The mean of independent values, with the normal interval."""
    count = len(values)
    if count == 0:
        return Estimate(None, None, None)
    value = float(values.mean())
    if count == 1:
        return Estimate(value, None, None)
    half = Z_95 * float(values.std(ddof=1)) / math.sqrt(count)
    return Estimate(value, value - half, value + half)


def _divide(numerator: Array, denominator: Array) -> Array:
    """NaN where the denominator is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, np.divide(numerator, denominator), np.nan)
