"""What an evaluation says of where checkpoints come from, and of what it compares."""

import json
import pkgutil
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import evaluation_tools
import pytest
import yaml
from data_tools import write_dataset, write_jsonl
from evaluation_tools import options
from training_tools import LORA, checkpoint, sign, train, write_model

from finetune.cli import evaluate, run
from finetune.evaluation import evaluate_checkpoint
from finetune.evaluation.fingerprints import checkpoint_fingerprint

# Fixtures: pytest finds them by their names in this module.
_pictures = evaluation_tools._pictures
trained = evaluation_tools.trained


def changed_copy(of: Path, to: Path, changes: dict[str, Any]) -> Path:
    """A checkpoint whose configuration says that it was trained otherwise."""
    shutil.copytree(of, to)
    written = yaml.safe_load((to / "args.yaml").read_text())
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = written
        for section in sections:
            place = place[section]
        place[name] = value
    (to / "args.yaml").write_text(yaml.safe_dump(written))
    sign(to)
    return to


def compared(trained: tuple[Path, Path], tmp_path: Path, other: Path) -> tuple[str, str]:
    """What is said of a comparison with a baseline, and the report's page."""
    base, out = tmp_path / "base", tmp_path / "out"
    evaluate_checkpoint(options((other, trained[1]), base, arms=("on",), limit=2))
    # Results are compared when their checkpoint may be gone.
    if "gone" in other.parts:
        shutil.rmtree(other)
    given: dict[str, Any] = {"arms": ("on",), "limit": 2, "baseline": base}
    results = evaluate_checkpoint(options(trained, out, **given))
    (sentence,) = [each for each in results["conclusions"] if "and the baseline, " in each]
    return sentence, unescape((out / "report.html").read_text())


