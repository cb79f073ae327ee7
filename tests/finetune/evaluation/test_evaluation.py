"""Reports of `moshi-ttt evaluate`: nothing is lost or made up, continued, compared, or left out."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluation_tools
import numpy as np
import pytest
from data_tools import write_dataset, write_recording
from evaluation_tools import options
from training_tools import write_model

from finetune.config import WandbArgs
from finetune.data import check_recordings
from finetune.errors import UserError
from finetune.evaluation import evaluate_checkpoint
from finetune.evaluation.streaming import ScoredBlock, Scorer
from finetune.evaluation.streams import STREAMS
from finetune.evaluation.tasks.position.baseline import Baseline

# Fixtures: pytest finds them by their names in this module.
_pictures = evaluation_tools._pictures
pair_folder = evaluation_tools.pair_folder
trained = evaluation_tools.trained


def test_a_report_that_stands_alone(
    trained: tuple[Path, Path], tmp_path: Path, pair_folder: Path
) -> None:
    results = evaluate_checkpoint(
        options(
            trained,
            tmp_path / "out",
            tasks=("position", "pairs", "health"),
            pairs=pair_folder / "pairs.jsonl",
        )
    )
    out = tmp_path / "out"
    assert set(results["position"]["arms"]) == {"on", "off", "reset", "carried"}
    assert json.loads((out / "results.json").read_text())["conclusions"] == results["conclusions"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "Loss by position" in page
    assert "how much another training seed would change is not in them" in page
    # Nothing is loaded: no script, no picture or style from elsewhere.
    assert not any(mark in page for mark in ("<script", "src=", "@import", "<link"))
    rows = (out / "position.csv").read_text().splitlines()
    curve = results["position"]["arms"]["on"]["text"]["curve"]
    assert rows[1].split(",")[:3] == ["on", "text", "0.0"]
    assert float(rows[1].split(",")[6]) == curve[0]["value"]
    assert (out / "pairs.csv").exists() and (out / "health.csv").exists()
    assert len((out / "zerospeech.txt").read_text().splitlines()) == 4
    assert not list(out.glob("codes_*"))


def test_wandb_gets_the_numbers_and_the_report(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, Any] = {}
    finished: list[bool] = []

    class Run:
        log = staticmethod(logged.update)
        finish = staticmethod(lambda: finished.append(True))

    def opened(folder: Any, args: Any, config: Any, *, resumed: Any, keeps_id: bool) -> Any:
        assert (args.project, args.offline) == ("speech", True) and not resumed and not keeps_id
        assert config["evaluation"]["arms"] == ("off",)
        return Run

    monkeypatch.setattr("finetune.evaluation.dashboard.open_wandb", opened)
    chosen: dict[str, Any] = {
        "wandb": WandbArgs("speech", offline=True),
        "arms": ("off",),
        "limit": 1,
    }
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **chosen))
    mean = results["position"]["arms"]["off"]["text"]["mean"]["value"]
    assert logged["position/off/text/mean"] == mean and "report" in logged and finished


def test_an_interrupted_evaluation_continues_and_gives_the_same(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_checkpoint(options(trained, tmp_path / "whole", arms=("on", "carried")))
    score, passes = Scorer.score, []

    def interrupted(self: Any, **given: Any) -> Iterator[ScoredBlock]:
        passes.append(len(self.rows))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return score(self, **given)

    monkeypatch.setattr(Scorer, "score", interrupted)
    path = tmp_path / "out" / "position.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(options(trained, tmp_path / "out", arms=("on", "carried")))
    kept = path.read_text().splitlines()
    assert len(kept) == 1 + 2 * 2 and not list(path.parent.glob("codes_*"))
    # As if the power had failed in the middle of a line.
    path.write_text(path.read_text() + '{"arm": "on", "rec')
    again = evaluate_checkpoint(options(trained, tmp_path / "out", arms=("on", "carried")))
    # Four passes of two recordings each, and the one that was interrupted.
    assert passes == [2] * 5 and path.read_text().splitlines()[: len(kept)] == kept
    assert again["position"]["arms"] == whole["position"]["arms"]
    # All is there: nothing runs a third time. Fewer recordings: those of the others stay apart.
    given: dict[str, Any] = {"limit": 3, "arms": ("on",), "overwrite": True}
    fewer = evaluate_checkpoint(options(trained, tmp_path / "out", **given))
    assert len(passes) == 5 and fewer["position"]["num_recordings"] == 3


def test_results_of_other_options_are_never_mixed(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also where the evaluation that they are of has not come to its report."""
    out, given = tmp_path / "out", {"arms": ("off",), "limit": 1}
    evaluate_checkpoint(options(trained, out, **given))
    for name in ("results.json", "report.html"):
        (out / name).unlink()
    with pytest.raises(UserError, match=r"bin_frames was 10, is 5.*--out, or --overwrite to repl"):
        evaluate_checkpoint(options(trained, out, **given, bin_sec=0.4))
    evaluate_checkpoint(options(trained, out, **given, bin_sec=0.4, overwrite=True))
    (header, _) = (json.loads(line) for line in (out / "position.jsonl").open())
    assert header["fingerprint"]["bin_frames"] == 5


