"""This package says how far a number is to be trusted, by 95 % intervals, for all that is
measured."""

from finetune.statistics.intervals import (
    MIN_SEQUENCES,
    Array,
    Bootstrap,
    Estimate,
    mean,
    of_shares,
    proportion,
    slope_parts,
    student_t,
)

__all__ = [
    "MIN_SEQUENCES",
    "Array",
    "Bootstrap",
    "Estimate",
    "mean",
    "of_shares",
    "proportion",
    "slope_parts",
    "student_t",
]
