"""One self-contained HTML page, and the tables as CSV."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from finetune.monitoring import format_duration

from .conclusions import plain, signed
from .figures import (
    STREAM_TITLES,
    arm_label,
    health_figure,
    pairs_figure,
    position_figure,
    to_svg,
)
from .health import MEANING
from .position import STREAMS
from .statistics import MIN_RECORDINGS

Json = Mapping[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1150px; margin: 2rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p.sub, p.note, figcaption { color: #666; font-size: .88rem; margin: .3rem 0 .8rem; }
ul.conclusions { background: #f4f7fa; border-left: 4px solid #0072b2; padding: .8rem 1rem .8rem 2rem; }
ul.conclusions li.warning { color: #b71c1c; font-weight: 600; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0 1rem; }
th { text-align: left; border-bottom: 2px solid #ccc; } th, td { padding: .25rem .9rem .25rem 0; }
td { border-bottom: 1px solid #eee; font-variant-numeric: tabular-nums; vertical-align: top;
     white-space: nowrap; }
.wrap td { white-space: normal; overflow-wrap: anywhere; }
td.alarm { color: #b71c1c; font-weight: 600; }
figure { margin: .8rem 0; } figure svg { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
"""  # noqa: E501


def html_report(results: Json) -> str:
    """The page of `results`, as `run.py` puts them together."""
    parts = [_head(results)]
    if "position" in results:
        parts.append(_position(results["position"]))
    if "pairs" in results:
        parts.append(_pairs(results["pairs"]))
    if "health" in results:
        parts.append(_health(results["health"], results["model"]["vocabulary"]))
    parts += [_missing(results), _options(results)]
    title = f"Evaluation of {results['model']['name']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{''.join(parts)}</body></html>\n"
    )


def _head(results: Json) -> str:
    model = results["model"]
    lines = "".join(
        f"<li{_warning_class(text)}>{escape(text)}</li>\n" for text in results["conclusions"]
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in results["notes"])
    return (
        f'<p class="sub">{escape(model["checkpoint"])} · {escape(model["ttt"])} · '
        f"{escape(results['time'])}</p>\n"
        f'<ul class="conclusions">{lines}</ul>{notes}\n'
    )


def _warning_class(text: str) -> str:
    return ' class="warning"' if text.startswith(("Alarm", "Warning")) else ""


def _position(position: Json) -> str:
    heading = "<h2>Loss by position</h2>\n"
    if not position["num_recordings"]:
        return f"{heading}<p>No recording could be read.</p>\n"
    arms = [
        [
            arm_label(arm, dict(position)),
            STREAM_TITLES[stream],
            *_loss_cells(of_stream[stream], plain),
        ]
        for arm, of_stream in position["arms"].items()
        for stream in STREAMS
    ]
    differences = [
        [" − ".join(d["arms"]), STREAM_TITLES[stream], *_loss_cells(d[stream], signed)]
        for d in position["differences"]
        for stream in STREAMS
    ]
    columns = [
        "stream",
        "mean",
        "beyond the window",
        "slope per doubling of position",
        "slope per hour, beyond the window",
    ]
    few = position["num_recordings"] < MIN_RECORDINGS
    caution = f" With less than {MIN_RECORDINGS} recordings there are no intervals." if few else ""
    return (
        f"{heading}"
        f'<p class="note">{position["num_recordings"]} recordings, '
        f"{format_duration(position['duration_sec'])} together, the longest "
        f"{format_duration(position['longest_sec'])}. Cross-entropy in nats per token, weighted as "
        f"in training, read in streaming mode from the start of each recording. In brackets: 95 % "
        f"intervals, bootstrap over recordings; differences are paired. Slopes are within "
        f"recordings: each has a level of its own.{caution}</p>\n"
        f"<figure>{to_svg(position_figure(dict(position)))}</figure>\n"
        + _table(["compared", *columns], differences)
        + _table(["arm", *columns], arms)
    )


def _loss_cells(of_stream: Json, show: Any) -> list[str]:
    places = ("mean", "beyond_window", "slope_per_doubling", "slope_per_hour_beyond_window")
    return [show(of_stream[p], 4) if "slope" in p or show is signed else show(of_stream[p])
            for p in places]  # fmt: skip