def position_records(out: Path, arm: str) -> dict[str, Any]:
    """The records of an arm, by recording."""
    records = [json.loads(line) for line in (out / "position.jsonl").open()][1:]
    return {r["recording"]: r for r in records if r["arm"] == arm}


def test_the_batch_size_changes_no_record(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Donors of a batch end at different frames, rows too."""
    for size in (1, 4):
        chosen: dict[str, Any] = {"arms": ("on", "carried"), "batch_size": size}
        evaluate_checkpoint(options(trained, tmp_path / str(size), **chosen))
    for arm in ("on", "carried"):
        alone, together = (position_records(tmp_path / size, arm) for size in "14")
        assert len(alone) == 4
        for name, record in alone.items():
            for stream in STREAMS:
                for key, values in record["streams"][stream].items():
                    other = together[name]["streams"][stream][key]
                    assert values == pytest.approx(other, rel=1e-4), (arm, stream, key)


@pytest.mark.parametrize("changed", ["0.wav", "0.json"])
def test_a_changed_file_of_the_same_size_is_read_again(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    data = write_dataset(tmp_path / "data", [2.0, 2.0])
    evaluate_checkpoint(options(trained, tmp_path / "out", data=str(data), arms=("off",)))
    file = tmp_path / "data" / changed
    status, passes, score = file.stat(), [], Scorer.score
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))

    def counted(self: Any, **given: Any) -> Iterator[ScoredBlock]:
        passes.append(len(self.rows))
        return score(self, **given)

    monkeypatch.setattr(Scorer, "score", counted)
    evaluate_checkpoint(options(trained, tmp_path / "out", data=str(data), arms=("off",)))
    assert passes == [1]


def test_a_loss_that_is_not_finite_is_named_and_counted_nowhere(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Scorer.score

    def broken(self: Any, **given: Any) -> Iterator[ScoredBlock]:
        for block in score(self, **given):
            for row, recording in enumerate(self.rows):
                if recording.num_frames == 39:
                    block.nll[row, 1, block.frames[1] >= 20] = math.nan
            yield block

    monkeypatch.setattr(Scorer, "score", broken)
    results = evaluate_checkpoint(options(trained, tmp_path / "out", arms=("on", "off")))
    assert results["position"]["num_recordings"] == 3
    assert math.isfinite(results["position"]["arms"]["on"]["first_codebook"]["mean"]["value"])
    (missing,) = results["missing"]["position"]
    assert "loss is not finite at 1.6 s" in missing
    assert results["conclusions"][0].startswith("Warning: The loss of 1 recording is not finite")
    # Not a single one left: that is said, too.
    chosen: dict[str, Any] = {
        "data": str(write_dataset(tmp_path / "data", [3.1])),
        "arms": ("off",),
    }
    results = evaluate_checkpoint(options(trained, tmp_path / "none", **chosen))
    assert "there is no loss by position" in results["conclusions"][1]


def test_resets_before_anything_is_learned_are_refused(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--reset_frames: TTT writes after every 5 .* at least 6"):
        evaluate_checkpoint(options(trained, tmp_path / "out", reset_frames=5))
    # What is read counts, not the length of the files.
    results = evaluate_checkpoint(options(trained, tmp_path / "out", max_sec=0.8))
    assert "reset" not in results["position"]["arms"]
    assert any("the arm `reset` is left out" in note for note in results["notes"])


def test_of_recordings_without_an_update_nothing_is_concluded(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    results = evaluate_checkpoint(options(trained, tmp_path / "out", max_sec=0.4))
    assert list(results["position"]["arms"]) == ["on", "off"]
    (conclusion,) = results["conclusions"]
    assert "TTT never wrote" in conclusion and conclusion.startswith("Warning")


def test_who_is_too_short_is_nobodys_donor(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [2.0, 0.3, 1.5, 0.3])
    chosen: dict[str, Any] = {"data": str(data), "arms": ("on", "carried")}
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **chosen))
    assert results["position"]["num_recordings"] == 4
    donors = {r["control"] for r in position_records(tmp_path / "out", "carried").values()}
    assert {donor[-5:] for donor in donors} == {"0.wav", "2.wav"}


def test_another_recordings_state_is_what_the_carried_arm_starts_with(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Every recording is the donor of another one."""
    results = evaluate_checkpoint(options(trained, tmp_path / "out", arms=("on", "off", "carried")))
    records = [json.loads(line) for line in (tmp_path / "out/position.jsonl").open()][1:]
    donors = {r["recording"]: r["control"] for r in records if r["arm"] == "carried"}
    assert len(donors) == 4 and all(donor != own for own, donor in donors.items())
    assert set(donors.values()) == set(donors)
    first = {(r["arm"], r["recording"]): r["streams"]["text"]["loss"][0] for r in records}
    assert all(first["carried", own] != first["on", own] for own in donors)
    assert len(results["position"]["differences"]) == 3


def test_dialogues_of_one_file_are_recordings_of_their_own(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of a file of codes, each is scored, and continued; a baseline is of the same ones."""
    rng = np.random.default_rng(0)
    dialogues = {name: rng.integers(4, 30, (17, 20 + i)) for i, name in enumerate("ab")}
    np.savez(tmp_path / "all.npz", **dialogues)  # type: ignore[arg-type]
    chosen: dict[str, Any] = {"data": str(tmp_path / "all.npz"), "arms": ("on", "carried")}
    tasks = ("position", "health")
    results = evaluate_checkpoint(options(trained, tmp_path / "out", tasks=tasks, **chosen))
    assert results["position"]["num_recordings"] == 2
    names = [f"{tmp_path}/all.npz/{name}" for name in "ab"]
    carried = position_records(tmp_path / "out", "carried")
    assert {name: record["control"] for name, record in carried.items()} == {
        names[0]: names[1], names[1]: names[0],
    }  # fmt: skip
    header = json.loads((tmp_path / "out/health.jsonl").read_text().splitlines()[0])
    assert header["fingerprint"]["prompts"] == names
    recordings, _ = check_recordings(chosen["data"], key="data")
    own = Baseline(tmp_path / "out", {}, recordings).comparable(list(carried.values()))
    frames = {record["recording"]: record["num_frames"] for record in own}
    assert frames == dict(zip(names, (20, 21), strict=True))


def test_a_file_of_one_dialogue_is_found_in_results_that_call_it_by_the_file(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """So earlier versions called it: a baseline holds it, and its health need not be new."""
    np.savez(tmp_path / "one.npz", a=np.random.default_rng(0).integers(4, 30, (17, 20)))
    chosen: dict[str, Any] = {"data": str(tmp_path / "one.npz"), "arms": ("on",)}
    evaluate_checkpoint(options(trained, tmp_path / "out", tasks=("position", "health"), **chosen))
    header = json.loads((tmp_path / "out/health.jsonl").read_text().splitlines()[0])
    assert {*header["fingerprint"]["prompts"]} == {f"{tmp_path}/one.npz"}
    results = tmp_path / "out/position.jsonl"
    results.write_text(results.read_text().replace("one.npz/a", "one.npz"))
    recordings, _ = check_recordings(chosen["data"], key="data")
    record = json.loads(results.read_text().splitlines()[1])
    record["recording"] = recordings[0].location
    assert len(Baseline(tmp_path / "out", {}, recordings).comparable([record])) == 1


def test_what_cannot_be_read_is_listed_and_counted(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    data = write_dataset(tmp_path / "data", [2.0, 2.0])
    (tmp_path / "data/0.json").unlink()
    results = evaluate_checkpoint(options(trained, tmp_path / "out", data=str(data)))
    assert (
        results["position"]["num_recordings"] == 1 and "carried" not in results["position"]["arms"]
    )
    assert len(results["missing"]["data"]) == 1 and "0.json" in results["missing"]["data"][0]
    assert any("it needs two recordings" in note for note in results["notes"])
    assert results["position"]["arms"]["on"]["text"]["mean"]["low"] is None
    page = (tmp_path / "out/report.html").read_text()
    assert "0.json" in page and "there are no intervals" in page


def test_a_stock_moshi_is_a_baseline(trained: tuple[Path, Path], tmp_path: Path) -> None:
    stock = write_model(tmp_path / "model")
    config = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps(config | {"context": 10}))
    results = evaluate_checkpoint(options((stock, trained[1]), tmp_path / "stock"))
    assert list(results["position"]["arms"]) == ["off"]
    assert any("has no TTT" in note for note in results["notes"])
    compared = evaluate_checkpoint(
        options(trained, tmp_path / "out", arms=("on",), baseline=tmp_path / "stock")
    )
    assert [d["arms"] for d in compared["position"]["differences"]] == [["on", "baseline"]]
    # And the other way round.
    other = evaluate_checkpoint(
        options((stock, trained[1]), tmp_path / "other", baseline=tmp_path / "out")
    )
    assert ["off", "baseline"] in [d["arms"] for d in other["position"]["differences"]]
    assert any("compared with the baseline: loss beyond" in c for c in other["conclusions"])


def test_a_wrong_baseline_is_told_before_anything_is_computed(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_checkpoint(options(trained, tmp_path / "base", arms=("on",)))
    monkeypatch.setattr("finetune.evaluation.bench.load_for_inference", None)

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=message):
            evaluate_checkpoint(options(trained, tmp_path / "out", arms=("on",), **changes))

    refused(
        "no evaluation of loss by position in .*none. Name the folder", baseline=tmp_path / "none"
    )
    refused(
        "evaluated with --bin_sec=0.8, and this is with --bin_sec=0.4, so.*: give the same",
        baseline=tmp_path / "base",
        bin_sec=0.4,
    )
    refused(
        "with no --max_sec, and this is with --max_sec=2", baseline=tmp_path / "base", max_sec=2.0
    )
    refused("is where this evaluation is written", baseline=tmp_path / "out")
    # A run, its checkpoint, and the folder that the evaluation is in, are what it is taken for.
    for folder in (trained[0], trained[0].parent.parent):
        refused(rf"evaluate that first \(`moshi-ttt evaluate {trained[0]}`\)", baseline=folder)
    refused(f"Did you mean {tmp_path}/base?", baseline=tmp_path)
    data = write_dataset(tmp_path / "data", [2.0])
    refused("is of other recordings", baseline=tmp_path / "base", data=str(data))
    results = tmp_path / "base/position.jsonl"
    whole = results.read_text()
    header, *records = whole.splitlines(keepends=True)
    weights = header.replace('"text_padding": 0.5', '"text_padding": 0.25')
    for content, message in (
        ("no json\n", r"--baseline: .*is damaged"),
        (header, "has no results yet, as it was stopped before the first"),
        (whole.replace('"arm": "on"', '"arm": "reset"'), "has the arms reset alone, which are"),
        (
            weights + "".join(records),
            "text_padding_weight 0.25, and .*_weight 0.5, so .* no option",
        ),
        (whole.replace('"bin_frames"', '"bins"'), "does not say with what settings it was made"),
    ):
        assert content != whole
        results.write_text(content)
        refused(message, baseline=tmp_path / "base")


def test_a_baseline_is_compared_by_what_was_read(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """The same files by another path are the same; a file that was another one is left out."""
    data = write_dataset(tmp_path / "data", [2.0, 1.5])
    evaluate_checkpoint(options(trained, tmp_path / "base", data=str(data), arms=("on",)))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    chosen: dict[str, Any] = {"baseline": tmp_path / "base", "arms": ("on",), "limit": 2}
    chosen |= {"data": str(tmp_path / "link" / data.name)}
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **chosen))
    assert results["position"]["num_recordings"] == 2
    difference = results["position"]["differences"][0]
    assert difference["arms"] == ["on", "baseline"] and difference["text"]["mean"]["value"] == 0
    write_recording(tmp_path / "data", "0.wav", 2.0, rate_hz=16_000)
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **chosen))
    assert results["position"]["num_recordings"] == 1
    assert "size_bytes was" in results["missing"]["baseline"][0]
    transcript = tmp_path / "data/1.json"
    words = json.loads(transcript.read_text())["alignments"]
    transcript.write_text(json.dumps({"alignments": words[1:]}))
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **chosen))
    assert "its words, or their times, were others" in results["missing"]["baseline"][1]
    assert not results["position"]["differences"]


def test_health_of_what_was_replaced_is_measured_again(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    chosen = {"data": str(write_dataset(tmp_path / "data", [2.0])), "tasks": ("health",)}
    first, again, new = (tmp_path / name for name in ("out", "out", "new"))
    found = [evaluate_checkpoint(options(trained, first, **chosen))["health"]]
    write_recording(tmp_path / "data", "0.wav", 2.0, seed=9)
    found += [
        evaluate_checkpoint(options(trained, out, **chosen))["health"] for out in (again, new)
    ]
    assert found[0] != found[1] == found[2]
