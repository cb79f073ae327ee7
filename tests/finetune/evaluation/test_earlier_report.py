"""A report that lies in the output folder is not replaced by that of another evaluation unasked."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import evaluation_tools
import pytest
from evaluation_tools import options
from forked import Program
from training_tools import sign

from finetune.cli import evaluate, run
from finetune.errors import UserError
from finetune.evaluation import evaluate_checkpoint

# Fixtures: pytest finds them by their names in this module.
_pictures = evaluation_tools._pictures
trained = evaluation_tools.trained
pair_folder = evaluation_tools.pair_folder

GIVEN: dict[str, Any] = {"arms": ("on",), "limit": 1}


HOLDS_FOLDER = """
import sys, time
from pathlib import Path
from finetune.kept import held_folder

with held_folder(Path(sys.argv[1]), "--out"):
    print("held", flush=True)
    time.sleep(600)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_that_is_being_filled_is_refused(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    other = Program(HOLDS_FOLDER, tmp_path / "out")
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"--out: .*out is in use by process {other.pid} on"):
            evaluate_checkpoint(options(trained, tmp_path / "out", **GIVEN))
    finally:
        other.kill()
        other.wait(timeout=60)
    evaluate_checkpoint(options(trained, tmp_path / "out", **GIVEN))
    assert not (tmp_path / "out/.lock").exists()


