"""How far a measured number is to be trusted: 95 % intervals, the same for all that is measured."""

from finetune.statistics.intervals import (
    MIN_SEQUENCES,
    Array,
    Bootstrap,
    Estimate,
    mean,
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
    "proportion",
    "slope_parts",
    "student_t",
]
