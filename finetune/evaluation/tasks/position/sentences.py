"""Sentences say what the results are; none says more than its interval allows."""

from collections.abc import Iterator, Mapping

from finetune.evaluation.streams import STREAM_TITLES, STREAMS
from finetune.evaluation.tasks.base import Found
from finetune.evaluation.tasks.position.compared import compared_sentence, reservation
from finetune.report import signed
from finetune.statistics import MIN_SEQUENCES, student_t

_TITLES = {
    ("on", "off"): "TTT on, compared with off",
    ("on", "reset"): "TTT on, compared with TTT reset now and then",
    ("on", "carried"): "TTT on, compared with a start from another recording's state",
    ("carried", "off"): "another recording's state, compared with TTT off",
    ("on", "baseline"): "this checkpoint, compared with the baseline",
    ("off", "baseline"): "this checkpoint without TTT, compared with the baseline",
}
_BETTER, _WORSE, _SAME = "better", "worse", "no difference shown"
_TOO_FEW = f"too few recordings to show any difference (at least {MIN_SEQUENCES} are needed)"
_NO_CONTROL = (
    ". Whether training with TTT helps, a control can tell that was trained alike without it "
    "(--baseline)."
)
NEGLIGIBLE_NATS = 0.001
"""A difference smaller than this is called none, however sure it is."""


def sentences(position: Found) -> Iterator[str]:
    """Yield warnings, what it comes to, and a sentence for every comparison."""
    for warning in position["warnings"]:
        yield f"Warning: {warning}"
    if not position["num_recordings"]:
        yield "No recording was read to its end in every arm: there is no loss by position."
        return
    # Bins are whole: one in which the window ends is not beyond it.
    is_long = position["longest_sec"] > position["attention_window_sec"]
    what = "bin is beyond the attention window" if is_long else "recording exceeds the window"
    elsewhere = f"(no {what})"
    of_arms = {tuple(difference["arms"]): difference for difference in position["differences"]}
    if position["ttt_wrote"] and _is_as_good_carried(of_arms):
        yield (
            "Warning: TTT on is no better than with another recording's state: by this measure, "
            "what TTT learns here is not about the recording (docs/evaluation.md says what that "
            "means)."
        )
    if position["ttt_wrote"] and (
        answer := _in_short(of_arms, elsewhere, position.get("baseline"))
    ):
        yield answer
    if baseline := position.get("baseline"):
        yield compared_sentence(baseline)
    for arms, difference in of_arms.items():
        of_ttt = "baseline" not in arms
        if arms not in _TITLES or (of_ttt and not position["ttt_wrote"]):
            continue
        is_beyond, estimates = _estimates(difference)
        by_sign: dict[str, list[str]] = {_BETTER: [], _WORSE: [], _SAME: [], _TOO_FEW: []}
        for stream, estimate in estimates.items():
            if estimate["value"] is not None:
                verdict = _TOO_FEW if estimate["low"] is None else _sign(estimate)
                by_sign[verdict].append(f"{STREAM_TITLES[stream]} {signed(estimate)}")
        parts = "; ".join(f"{sign}: {', '.join(names)}" for sign, names in by_sign.items() if names)
        if not parts:
            continue
        where = "beyond the attention window" if is_beyond else elsewhere
        yield f"{_TITLES[arms]}: loss {where}, in nats: {parts}."
        if arms == ("on", "carried") and _is_better_carried(of_arms):
            yield (
                "Warning: starting from another recording's state helps. Then what TTT learns is "
                "not about the recording alone, and part of its gain could be had by training."
            )


def _in_short(
    of_arms: Mapping[tuple[str, ...], Found], elsewhere: str, baseline: Found | None
) -> str | None:
    """Return whether TTT helps, as far as the arms can say: compared with the baseline, which is to
    be the control, or else with the same weights; None: nothing of it was measured."""
    is_controlled = ("on", "baseline") in of_arms
    difference = of_arms.get(("on", "baseline" if is_controlled else "off"))
    if difference is None:
        return None
    is_beyond, estimates = _estimates(difference)
    measured = {stream: each for stream, each in estimates.items() if each["value"] is not None}
    if not measured:
        return None
    where = ", beyond the attention window" if is_beyond else f" {elsewhere}"
    other = "the baseline" if is_controlled else "itself with TTT off"
    # Any of the streams may show something by chance, so each has a share of the 5 %.
    signs = {stream: _sign(each, num_tests=len(STREAMS)) for stream, each in measured.items()}
    found = [
        f"{sign} ({'; '.join(STREAM_TITLES[stream] for stream in streams)})"
        for sign in (_BETTER, _WORSE)
        if (streams := [stream for stream, own in signs.items() if own == sign])
    ]
    if all(each["low"] is None for each in measured.values()):
        return f"In short: {_TOO_FEW}."
    if found:
        text = f"is {', and '.join(found)}, compared with {other}"
    else:
        text = f"is not shown to be better or worse than {other}"
    text += reservation(baseline or {}) + "." if is_controlled else _NO_CONTROL
    return f"In short{where}, of all four streams together: this checkpoint {text}"


def _estimates(difference: Found) -> tuple[bool, dict[str, Found]]:
    """Return the estimates by stream that conclusions are of: those beyond the attention window, if
    there are any, or of everything; and whether it is the former."""
    is_beyond = any(difference[stream]["beyond_window"]["value"] is not None for stream in STREAMS)
    place = "beyond_window" if is_beyond else "mean"
    return is_beyond, {stream: difference[stream][place] for stream in STREAMS}


def _is_as_good_carried(of_arms: Mapping[tuple[str, ...], Found]) -> bool:
    """Return whether a start from another recording's state is as good: in all streams that TTT
    makes better, or, where that was not measured, in all. Where it makes none better, there is
    nothing that could be of the recording."""
    if ("on", "carried") not in of_arms:
        return False
    _, carried = _estimates(of_arms["on", "carried"])
    streams = [stream for stream in STREAMS if carried[stream]["low"] is not None]
    if ("on", "off") in of_arms:
        streams = [stream for stream in streams if _is_better(of_arms["on", "off"], stream)]
    return bool(streams) and all(_sign(carried[stream]) != _BETTER for stream in streams)


def _is_better_carried(of_arms: Mapping[tuple[str, ...], Found]) -> bool:
    """Return whether a start from another recording's state helps: it is better than without in a
    stream in which TTT, with either state, brings anything, or that was not measured.

    Any of the streams may show it, so each is given a share of the 5 % of false warnings.
    """
    _, carried = _estimates(of_arms["on", "carried"])
    gains = [of_arms[arms] for arms in (("on", "off"), ("carried", "off")) if arms in of_arms]
    return any(
        _sign(carried[stream], num_tests=len(STREAMS)) == _WORSE
        and (not gains or any(_is_better(gain, stream) for gain in gains))
        for stream in STREAMS
    )


def _is_better(difference: Found, stream: str) -> bool:
    """Return whether the first of two arms is shown to be better in a stream."""
    _, estimates = _estimates(difference)
    return _sign(estimates[stream]) == _BETTER


def _sign(estimate: Found, *, num_tests: int = 1) -> str:
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
