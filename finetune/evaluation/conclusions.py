"""What the results say, in sentences; none says more than its interval allows."""

from collections.abc import Iterator, Mapping
from typing import Any

from .figures import STREAM_TITLES
from .position import STREAMS

_TITLES = {
    ("on", "off"): "TTT on, compared with off",
    ("on", "reset"): "TTT on, compared with TTT reset now and then",
    ("on", "carried"): "TTT on, compared with a start from another recording's state",
    ("carried", "off"): "another recording's state, compared with TTT off",
    ("on", "baseline"): "this checkpoint, compared with the baseline",
}
_BETTER, _WORSE, _SAME = "better", "worse", "no difference shown"
NEGLIGIBLE_NATS = 0.001
"""A difference smaller than this is called none, however sure it is."""


def conclusions(results: Mapping[str, Any]) -> list[str]:
    """A sentence for every comparison, and for every alarm."""
    found = []
    if "position" in results:
        found += list(_of_position(results["position"]))
    if "pairs" in results:
        found.append(_of_pairs(results["pairs"]))
    if "health" in results:
        found += [
            f"Alarm: {alarm['text']} ({alarm['measure']})." for alarm in _alarms(results)
        ] or [f"No sign of collapse in {results['health']['num_continuations']} continuations."]
    return found


def _alarms(results: Mapping[str, Any]) -> list[dict[str, str]]:
    return results["health"]["alarms"]


def _of_position(position: Mapping[str, Any]) -> Iterator[str]:
    beyond = position["longest_sec"] > position["attention_window_sec"]
    place = "beyond_window" if beyond else "mean"
    where = "beyond the attention window" if beyond else "(no recording exceeds the window)"
    for difference in position["differences"]:
        one, other = difference["arms"]
        if (one, other) not in _TITLES:
            continue
        by_sign: dict[str, list[str]] = {_BETTER: [], _WORSE: [], _SAME: []}
        for stream in STREAMS:
            estimate = difference[stream][place]
            if estimate["value"] is None:
                continue
            sign = _sign(estimate)
            by_sign[sign].append(f"{STREAM_TITLES[stream]} {signed(estimate)}")
        parts = "; ".join(f"{sign}: {', '.join(names)}" for sign, names in by_sign.items() if names)
        yield f"{_TITLES[one, other]}: loss {where}, in nats: {parts}."
        if (one, other) == ("on", "carried") and by_sign[_WORSE]:
            yield (
                "Warning: starting from another recording's state helps. Then what TTT learns is "
                "not about the recording alone, and part of its gain could be had by training."
            )


def _sign(estimate: Mapping[str, float | None]) -> str:
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None or low <= 0 <= high:
        return _SAME
    if max(-low, high) < NEGLIGIBLE_NATS:
        return _SAME
    return _BETTER if high < 0 else _WORSE


def signed(estimate: Mapping[str, float | None], digits: int = 4) -> str:
    """`−0.0123 [−0.0150, −0.0100]`; without an interval where there is none."""
    if estimate["value"] is None:
        return "–"
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    text = f"{value:+.{digits}f}"
    if low is not None and high is not None:
        text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return text.replace("-", "−")


def plain(estimate: Mapping[str, float | None], digits: int = 3) -> str:
    """The same without plus signs."""
    return signed(estimate, digits).replace("+", "")


def _of_pairs(pairs: Mapping[str, Any]) -> str:
    accuracy = pairs["all"]["accuracy"]
    if accuracy["value"] is None:
        return f"None of the {pairs['num_pairs']} pairs could be scored."
    if accuracy["low"] > 0.5:
        verdict = "better than chance"
    elif accuracy["high"] < 0.5:
        verdict = "worse than chance"
    else:
        verdict = "not shown to differ from chance"
    missing = f"; {pairs['num_missing']} more are missing" if pairs["num_missing"] else ""
    return (
        f"Of {pairs['all']['num_scored']} pairs, the good one is found likelier in a share of "
        f"{plain(accuracy)}: {verdict}{missing}."
    )
