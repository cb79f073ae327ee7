"""What stands below a sweep's table, in the terminal and on the page."""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_tools
from sweep_tools import sweep

# Fixtures: pytest finds them by their names in this module.
write = sweep_tools.write
commands = sweep_tools.commands

ONE_SEED = "One seed says nothing about small differences"


def rows_of(path: Path) -> dict[str, Any]:
    return {row["run"]: row for row in json.loads((path.parent / "sweep/table.json").read_text())}


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is printed below the table, and the page."""
    capsys.readouterr()
    assert sweep(path, "--table") == 0
    return [capsys.readouterr().out, (path.parent / "sweep/report.html").read_text()]


def test_a_run_whose_ttt_never_learns_is_no_ordinary_result(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        {
            "never": {"ttt.enabled": True, "ttt.chunk_size": 400},
            "neither": {"ttt.enabled": True, "ttt.chunk_size": 400, "seed": 1, "optim.lr": 1e-3},
            "learns": {"ttt.enabled": True},
            "off": None,
        }
    )
    assert sweep(path) == 0
    for text in shown(path, capsys):
        assert text.count("TTT never learns anything") == 1
        assert re.search(
            r"never, neither(</dt>.*?<pre>|: )duration_sec is .* not longer than ttt\.chunk_size "
            r"\(400 frames\): TTT never learns anything",
            text,
            re.DOTALL,
        )
    assert page_rows_in_red(path) == ["never", "neither"]
    cautions = {name: row["caution"] for name, row in rows_of(path).items()}
    assert cautions["learns"] == cautions["off"] == ""
    assert "TTT never learns anything" in cautions["never"]


def page_rows_in_red(path: Path) -> list[str]:
    page = (path.parent / "sweep/report.html").read_text()
    return re.findall(r'<tr class="alarm"><td>(.*?)</td>', page)


def test_one_seed_is_said_to_be_one(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"one": None})
    assert sweep(path) == 0
    assert not any(ONE_SEED in text for text in shown(path, capsys)), "nothing is compared"
    path = write({"one": None, "other": {"optim.lr": 1e-3}})
    assert sweep(path) == 0
    for text in shown(path, capsys):
        assert text.count(ONE_SEED) == 1 and "differ in seed alone" not in text


def test_runs_that_differ_in_their_seed_alone_have_a_mean_and_a_spread(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runs: dict[str, Any] = {f"seed_{seed}": {"seed": seed, "log_freq": 1} for seed in range(3)}
    path = write(runs)
    assert sweep(path) == 0
    losses = [row["eval_loss"] for row in rows_of(path).values()]
    spread = f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"
    assert len({f"{loss:.3f}" for loss in losses}) > 1
    said = f"seed_0, seed_1, seed_2 differ in seed alone: eval loss {spread} (mean and standard"
    for text in shown(path, capsys):
        assert said in text and ONE_SEED not in text
    # Another run of one seed has no spread of its own.
    path = write(runs | {"other": {"optim.lr": 1e-3}})
    assert sweep(path) == 0
    for text in shown(path, capsys):
        assert said in text and ONE_SEED in text


def test_stages_that_differ_in_seeds_alone_are_compared(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """What they start from has other names, and no other settings."""
    first = {"max_steps": 2}
    runs: dict[str, Any] = {
        "early_0": first,
        "early_1": first | {"seed": 1},
        "early_x": first | {"seed": 1, "optim.lr": 1e-3},
        "late_0": {"after": "early_0"},
        "late_1": {"after": "early_1"},
        "late_x": {"after": "early_x", "seed": 2},
    }
    path = write(runs)
    assert sweep(path) == 0
    for text in shown(path, capsys):
        assert re.findall(r"(\w+, \w+.*) differ in seed alone", text) == [
            "early_0, early_1",
            "late_0, late_1",
        ]


def test_the_advice_on_seeds_can_be_followed(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runs: dict[str, Any] = {"one": None, "other": {"optim.lr": 1e-3}}
    assert sweep(write(runs)) == 0
    for text in shown(write(runs), capsys):
        assert "add runs to the file that differ from these in" in text
    path = write(runs | {"one_1": {"seed": 1}, "other_1": {"optim.lr": 1e-3, "seed": 1}})
    assert sweep(path) == 0
    for text in shown(path, capsys):
        assert text.count("differ in seed alone") == 2 and ONE_SEED not in text
