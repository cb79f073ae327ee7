"""What the documentation says is so: its links, its commands, its list of messages."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from messages import messages

from finetune.cli import COMMANDS
from finetune.command_line import GROUPS
from finetune.config import TrainArgs, read_options
from finetune.config.fields import all_fields
from finetune.errors import UserError

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("research/*.md")])
PAST = {ROOT / "CHANGELOG.md", ROOT / "docs/log.md"}
"""Of what was, with the commands of then."""
KEYS = {field.key for field in all_fields(TrainArgs)}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- links ----------------------------------------------------------------------------------------


def without_code(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^ *```.*?^ *```|`[^`\n]+`", "``", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub calls them in links."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if not i else f"{name}-{i}" for name, n in found.items() for i in range(n + 1)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]*)\)", without_code(page)):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT) and there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_the_readme_says_what_every_folder_is_for() -> None:
    readme = (ROOT / "README.md").read_text()
    folders = [path.parent for path in (ROOT / "finetune").glob("*/__init__.py")]
    assert [path.name for path in folders if f"({name_of(path)})" not in readme] == []


def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / page.stem / "index.html").is_file()
    home = (tmp_path / "index.html").read_text()
    assert 'href="talk/"' in home and "docs/talk.md" in home  # of the README, where it is a file
    assert not [*tmp_path.rglob("*.py")]


# --- commands -------------------------------------------------------------------------------------

LINE = re.compile(
    r"^(?: {4})?(?:[A-Z_]+=\S+ )?(?:moshi-ttt|torchrun|python) .*$|(?<=`)moshi-ttt [^`\n]+(?=`)",
    re.M,
)
"""Lines of code, and code within a line."""


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command of ours that a page shows, without its first."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in LINE.findall(text):
        if match := re.search(r"(?:\bmoshi-ttt|-m finetune|\b(train\.py)) ([^|\[]*)", line):
            words = shlex.split(match[2], comments=True)
            yield ["train", *words] if match[1] else words


def given_by(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return what a command line gives: words, and options by name."""
    places, given, rest = [], {}, list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            places.append(word)
        elif "=" in word:
            name, given_value = word[2:].split("=", 1)
            given[name] = given_value
        else:
            given[word[2:]] = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
    return places, given


def check_command(words: list[str]) -> None:
    """Fail where a command would not be understood; options may be missing, as in a sentence."""
    is_open = any("…" in word or "..." in word for word in words)
    is_help = bool(words) and words[0] in ("COMMAND", "help", "--version")
    if not words or is_help or "--help" in words or is_open:
        return
    name = " ".join(words[:2]) if words[0] in GROUPS else words[0]
    assert name in COMMANDS, f"there is no command {name!r}"
    command = vars(COMMANDS[name])
    # In its place any word may stand that is meant to be replaced, but for this one of two.
    shown = ["bash" if word == "SHELL" else word for word in words[len(name.split()) :]]
    places, given = given_by(shown)
    takes_keys = command["with_overrides"]
    try:
        _, keys = read_options(command["options"], places, given, with_overrides=takes_keys)
    except UserError as error:
        assert "is missing" in str(error), f"{words}: {error}"
    else:
        assert keys.keys() <= KEYS, words
    for word in [*places, *given.values()]:
        assert not word.startswith("example/") or (ROOT / word).exists(), word


@pytest.mark.parametrize("page", [page for page in PAGES if page not in PAST], ids=name_of)
def test_the_commands_that_a_page_shows_are_understood(page: Path) -> None:
    for words in commands(page):
        check_command(words)


def test_commands_that_there_are_not_are_noticed() -> None:
    assert sum(1 for _ in commands(ROOT / "README.md")) > 15
    for line in (
        "train-it x",
        "data indexed x",
        "recall --seedz 3",
        "train --config a --ttt.chunks=3",
    ):
        with pytest.raises(AssertionError):
            check_command(line.split())


# --- messages -------------------------------------------------------------------------------------


def listed_messages() -> list[str]:
    """Return the beginnings of messages that troubleshooting.md explains."""
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE)
    codes = [re.fullmatch(r"(`+)(.+?) ?\1", code) for row in rows for code in row.split("<br>")]
    return [code[2] for code in codes if code is not None]


def test_every_message_is_explained_and_no_other() -> None:
    """By its first words, which are three or more, or all of it."""
    listed, templates = listed_messages(), {m.template: m.place for m in messages()}
    assert len(templates) > 400
    beginnings = tuple(each for each in listed if len(re.findall(r"\w{2,}", each)) > 2)
    missing = {
        template: place
        for template, place in templates.items()
        if not template.startswith(beginnings) and template not in listed
    }
    assert not missing, "docs/troubleshooting.md lacks these"
    gone = [
        each
        for each in listed
        if each not in templates
        and not (each in beginnings and any(t.startswith(each) for t in templates))
    ]
    assert not gone, "docs/troubleshooting.md explains what nothing says any more"
    assert len(set(listed)) == len(listed)


# --- the notebook ---------------------------------------------------------------------------------


def test_the_notebook_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells, one after the other, from the folder that Jupyter starts in."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(ROOT / "example")
    cells = json.loads(Path("first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    train, heard = names["train"], names["heard"]
    assert train[-1]["loss"] < 0.4 * train[0]["loss"] and heard[-1]["loss"] < heard[0]["loss"]
    for layer in names["model"].ttt_layers:
        assert names["with_ttt"][-1][layer] > 0 == names["without_ttt"][-1][layer]
    assert names["spoken"].text != names["spoken_without"].text
    assert "| " in capsys.readouterr().out