def test_checkpoints_that_differ_in_more_than_ttt_are_not_compared_in_silence(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    changes = {
        "max_steps": 3,
        "duration_sec": 2.4,
        "ttt.attention_context": 8,
        "ttt.chunk_size": 4,
        # What changes no weight is no difference, nor what nothing reads.
        "data.cache_dir": None,
        "run_dir": "elsewhere",
        "log_freq": 7,
        "lora.rank": 9,
    }
    place = tmp_path / "gone/control/checkpoints/checkpoint_000003"
    other = changed_copy(trained[0], place, changes)
    # Of another number of processes the run's folder knows.
    (tmp_path / "gone/control/summary.json").write_text('{"segments_per_step": 8}')
    sentence, page = compared(trained, tmp_path, other)
    assert sentence.startswith("Warning: this checkpoint and the baseline, control/checkpoint_000")
    beyond, of_ttt = sentence.split("so their comparison is not of TTT alone: in ")[1].split(
        ". In TTT they differ in "
    )
    assert beyond == (
        "duration_sec 3.2 (baseline: 2.4), max_steps 4 (baseline: 3), ttt.attention_context null "
        "(baseline: 8), step of the checkpoint 4 (baseline: 3), segments a step 2 (baseline: 8)"
    )
    assert of_ttt == "ttt.chunk_size 5 (baseline: 4)."
    assert "more than TTT, so their comparison is not of TTT alone" in page
    for key in ("max_steps", "ttt.chunk_size", "ttt.attention_context"):
        assert f"<td>{key}</td>" in page
    assert "baseline: control/checkpoint_000003" in page


def test_a_control_that_differs_in_ttt_alone_is_one(
    trained: tuple[Path, Path], config: Path, tmp_path: Path
) -> None:
    written = yaml.safe_load((trained[0] / "args.yaml").read_text())
    alike = {"do_eval": True, "data.eval_data": written["data"]["eval_data"], "health_sec": 0}
    alike |= {"duration_sec": 3.2, "model.attention_context": 10, "param_dtype": "float32", **LORA}
    for name, is_on in (("control", False), ("ttt", True)):
        train(config, tmp_path / name, alike | {"ttt.enabled": is_on, "do_eval": False})
    pair = (checkpoint(tmp_path / "ttt", 4), trained[1])
    sentence, page = compared(pair, tmp_path, checkpoint(tmp_path / "control", 4))
    assert sentence == (
        "What is compared: this checkpoint and the baseline, control/checkpoint_000004 (no TTT), "
        "differ in TTT alone: in ttt.enabled true (baseline: false)."
    )
    assert "<td>ttt.enabled</td>" in page


@pytest.mark.parametrize("noted_in", ["results", "checkpoint", "nothing"])
def test_the_same_base_in_another_folder_is_no_difference(
    trained: tuple[Path, Path], config: Path, tmp_path: Path, noted_in: str
) -> None:
    """By the fingerprint of the frozen weights; without one, the paths are all that there is."""
    moved = shutil.copytree(config.parent / "model", tmp_path / "moved")
    written = yaml.safe_load((trained[0] / "args.yaml").read_text())
    alike = {"do_eval": False, "data.eval_data": written["data"]["eval_data"], "max_steps": 1}
    alike |= {"duration_sec": 3.2, "model.attention_context": 10, "param_dtype": "float32", **LORA}
    train(config, tmp_path / "control", alike | {"ttt.enabled": False})
    train(config, tmp_path / "ttt", alike | {"moshi_paths.hf_repo_id": str(moved)})
    own, control = (checkpoint(tmp_path / name, 1) for name in ("ttt", "control"))
    base, out = tmp_path / "base", tmp_path / "out"
    evaluate_checkpoint(options((control, trained[1]), base, arms=("on",), limit=1))
    if noted_in != "results":  # of an earlier version
        results = json.loads((base / "results.json").read_text())
        del results["model"]["frozen_weights"]
        (base / "results.json").write_text(json.dumps(results))
    if noted_in == "nothing":
        (control / "resume.pt").write_bytes(b"cut")
    given: dict[str, Any] = {"arms": ("on",), "limit": 1, "baseline": base}
    said = evaluate_checkpoint(options((own, trained[1]), out, **given))["conclusions"]
    (sentence,) = [each for each in said if "and the baseline, " in each]
    if noted_in == "nothing":
        paths = f"{moved} (baseline: {config.parent / 'model'})"
        assert f"not of TTT alone: in moshi_paths.hf_repo_id {paths}. In TTT" in sentence
    else:
        assert sentence.endswith("differ in TTT alone: in ttt.enabled true (baseline: false).")


def with_parts(checkpoint: Path, *parts: tuple[int, dict[str, str]]) -> Path:
    """A checkpoint of a training that was resumed with other keys, after those steps."""
    found = [{"until_step": step, "before": before} for step, before in parts]
    info = {"step": 4, "eval_loss": None, "earlier_parts": found}
    (checkpoint / "info.json").write_text(json.dumps(info))
    return checkpoint


def test_what_was_another_before_a_run_was_resumed_is_a_difference(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Though the last configurations are alike; what both had is none."""
    both = {"optim.lr": "0.5"}
    own, other = (
        with_parts(
            changed_copy(trained[0], tmp_path / place / "checkpoint_000004", {"run_dir": place}),
            *parts,
        )
        for place, parts in (
            ("own", [(2, both | {"duration_sec": "1.6"}), (3, {"ttt.chunk_size": "7"})]),
            ("gone/checkpoints", [(2, both)]),
        )
    )
    sentence, page = compared((own, trained[1]), tmp_path, other)
    assert sentence.endswith(
        "so their comparison is not of TTT alone: in duration_sec until step 2 1.6 (baseline: "
        "3.2). In TTT they differ in ttt.chunk_size until step 3 7 (baseline: 5)."
    )
    assert "<td>duration_sec until step 2</td>" in page
    told = "Until step 3 this checkpoint was trained with another configuration than after it"
    assert f"{told} (ttt.chunk_size was 7)" in page


def test_of_a_stock_moshi_it_is_not_known_how_it_was_trained(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    sentence, _ = compared(trained, tmp_path, write_model(tmp_path / "stock", context=10))
    assert "need not be due to TTT" in sentence and "it is a stock Moshi" in sentence


@pytest.mark.parametrize("key", ["configuration", "something"])
def test_an_evaluation_without_a_configuration_is_compared_by_its_checkpoint(
    trained: tuple[Path, Path], tmp_path: Path, key: str
) -> None:
    """Its copy is lost, or it is of an earlier version, whose results name none; if the checkpoint
    is there no more either, this is said."""
    place = tmp_path / "runs/checkpoints/checkpoint_000004"
    changed_copy(trained[0], place, {"seed": 1})
    base, given = tmp_path / "base", {"arms": ("on",), "limit": 1}
    evaluate_checkpoint(options((place, trained[1]), base, **given))
    (base / "checkpoint.yaml").unlink()
    results = (base / "results.json").read_text()
    (base / "results.json").write_text(results.replace('"configuration"', f'"{key}"'))

    def said(out: str) -> str:
        compared = options(trained, tmp_path / out, baseline=base, **given)
        conclusions = evaluate_checkpoint(compared)["conclusions"]
        return next(each for each in conclusions if "and the baseline, " in each)

    assert "in seed 0 (baseline: 1)" in said("out")
    shutil.rmtree(place)
    gone = said("later")
    assert "need not be due to TTT" in gone
    assert f"({base} has no checkpoint.yaml, and {place} is no longer there" in gone
    (base / "results.json").unlink()
    assert "has no results.json of it" in said("last")


@pytest.mark.parametrize("meanwhile", ["bench.load_for_inference", "tasks.position.Position.run"])
def test_a_checkpoint_that_goes_away_meanwhile_costs_no_results(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """A training deletes its old checkpoints, also while one is evaluated."""
    place = tmp_path / "run/checkpoints/checkpoint_000004"
    changed_copy(trained[0], place, {"seed": 7})
    written, fingerprint = (place / "args.yaml").read_bytes(), checkpoint_fingerprint(place)
    work = pkgutil.resolve_name(f"finetune.evaluation.{meanwhile}")

    def work_while_it_goes(*given: Any) -> Any:
        done = work(*given)
        shutil.rmtree(place.parent.parent)
        return done

    monkeypatch.setattr(f"finetune.evaluation.{meanwhile}", work_while_it_goes)
    given: dict[str, Any] = {"tasks": ("position", "health"), "arms": ("on",), "limit": 1}
    out = tmp_path / "out"
    model = evaluate_checkpoint(options((place, trained[1]), out, **given))["model"]
    assert (model["seed"], model["step"], model["fingerprint"]) == (7, 4, fingerprint)
    assert (out / model["configuration"]).read_bytes() == written
    for name in ("results.json", "position.csv", "health.csv", "report.html"):
        assert (out / name).is_file(), name


def test_an_evaluation_in_its_runs_folder_changes_no_file_of_the_run(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """The run's configuration may be another one by now: resumed with more steps, for example."""
    place = tmp_path / "run/checkpoints/checkpoint_000004"
    changed_copy(trained[0], place, {"seed": 7})
    (tmp_path / "run/args.yaml").write_text("seed: 8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given: dict[str, Any] = {"arms": ("on",), "limit": 1}
    evaluate_checkpoint(options((place, trained[1]), tmp_path / "run", **given))
    assert {path: path.read_bytes() for path in before} == before
    kept = tmp_path / "run/checkpoint.yaml"
    assert kept.read_bytes() == (place / "args.yaml").read_bytes()


def test_the_report_names_what_is_evaluated(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Also the data, where they are the run's own."""
    given: dict[str, Any] = {"data": None, "arms": ("on",), "limit": 1}
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **given))
    page = unescape((tmp_path / "out/report.html").read_text())
    subtitle = page.split('<p class="note">')[1].split("</p>")[0]
    for part in (
        "in-place (sum, relative, learning rate 1), target hidden, chunk_size 5 (0.4 s) in",
        "step 4",
        "seed 0",
        f"data {trained[1]}",
    ):
        assert part in subtitle
    assert results["options"]["data"] == str(trained[1])


def test_recordings_that_were_trained_on_are_named_before_all_results(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_data = yaml.safe_load((trained[0] / "args.yaml").read_text())["data"]["train_data"]
    given = {"checkpoint": str(trained[0]), "out": str(tmp_path / "out"), "device": "cpu"}
    given |= {"tasks": "position", "arms": "off", "bin_sec": "0.8", "limit": "2"}
    warning = (
        "2 of the 2 recordings are in the checkpoint's data.train_data, whole, in part or as a copy"
    )
    assert run(lambda: evaluate(**given, data=train_data)) == 0
    said = capsys.readouterr().out.split("- ")
    assert said[1].startswith(f"Warning: {warning}")
    assert warning in unescape((tmp_path / "out/report.html").read_text())
    given["out"] = str(tmp_path / "apart")
    assert run(lambda: evaluate(**given, data=str(trained[1]))) == 0
    assert "data.train_data" not in capsys.readouterr().out


def test_copies_of_recordings_that_were_trained_on_are_named(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    written = yaml.safe_load((trained[0] / "args.yaml").read_text())
    train_data = Path(written["data"]["train_data"])
    for name in ("0.wav", "0.json"):
        shutil.copy(train_data.parent / name, tmp_path / f"copy{name[1:]}")
    duration_sec = json.loads(train_data.read_text().splitlines()[0])["duration"]
    line = {"path": "copy.wav", "duration": duration_sec}
    data = str(write_jsonl(tmp_path / "all.jsonl", [line]))
    given: dict[str, Any] = {"data": data, "arms": ("off",)}
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **given))
    assert results["conclusions"][0] == (
        "Warning: 1 of the 1 recordings are in the checkpoint's data.train_data, whole, in part or "
        f"as a copy ({tmp_path}/copy.wav): their loss does not show how well other speech is "
        "modeled."
    )


def test_recordings_listed_twice_do_not_hide_that_all_were_trained_on(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """A link gives a file a second name, under which it is evaluated again."""
    written = yaml.safe_load((trained[0] / "args.yaml").read_text())
    train_data = Path(written["data"]["train_data"])
    listed = [json.loads(line) for line in train_data.read_text().splitlines()[:2]]
    (tmp_path / "link").symlink_to(train_data.parent)
    lines = [
        {"path": str(folder / each["path"]), "duration": each["duration"]}
        for folder in (train_data.parent, tmp_path / "link")
        for each in listed
    ]
    data = str(write_jsonl(tmp_path / "twice.jsonl", lines))
    given: dict[str, Any] = {"data": data, "arms": ("off",)}
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **given))
    assert results["position"]["num_recordings"] == 4
    assert results["conclusions"][0].startswith("Warning: 2 of the 2 recordings are in the check")


def test_training_data_that_are_gone_are_not_taken_for_others(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    place = tmp_path / "runs/checkpoints/checkpoint_000004"
    changed_copy(trained[0], place, {"data.train_data": str(tmp_path / "gone.jsonl")})
    data = write_dataset(tmp_path / "data", [1.0])
    given: dict[str, Any] = {"data": str(data), "arms": ("off",)}
    results = evaluate_checkpoint(options((place, trained[1]), tmp_path / "out", **given))
    assert any("is not known: data.train_data: " in note for note in results["notes"])