def _pairs(pairs: Json) -> str:
    options = pairs["options"]
    rows = [
        [
            name,
            group["num_scored"],
            group["num_missing"],
            group["num_ties"],
            plain(group["accuracy"]),
            signed(group["mean_difference"]),
        ]
        for name, group in [("all", pairs["all"]), *pairs["groups"].items()]
    ]
    return (
        "<h2>Paired likelihood</h2>\n"
        '<p class="note">Accuracy: the share of pairs whose good recording is likelier; a tie '
        "counts as half; Wilson's 95 % interval. The log-likelihood is the sum over frames of "
        f"text × {options['text_weight']:g}, first codebook × "
        f"{options['first_codebook_weight']:g}, other codebooks × "
        f"{options['other_codebooks_weight']:g}, "
        f"{'divided by the number of frames' if options['length_norm'] == 'mean' else 'as it is'}. "
        f"Mono speech is on the side of {options['side']}; the other side hears silence; the text "
        f"is {options['text']}.</p>\n"
        f"<figure>{to_svg(pairs_figure(dict(pairs)))}</figure>\n"
        + _table(["group", "pairs", "missing", "ties", "accuracy", "mean difference, nats"], rows)
    )


def _health(health: Json, vocabulary: Json) -> str:
    alarming = {alarm["measure"] for alarm in health["alarms"]}
    rows = [
        [
            MEANING[name],
            plain(of["generated"]),
            plain(of["recorded"]),
            of["alarm_if"],
            "alarm" if name in alarming else "",
        ]
        for name, of in health["measures"].items()
    ]
    return (
        "<h2>Health of generated speech</h2>\n"
        f'<p class="note">{health["num_continuations"]} continuations of '
        f"{health['continuation_sec']:g} s after {health['prompt_sec']:g} s of prompt, seed "
        f"{health['seed']}. The recordings in the same seconds are measured in the same way, and "
        "the limits are made of them.</p>\n"
        f"<figure>{to_svg(health_figure(dict(health), vocabulary))}</figure>\n"
        + _table(["measure", "continuations", "recordings", "alarm if", ""], rows)
    )


def _missing(results: Json) -> str:
    rows = [[task, what] for task, whats in results["missing"].items() for what in whats]
    if not rows:
        return '<h2>Missing data</h2>\n<p class="note">None.</p>\n'
    return (
        f'<h2>Missing data</h2>\n<p class="note">{len(rows)} not counted in anything above.</p>\n'
        + _table(["task", "what"], rows[:200], wrap=True)
    )


def _options(results: Json) -> str:
    rows = [[name, value] for name, value in results["options"].items()]
    return "<h2>Options</h2>\n" + _table(["option", "value"], rows, wrap=True)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, wrap: bool = False) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=alarm' if cell == 'alarm' else ''}>{escape(str(cell))}</td>"
            for cell in row
        )
        + "</tr>\n"
        for row in rows
    )
    if not body:
        return ""
    kind = " class=wrap" * wrap
    return f'<div class="scroll"><table{kind}><tr>{head}</tr>\n{body}</table></div>\n'


def write_tables(results: Json, folder: Path) -> list[Path]:
    """`position.csv`, `pairs.csv` and `health.csv`, of what there is."""
    written = []
    if "position" in results:
        position = results["position"]
        keys = ("start_sec", "stop_sec", "count", "weight", "value", "low", "high")
        curves = [(arm, of) for arm, of in position["arms"].items()]
        curves += [("-".join(d["arms"]), d) for d in position.get("differences", [])]
        rows = [
            [name, stream, *(point[key] for key in keys)]
            for name, of in curves
            for stream in STREAMS
            for point in of[stream]["curve"]
        ]
        columns = ["arm", "stream", "start_sec", "stop_sec", "num_recordings", "weight"]
        columns += ["loss", "low", "high"]
        written.append(_write_csv(folder / "position.csv", columns, rows))
    if "pairs" in results:
        rows = [list(score.values()) for score in results["pairs"]["scores"]]
        columns = ["id", "group", "good", "bad", "missing"]
        written.append(_write_csv(folder / "pairs.csv", columns, rows))
    if "health" in results:
        rows = [
            [name, kind, *(of[kind][key] for key in ("value", "low", "high"))]
            for name, of in results["health"]["measures"].items()
            for kind in ("generated", "recorded")
        ]
        columns = ["measure", "of", "mean", "low", "high"]
        written.append(_write_csv(folder / "health.csv", columns, rows))
    return written


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path
