"""`moshi-ttt plan` as it is called: for which GPUs it speaks, and how it ends."""

import json
from pathlib import Path

import pytest
from data_tools import some_words, write_jsonl, write_recording
from forked import COMMAND, Program
from recordings_tools import call

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("no data", "data.train_data: {folder}/none.jsonl does not exist. Correct the path."),
        ("no eval_data", "data.eval_data: {folder}/none.jsonl does not exist. Correct the path."),
        ("wrong data", "all.jsonl:1: recording {folder}/0.wav is mono"),
        ("wrong eval_data", "all.jsonl:1: recording {folder}/0.wav is mono"),
        ("a wrong list", "no-main-speaker in 1 of 1 recording"),
        ("no model", "moshi_paths.moshi_path: there is no file"),
    ],
)
def test_it_ends_with_what_train_would_end_with(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str, said: str
) -> None:
    folder = tmp_path / "talks"
    folder.mkdir()
    line = write_recording(folder, "0.wav", 2.0)
    if wrong == "a wrong list":
        words = [["hi", [0.1, 0.3], "SPEAKER_00"]]
        (folder / "0.json").write_text(json.dumps({"alignments": words}))
    else:
        write_mono(folder / "0.wav")
    (folder / "all.jsonl").write_text(json.dumps(line) + "\n")
    model = tmp_path / "model"
    model.mkdir()
    for file in (config.parent / "model").iterdir():
        if file.name != "model.safetensors":
            (model / file.name).symlink_to(file)
    key = "data.eval_data" if "eval_data" in wrong else "data.train_data"
    options = {
        "no model": [f"--moshi_paths.hf_repo_id={model}"],
        "no data": [f"--{key}={folder}/none.jsonl"],
        "no eval_data": [f"--{key}={folder}/none.jsonl"],
    }.get(wrong, [f"--{key}={folder}/all.jsonl"])
    options.append("--do_eval=true")
    endings = []
    for command in (["plan"], ["train", f"--run_dir={tmp_path}/run"]):
        assert call(command[0], config, *command[1:], *options) == 1
        endings.append(capsys.readouterr())
    planned, trained = endings
    assert "peak" in planned.out, "memory is told all the same"
    expected = said.format(folder=folder)
    assert planned.err.startswith("\nerror: train would end with this: ")
    assert expected in planned.err and expected in trained.err
    assert expected not in planned.out


def write_mono(path: Path) -> None:
    import soundfile

    samples, rate = soundfile.read(path)
    soundfile.write(path, samples[:, 0], rate)


def test_what_does_not_fit_ends_with_status_1(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = ["--duration_sec=600", "--batch_size=4000", "--device=auto"]
    assert call("plan", config, "--gpu_memory=1", *large) == 1
    captured = capsys.readouterr()
    assert "it does not fit" in captured.out and "this run does not fit" in captured.err


@pytest.mark.parametrize("size_gb, status", [(80, 0), (16, 1)])
def test_of_memory_alone_the_status_says_whether_the_run_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size_gb: int, status: int
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["example/moshi_ttt.yaml", f"--gpu_memory={size_gb}", "--memory_only"]
    assert call("plan", *words) == status, "the file names data that are not there"
    captured = capsys.readouterr()
    assert f" of {size_gb} GB" in captured.out and "data" not in captured.out
    assert ("this run does not fit" in captured.err) == bool(status)


def test_memory_alone_is_asked_of_one_run_and_a_size(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("plan", config, "--memory_only", "--table") == 1
    assert "give one" in capsys.readouterr().err
    assert call("plan", config, "--memory_only") == 1
    assert "--memory_only: with device: cpu, give --gpu_memory" in capsys.readouterr().err
    assert call("plan", config, "--memory_only", "--gpu_memory=80") == 0


def test_the_placeholders_of_an_example_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert call("plan", "example/moshi_ttt.yaml", "--gpu_memory=80") == 1
    last = capsys.readouterr().err.splitlines()
    assert any("data.train_data: path/to/train.jsonl does not exist" in each for each in last)


def test_a_file_of_init_is_planned_for_the_gpus_that_init_was_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.wav").touch()
    (tmp_path / "a.json").write_text('{"alignments": []}')
    line = json.dumps({"path": "a.wav", "duration": 60})
    (tmp_path / "data.jsonl").write_text(f"{line}\n" * 40)
    out = tmp_path / "my.yaml"
    words = ["--data", tmp_path / "data.jsonl", "--goal=adapt"]
    assert call("init", out, *words, "--gpus=2", "--gpu_memory=24") == 0
    capsys.readouterr()
    call("plan", out)
    said = capsys.readouterr().out
    assert " of 24 GB, as moshi-ttt init was told (--gpus, --gpu_memory)\n" in said
    assert "2 GPUs: one copy of the model" in said and "80 GB" not in said
    call("plan", out, "--gpus=4", "--gpu_memory=40")
    said = capsys.readouterr().out
    assert "4 GPUs" in said and "of 40 GB\n" in said and "24 GB" not in said
    out.write_text("\n".join(out.read_text().splitlines()[1:]))
    call("plan", out)
    assert "for GPUs of 80 GB, as no other size was given" in capsys.readouterr().out


def test_on_a_cpu_nothing_is_said_of_gpus(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", config) == 0
    said = capsys.readouterr().out
    assert "peak" in said and "7 segments" in said
    assert not any(word in said for word in ("GPU", "H100", " of 80 GB", "fit", "arithmetic"))
    assert call("plan", config, "--device=auto") == 0
    said = capsys.readouterr().out
    assert "H100" in said and " of 80 GB" in said and said.endswith("it fits\n")


def test_a_warning_about_data_is_called_one(config: Path, tmp_path: Path) -> None:
    """Of a command that keeps no log."""
    lines = [write_recording(tmp_path, f"{number}.wav", 2.0) for number in range(2)]
    words = {"alignments": some_words(2.0), "mood": "calm"}
    (tmp_path / "1.json").write_text(json.dumps(words))
    listed = write_jsonl(tmp_path / "all.jsonl", lines)
    process = Program(COMMAND, "plan", config, f"--data.train_data={listed}", stderr_apart=True)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0
    assert said.startswith(f"warning: data.train_data: {listed}:2: transcript ")
