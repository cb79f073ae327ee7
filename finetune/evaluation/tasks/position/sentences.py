"""Sentences say what the results are; none says more than its interval allows."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.evaluation.streams import STREAM_TITLES, STREAMS
from finetune.report import signed
from finetune.statistics import student_t

_TITLES = {
    ("on", "off"): "TTT on, compared with off",
    ("on", "reset"): "TTT on, compared with TTT reset now and then",
    ("on", "carried"): "TTT on, compared with a start from another recording's state",
    ("carried", "off"): "another recording's state, compared with TTT off",
    ("on", "baseline"): "this checkpoint, compared with the baseline",
    ("off", "baseline"): "this checkpoint without TTT, compared with the baseline",
}
_BETTER, _WORSE, _SAME = "better", "worse", "no difference shown"
NEGLIGIBLE_NATS = 0.001
"""A difference smaller than this is called none, however sure it is."""


def sentences(position: Mapping[str, Any]) -> Iterator[str]:
    """Yield warnings, and a sentence for every comparison."""
    for warning in position["warnings"]:
        yield f"Warning: {warning}"
    if not position["num_recordings"]:
        yield "No recording was read to its end in every arm: there is no loss by position."
        return
    # Bins are whole: one in which the window ends is not beyond it.
    is_long = position["longest_sec"] > position["attention_window_sec"]
    what = "bin is beyond the attention window" if is_long else "recording exceeds the window"
    elsewhere = ("mean", f"(no {what})")
    for difference in position["differences"]:
        beyond = any(difference[s]["beyond_window"]["value"] is not None for s in STREAMS)
        place, where = ("beyond_window", "beyond the attention window") if beyond else elsewhere
        one, other = difference["arms"]
        of_ttt = "baseline" not in (one, other)
        if (one, other) not in _TITLES or (of_ttt and not position["ttt_wrote"]):
            continue
        by_sign: dict[str, list[str]] = {_BETTER: [], _WORSE: [], _SAME: []}
        estimates = {stream: difference[stream][place] for stream in STREAMS}
        for stream, estimate in estimates.items():
            if estimate["value"] is not None:
                by_sign[_sign(estimate)].append(f"{STREAM_TITLES[stream]} {signed(estimate)}")
        parts = "; ".join(f"{sign}: {', '.join(names)}" for sign, names in by_sign.items() if names)
        if not parts:
            continue
        yield f"{_TITLES[one, other]}: loss {where}, in nats: {parts}."
        # Any of the streams may raise it, so each is given a share of the 5 % of false warnings.
        signs = [_sign(estimate, num_tests=len(STREAMS)) for estimate in estimates.values()]
        if (one, other) == ("on", "carried") and _WORSE in signs:
            yield (
                "Warning: starting from another recording's state helps. Then what TTT learns is "
                "not about the recording alone, and part of its gain could be had by training."
            )


def _sign(estimate: Mapping[str, Any], *, num_tests: int = 1) -> str:
    """Return what a 95 % interval shows; with `num_tests`, one of 1 − 5 % / num_tests
    (Bonferroni)."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None or low is None or high is None or max(-low, high) < NEGLIGIBLE_NATS:
        return _SAME
    degrees = estimate["count"] - 1
    widening = student_t(1 - 0.025 / num_tests, degrees) / student_t(0.975, degrees)
    if value + widening * (high - value) < 0:
        return _BETTER
    return _WORSE if value + widening * (low - value) > 0 else _SAME
