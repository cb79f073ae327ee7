"""A list all of whose recordings have a fault is wrong as a whole, whatever its length: for
`data check`, and for whatever reads it."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
from data_tools import tiny_codec
from recordings_tools import WORDS, add, call, findings_of, lines_of, speech

from finetune.config import DataArgs, load_config
from finetune.data import build_train_loader, check_recordings
from finetune.data.loader import EvalLoader, TrainLoader, build_loaders
from finetune.distributed import join_world
from finetune.errors import UserError

MAIN, USER = "SPEAKER_MAIN", "SPEAKER_USER"


def named(main: str, user: str) -> list[Any]:
    return [[text, times, main if who == MAIN else user] for text, times, who in WORDS]


FAULTS: dict[str, tuple[list[Any], str]] = {
    "swapped-channels": (named(USER, MAIN), "set data.main_channel to right"),
    "no-main-speaker": (named("SPEAKER_00", USER), "if 'SPEAKER_00' is Moshi, write"),
    "other-case": (named("Speaker_Main", "Speaker_User"), "in place of 'Speaker_Main'"),
    "two-names": (named("SPEAKER_00", "SPEAKER_01"), "in place of the name that is Moshi's"),
}


def train_loader(data: Path, **changes: Any) -> TrainLoader:
    args = DataArgs(train_data=str(data), num_workers=0, **changes)
    return build_train_loader(
        args, tiny_codec(), duration_sec=1.0, batch_size=1, seed=0, device="cpu", store=None
    )


def loaders(run: Path, options: list[str]) -> tuple[TrainLoader, EvalLoader | None]:
    """Return those of a run's configuration, as training makes them at its start."""
    changes = dict(option.removeprefix("--").split("=", 1) for option in options)
    return build_loaders(load_config(run, changes), tiny_codec(), join_world("cpu"))


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_all_recordings_have_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, number: int
) -> None:
    words, remedy = FAULTS[fault]
    for seed in range(number):
        add(tmp_path, f"a{seed}", speech(seed), words=words)
    data = tmp_path / "data.jsonl"
    for options in ([], ["--fast"], []):
        status, found = findings_of(data, *options)
        assert status == 1 and found["together"] == {"in-every-recording"}
        said = capsys.readouterr().out
        assert f"{number} recording" in said and f" {number} with errors, 0 with warnings" in said
    for on_error in ("raise", "skip"):
        with pytest.raises(UserError) as stopped:
            train_loader(data, on_error=on_error)
        assert remedy in str(stopped.value) and "data.on_error=skip" not in str(stopped.value)
    recordings, problems = check_recordings(str(data), key="--data")
    assert len(recordings) == number and not problems, "nobody trains on what is evaluated"

    add(tmp_path, "good", speech(9))
    status, found = findings_of(data)
    assert status == 0 and found["together"] == set(), "what some recordings have may be meant"
    assert train_loader(data).num_segments == number + 1


def test_names_that_differ_over_the_list_are_answered_for_all_of_it(tmp_path: Path) -> None:
    for seed, name in enumerate(("Anna", "Ben")):
        add(tmp_path, f"a{seed}", speech(seed), words=named(name, USER))
    with pytest.raises(UserError, match="the name that the transcripts give Moshi"):
        train_loader(tmp_path / "data.jsonl")


def test_recordings_that_cannot_be_used_do_not_make_a_list_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(tmp_path, "mono", speech()[:, 0])
    add(tmp_path, "swapped", speech(1), words=FAULTS["swapped-channels"][0])
    data = tmp_path / "data.jsonl"
    status, found = findings_of(data)
    assert status == 1 and found["together"] == {"in-every-recording"}
    with pytest.raises(UserError, match="2 problems"):
        train_loader(data)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="1 problem in the data"):
        train_loader(data, on_error="skip")


def test_in_one_list_of_several_moshi_may_only_listen(tmp_path: Path) -> None:
    folders = {"right": WORDS, "silent": FAULTS["no-main-speaker"][0]}
    for number, (name, words) in enumerate(folders.items()):
        (tmp_path / name).mkdir()
        add(tmp_path / name, name, speech(number), words=words)
    run = Path(__file__).parents[3] / "example/demo.yaml"

    def of_run(spec: str) -> tuple[Any, Any]:
        options = (f"--data.train_data={spec}", "--data.eval_data=", "--do_eval=false")
        status, found = findings_of(run, *options)
        return status, found["together"]

    right, silent = (str(tmp_path / name / "data.jsonl") for name in folders)
    assert of_run(f"{right},{silent}") == (0, set())
    assert train_loader(Path(f"{right},{silent}")).num_segments == 2
    assert of_run(silent) == (1, {"in-every-recording"})
    with pytest.raises(UserError, match="no-main-speaker in 1 of 1 recording"):
        train_loader(Path(silent))


