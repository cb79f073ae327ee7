"""Intervals: bootstrap over sequences, and over pairs the score interval of a proportion.

All intervals are of 95 %. What is drawn is a whole sequence, a recording or a synthetic stream: its
frames are no independent samples.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
Z_95 = 1.959964
MIN_SEQUENCES = 3
"""With fewer, there is no interval."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; None where there is too little to tell.

    count: of the sequences or pairs that it is of.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int


class Bootstrap:
    """Counts of how often each of R sequences is drawn in each resample; the same for all that is
    compared, so that differences are paired."""

    def __init__(self, num_sequences: int, *, seed: int = 0) -> None:
        self._draws = _draws(num_sequences, seed)

    def ratio(self, numerator: Array, denominator: Array) -> Estimate:
        """Return Σ numerator / Σ denominator over sequences, both [R]."""
        value = _divide(numerator.sum(), denominator.sum())
        samples = _divide(self._draws @ numerator, self._draws @ denominator)
        return self._estimate(value, samples, denominator > 0)

    def ratio_difference(
        self, numerators: tuple[Array, Array], denominators: tuple[Array, Array]
    ) -> Estimate:
        """Return the first ratio minus the second, over the same sequences."""
        value, other = (
            _divide(n.sum(), d.sum()) for n, d in zip(numerators, denominators, strict=True)
        )
        samples, others = (
            _divide(self._draws @ n, self._draws @ d)
            for n, d in zip(numerators, denominators, strict=True)
        )
        counts = (denominators[0] > 0) & (denominators[1] > 0)
        return self._estimate(value - other, samples - others, counts)

    @staticmethod
    def _estimate(value: Array, samples: Array, counts: NDArray[np.bool_]) -> Estimate:
        """The percentile interval, widened about the value for few sequences: resampling n of them
        gives (n − 1) / n of their variance, and takes the spread that it sees for the true one."""
        count = int(counts.sum())
        if not np.isfinite(value):
            return Estimate(None, None, None, count)
        if count < MIN_SEQUENCES:
            return Estimate(float(value), None, None, count)
        widening = student_t(0.975, count - 1) / Z_95 * math.sqrt(count / (count - 1))
        low, high = value + widening * (np.nanpercentile(samples, [2.5, 97.5]) - value)
        return Estimate(float(value), float(low), float(high), count)


@functools.lru_cache(maxsize=4)
def _draws(num_sequences: int, seed: int) -> Array:
    """Return the number of times that each sequence is drawn, [resamples, R]."""
    shares = np.full(num_sequences, 1 / num_sequences)
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_sequences, shares, NUM_RESAMPLES).astype(float)


@functools.cache
def student_t(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution.

    With t = √ν tan θ its density is proportional to cos^(ν−1) θ, which is integrated on a grid.
    """
    edges = np.linspace(-math.pi / 2, math.pi / 2, 100_001)
    mass = np.cos((edges[1:] + edges[:-1]) / 2) ** (degrees - 1)
    cumulative = np.concatenate([[0.0], mass.cumsum() / mass.sum()])
    return math.sqrt(degrees) * math.tan(np.interp(probability, cumulative, edges))


def slope_parts(x: Array, loss: Array, weight: Array) -> tuple[Array, Array]:
    """Return of each recording Σ w (x − x̄)(l − l̄) and Σ w (x − x̄)²: summed over recordings,
    their ratio is the slope of the loss within recordings.

    Each recording has a level of its own, so that late positions, which only long recordings have,
    are compared with early ones of the same recordings.

    Args:
        x: [b]. loss: [R, b], Σ w · CE of a bin. weight: [R, b].
    """
    mean = _divide(loss, weight)
    total = weight.sum(1, keepdims=True)
    x_centered = x - _divide((weight * x).sum(1, keepdims=True), total)
    centered = np.nan_to_num(mean - _divide(loss.sum(1, keepdims=True), total))
    x_centered = np.nan_to_num(x_centered)
    return (weight * x_centered * centered).sum(1), (weight * x_centered**2).sum(1)


def proportion(successes: float, count: int) -> Estimate:
    """successes / count with Wilson's score interval, which is sensible at 0 and 1 too."""
    if count == 0:
        return Estimate(None, None, None, 0)
    share, z2 = successes / count, Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half), count)


def of_shares(estimate: Estimate, *, least: float = 0.0) -> Estimate:
    """Return a bootstrap's estimate of a share, or of a difference of shares, with an interval that
    can be.

    For few sequences that of the bootstrap is wider than shares are. Where all sequences are alike
    it has no width, though a few that are all right are no proof that all would be: there it is as
    wide as Wilson's of as many sequences that are all right.

    Args:
        least: -1 for a difference.
    """
    low, high = estimate.low, estimate.high
    if estimate.value is None or low is None or high is None:
        return estimate
    if high - low < 1e-9:
        all_right = proportion(estimate.count, estimate.count)
        assert all_right.low is not None
        low, high = (estimate.value + sign * (1 - all_right.low) for sign in (-1, 1))
    return dataclasses.replace(estimate, low=max(least, low), high=min(1.0, high))


def mean(values: Array) -> Estimate:
    """The mean of independent values, with Student's interval."""
    count = len(values)
    if count == 0:
        return Estimate(None, None, None, 0)
    value = float(values.mean())
    if count == 1:
        return Estimate(value, None, None, 1)
    half = student_t(0.975, count - 1) * float(values.std(ddof=1)) / math.sqrt(count)
    return Estimate(value, value - half, value + half, count)


def _divide(numerator: Array, denominator: Array) -> Array:
    """NaN where the denominator is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, np.divide(numerator, denominator), np.nan)