def test_the_same_evaluation_again_replaces_its_own_report(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also with options that change no result."""
    out = tmp_path / "out"
    first = evaluate_checkpoint(options(trained, out, **GIVEN))
    again = evaluate_checkpoint(options(trained, out, **GIVEN, batch_size=1, block_frames=9))
    assert again["position"] == first["position"]
    assert json.loads((out / "results.json").read_text())["options"]["batch_size"] == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"limit": 2}, "limit was 1, is 2"),
        ({"tasks": ("health",)}, "tasks was position, is health"),
        ({"arms": ("on", "off"), "limit": None}, "arms was on, is on,off; limit was 1, is null"),
    ],
)
def test_a_report_of_other_settings_is_replaced_if_asked_for(
    trained: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    out = tmp_path / "out"
    evaluate_checkpoint(options(trained, out, **GIVEN))
    before = content(out)
    with pytest.raises(UserError) as refused:
        evaluate_checkpoint(options(trained, out, **GIVEN | changes))
    assert f"holds another report, which would be replaced: {told}. Give" in str(refused.value)
    assert content(out) == before
    evaluate_checkpoint(options(trained, out, **GIVEN | changes, overwrite=True))
    assert content(out)["report.html"] != before["report.html"]
    # What is kept of the same settings is not measured again.
    assert content(out)["position.jsonl"].startswith(before["position.jsonl"])


def test_what_other_tasks_have_left_goes_with_the_report_that_was_replaced(
    trained: tuple[Path, Path],
    tmp_path: Path,
    pair_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder would else hold tables of two evaluations, perhaps of two checkpoints."""
    path, data = trained
    out, other = tmp_path / "out", tmp_path / "run/checkpoints/checkpoint_000005"
    pairs = {"pairs": pair_folder / "pairs.jsonl"}
    first = options(trained, out, **GIVEN | pairs | {"tasks": ("position", "pairs")})
    evaluate_checkpoint(first)
    mine = {"health.csv": b"a,b\n", "health.jsonl": b'{"id": "mine"}\n', "notes.txt": b"mine"}
    for name, text in mine.items():
        (out / name).write_bytes(text)
    before = content(out)
    assert {"position.csv", "position.jsonl", "pairs.csv", "zerospeech.txt"} <= before.keys()

    # Of the same checkpoint, what was measured is gone on with when it is asked for again.
    evaluate_checkpoint(options(trained, out, **GIVEN, overwrite=True))
    assert before.keys() - content(out).keys() == {"pairs.csv", "zerospeech.txt"}
    assert content(out)["pairs.jsonl"] == before["pairs.jsonl"]
    said = capsys.readouterr().out
    assert "as of the report that was replaced: pairs.csv, zerospeech.txt" in said
    assert "as results of this checkpoint: pairs.jsonl" in said

    shutil.copytree(path, other)
    (other / "args.yaml").write_text((path / "args.yaml").read_text().replace("seed: 0", "seed: 1"))
    sign(other)
    second = {"tasks": ("pairs",), "overwrite": True, **pairs}
    evaluate_checkpoint(options((other, data), out, **second))
    assert "that was replaced: position.csv, position.jsonl" in capsys.readouterr().out
    assert before.keys() - content(out).keys() == {"position.csv", "position.jsonl"}
    assert content(out)["pairs.jsonl"] != before["pairs.jsonl"]
    assert mine.items() <= content(out).items()
    assert (pair_folder / "pairs.jsonl").is_file()


def test_a_report_of_another_checkpoint_or_other_data_is_named(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = trained
    out, other = tmp_path / "out", tmp_path / "run/checkpoints/checkpoint_000005"
    shutil.copytree(path, other)
    (other / "args.yaml").write_text((path / "args.yaml").read_text().replace("seed: 0", "seed: 1"))
    sign(other)
    listing = data.with_name("some.jsonl")
    listing.write_text(data.read_text())
    evaluate_checkpoint(options(trained, out, **GIVEN))
    given = {"checkpoint": str(other), "data": str(listing), "out": str(out), "tasks": "position"}
    given |= {"arms": "on", "limit": "1", "bin_sec": "0.8"}
    assert run(lambda: evaluate(**given)) == 1
    message = capsys.readouterr().err
    assert "checkpoint was run/checkpoint_000004, is run/checkpoint_000005; data was " in message
    assert run(lambda: evaluate(**given, overwrite="true")) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["model"]["name"] == "run/checkpoint_000005"
    assert results["position"]["num_recordings"] == 1
    # The checkpoint that was written again under the same name is another one as well.
    (other / "args.yaml").write_text((path / "args.yaml").read_text())
    sign(other)
    assert run(lambda: evaluate(**given)) == 1
    assert "run/checkpoint_000005 is no longer the same checkpoint" in capsys.readouterr().err


def test_a_folder_that_is_typed_otherwise_is_no_other(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, or as an earlier version kept it."""
    (path, data), out = trained, tmp_path / "w/out"
    evaluate_checkpoint(options(trained, tmp_path / "w/ev", **GIVEN))
    (tmp_path / "w/ev2").mkdir()
    (tmp_path / "w/ev2/position.jsonl").touch()
    (tmp_path / "w/data").symlink_to(data.parent)

    def evaluate_in(folder: str, changes: dict[str, Any]) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path / folder)
        here = Path(os.path.relpath(path)), os.path.relpath(data)
        return evaluate_checkpoint(options(here, out, **GIVEN | changes))

    first = evaluate_in(".", {"baseline": Path("w/ev")})
    assert first["options"]["baseline"] == str(tmp_path / "w/ev")
    again = evaluate_in("w", {"baseline": Path("ev")})
    assert again["position"] == first["position"]
    evaluate_in("w", {"baseline": Path("../w/ev"), "data": "data/all.jsonl:1"})
    for changes, told in (
        ({"baseline": Path("ev2")}, rf"baseline was {tmp_path}/w/ev, is {tmp_path}/w/ev2\."),
        ({"baseline": Path("ev"), "data": "data/all.jsonl:2"}, rf"data was {data}, is {data}:2\."),
    ):
        with pytest.raises(UserError, match=told):
            evaluate_in("w", changes)
    results = out / "results.json"
    results.write_text(results.read_text().replace(f'"{tmp_path}/w/ev"', '"w/ev"'))
    evaluate_in(".", {"baseline": tmp_path / "w/ev"})


@pytest.mark.parametrize("name", ["report.html", "results.json", "checkpoint.yaml", "position.csv"])
def test_what_is_of_no_evaluation_stays(
    trained: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """A sweep writes a report of the same name."""
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=rf"replaced: {name} is of something else\. Give another"):
        evaluate_checkpoint(options(trained, tmp_path, **GIVEN))
    assert (tmp_path / name).read_text() == '{"mine": 1}'