def test_words_under_another_spelling_of_the_main_speaker_are_said_by_check_and_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    add(tmp_path, "a", words=[["well", [0.05, 0.1], "Speaker_Main"], *WORDS])
    data = tmp_path / "data.jsonl"
    assert findings_of(data)[1]["a"] == {"other-spelling"}
    said = capsys.readouterr().out.replace("\n", " ")
    with caplog.at_level(logging.WARNING):
        train_loader(data)
    for text in (said, caplog.text):
        assert f"1 of 3 words in transcript {tmp_path / 'a.json'} are of 'Speaker_Main'" in text


# --- one transcript for two recordings ------------------------------------------------------------


def two_with_one_transcript(folder: Path) -> None:
    """Write `a.wav` and `a.flac`, of other speech, and a good recording."""
    folder.mkdir(exist_ok=True)
    for name, seed in (("good", 1), ("a", 2)):
        soundfile.write(folder / f"{name}.wav", speech(seed), 24_000)
        (folder / f"{name}.json").write_text(json.dumps({"alignments": WORDS}))
    soundfile.write(folder / "a.flac", speech(3, 0.9), 24_000)


def test_a_transcript_is_of_one_recording_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_with_one_transcript(tmp_path)
    lines = {"a.wav": 1.0, "a.flac": 0.9, "good.wav": 1.0, "./a.wav": 1.0}
    texts = [json.dumps({"path": name, "duration": sec}) for name, sec in lines.items()]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(texts))
    both = f"{tmp_path / 'a.wav'} and {tmp_path / 'a.flac'} share the transcript"
    status, found = findings_of(data)
    assert status == 1 and found["good"] == set() and both in capsys.readouterr().out
    with pytest.raises(UserError, match=both):
        train_loader(data)
    assert train_loader(data, on_error="skip").num_segments == 1
    kept = (tmp_path / "a.json").read_bytes()
    assert call("data", "annotate", data, "--overwrite") == 1
    assert both in capsys.readouterr().err and (tmp_path / "a.json").read_bytes() == kept

    data.write_text(texts[1])  # the other file may lie there
    assert findings_of(data)[0] == 0
    (tmp_path / "link.flac").symlink_to("a.flac")
    (tmp_path / "a.flac").rename(tmp_path / "link.wav")
    (tmp_path / "link.flac").unlink()
    (tmp_path / "link.flac").symlink_to("link.wav")
    shutil.copy(tmp_path / "a.json", tmp_path / "link.json")
    data.write_text("\n".join(texts[1].replace("a.flac", f"link.{e}") for e in ("wav", "flac")))
    assert findings_of(data)[0] == 0


@pytest.mark.parametrize("among", ["training", "evaluation"])
def test_nor_do_recordings_of_two_lists_share_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], among: str
) -> None:
    two_with_one_transcript(tmp_path / "talks")
    (tmp_path / "link").symlink_to("talks")  # by which the other list names the same folder
    lists = []
    for place, names in (("talks", ("good.wav", "a.wav")), ("link", ("a.flac", "good.wav"))):
        lines = [
            {"path": f"{place}/{name}", "duration": 0.9 if name == "a.flac" else 1.0}
            for name in names
        ]
        lists.append(tmp_path / f"{place}.jsonl")
        lists[-1].write_text("\n".join(map(json.dumps, lines)))
    train, evaluation = (",".join(map(str, lists)), "") if among == "training" else lists
    run = Path(__file__).parents[3] / "example/demo.yaml"
    keys = {"train_data": train, "eval_data": evaluation, "cache_dir": tmp_path / "codes"}
    options = [f"--data.{key}={value}" for key, value in keys.items()]
    options += [f"--do_eval={among == 'evaluation'}"]
    files = tmp_path / "link/a.flac", tmp_path / "talks/a.wav"
    both = "{} and {} share the transcript".format(*files)
    for command in ("plan", "data encode"):
        assert call(*command.split(), run, *options) == 1
        assert both in capsys.readouterr().err, command
    status, found = findings_of(run, *options)
    assert status == 1 and both in capsys.readouterr().out and not found["good"]
    with pytest.raises(UserError, match=both):
        loaders(run, options)
    num_left = [2, 0] if among == "training" else [2, 1]
    skipping = loaders(run, [*options, "--data.on_error=skip"])
    assert [0 if each is None else each.num_segments for each in skipping] == num_left


def test_an_index_leaves_out_what_would_share_a_transcript_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_with_one_transcript(tmp_path / "talks")
    assert call("data", "index", tmp_path / "talks") == 0
    assert [line["path"] for line in lines_of(tmp_path / "talks/data.jsonl")] == ["good.wav"]
    said = capsys.readouterr().out
    for name, other in (("a.wav", "a.flac"), ("a.flac", "a.wav")):
        paths = [tmp_path / "talks" / each for each in (name, other, "a.json")]
        assert "{} and {} share the transcript {}".format(*paths) in said
    assert "give the other another name, or move it out of the folder" in said

    (tmp_path / "mono").mkdir()
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"mono/b.{suffix}", speech()[:, 0], 24_000)
    pair = "--pair={id}.wav,{id}.flac"
    assert call("data", "index", tmp_path / "mono", pair, "--join") == 1
    assert "share the transcript" in capsys.readouterr().out
