"""What `moshi-ttt` says of itself: help, the version, and which commands there are."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from recordings_tools import call

from finetune import cli, command_line
from finetune.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["--version"], f"moshi-ttt {version('moshi-ttt')}\n"),
        *(
            (words.split(), f"moshi-ttt {version('moshi-ttt')}\n")
            for words in ("version", "-V", "train --version", "data check -V", "--version train")
        ),
        *(
            (words.split(), "moshi-ttt COMMAND [--OPTION=VALUE ...]")
            for words in ("help", "help help", "help --help", "-h")
        ),
        *(
            (words.split(), "    moshi-ttt train CONFIG")
            for words in ("help train", "--help train", "train help", "train --help --version")
        ),
        *(
            (words.split(), "    moshi-ttt data check DATA")
            for words in ("help data check", "data help check", "data check help", "-h data check")
        ),
        *((words.split(), "moshi-ttt data COMMAND") for words in ("help data", "data help")),
    ],
)
def test_help_and_the_version_are_commands_too(
    capsys: pytest.CaptureFixture[str], arguments: list[str], beginning: str
) -> None:
    assert call(*arguments) == 0
    assert capsys.readouterr().out.startswith(beginning)


def test_a_group_lists_its_commands_and_encode_answers_to_its_old_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["data"], ["data", "--help"]):
        assert call(*words) == 0
        shown = capsys.readouterr().out
        assert "\n  annotate  " in shown and "\n  train" not in shown
    assert call("--help") == 0
    shown = capsys.readouterr().out
    assert "\n  data  " in shown and "annotate" not in shown
    assert call("encode", "--help") == 0
    assert "moshi-ttt data encode CONFIG [" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    ["train", "plan", "evaluate", "sweep", "recall", "demo-data", "data index", "data encode"],
)
def test_help_is_given_when_it_is_asked_for(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moshi-ttt", *command.split(), "--help"])
    monkeypatch.setenv("PAGER", "cat")
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    shown = capsys.readouterr()
    assert f"moshi-ttt {command}" in shown.out + shown.err


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("train", "CONFIG [--OPTION=VALUE ...] [--KEY=VALUE ...]"),
        ("config", "[KEY] [--OPTION=VALUE ...]"),
        ("export", "CHECKPOINT --out=... [--OPTION=VALUE ...]"),
        ("recall", "[--OPTION=VALUE ...]"),
    ],
)
def test_help_and_page_show_what_is_given_without_a_name(
    command: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(command, "--help") == 0
    shown, page = capsys.readouterr().out, (ROOT / "docs/commands.md").read_text()
    (section,) = [each for each in page.split("\n## ") if each.startswith(f"{command}\n")]
    place = usage.split()[0].strip("[]")
    for text in (shown, section):
        assert f"    moshi-ttt {command} {usage}\n" in text
        name = f"{place}, --{place.lower()} " if place.isalpha() else "--out "
        assert f"\n{name}" in text.replace("`", "").replace("| ", "").replace("\n  ", "\n")


@pytest.mark.parametrize("dashes", [[], ["--"]])
@pytest.mark.parametrize(
    "words", [["moshi-ttt", "demo-data", "{}", "--seed=1"], ["train.py", "--out", "{}"]]
)
def test_help_runs_nothing_whatever_else_is_given(
    words: list[str],
    dashes: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [word.format(tmp_path / "made") for word in words]
    monkeypatch.setattr(sys, "argv", [*given, *dashes, "--help"])
    monkeypatch.setenv("PAGER", "cat")
    program = cli.COMMANDS if words[0] == "moshi-ttt" else cli.demo_data
    assert command_line.call(program, name=words[0]) == 0
    assert "num_dialogues" in "".join(capsys.readouterr())
    assert not (tmp_path / "made").exists()
