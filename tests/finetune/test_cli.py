"""The commands of the README, on the dialogues that come with the project."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from recordings_tools import call
from training_tools import finish, start_program

from finetune import generate, inference
from finetune.cli import run
from finetune.monitoring import metrics_path, read_metrics

ROOT = Path(__file__).parents[2]
DIALOGUES = ROOT / "example/demo/dialogues"


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """`example/demo.yaml`, a few steps of it, on short dialogues."""
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    program = start_program(
        "--config=example/demo.yaml",
        f"--data.train_data={DIALOGUES / 'train.jsonl'}",
        f"--data.eval_data={DIALOGUES / 'eval.jsonl'}",
        f"--data.cache_dir={run_dir.parent / 'codes'}",
        f"--run_dir={run_dir}",
        "--duration_sec=4",
        "--ttt.chunk_size=10",
        "--max_steps=12",
        "--batch_size=2",
        "--log_freq=1",
    )
    status, output = finish(program)
    assert status == 0, output
    return run_dir, output


def test_training_says_what_it_does_and_learns(demo_run: tuple[Path, Any]) -> None:
    run_dir, output = demo_run
    assert (
        "TTT: in-place (delta) in layers 1, 3; up to 4 updates a sequence, every 10 frames (0.8 s)"
        in output
    )
    before, after = read_metrics(metrics_path(run_dir, "eval"))
    assert after["loss"] < 0.8 * before["loss"]
    last = read_metrics(metrics_path(run_dir, "train"))[-1]
    assert last["step"] == 12 and last["ttt/layer_03/effect"] > 1e-4
    checkpoint = run_dir / "checkpoints/checkpoint_000012"
    assert output.splitlines()[-3:] == [
        f"next: moshi-ttt evaluate {checkpoint}",
        f"to hear it: moshi-ttt generate {checkpoint} --audio=CALL.wav",
        f"to talk to it: moshi-ttt serve {checkpoint}",
    ]


def test_a_dialogue_is_continued_to_a_wav_one_can_listen_to(
    demo_run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = demo_run
    sound = tmp_path / "continuation.wav"
    arguments = ["generate", f"--checkpoint={run_dir}/checkpoints/checkpoint_000012"]
    arguments += [f"--audio={DIALOGUES / 'eval_000.wav'}", f"--out={sound}", "--prompt_sec=2"]
    assert call(*arguments) == 0
    audio, rate = soundfile.read(sound)
    heard, _ = soundfile.read(DIALOGUES / "eval_000.wav")
    assert rate == 24_000 and audio.shape == (len(heard), 2)
    # Right: the user, as recorded. Left: Moshi's voice, first the prompt, through Mimi.
    assert np.abs(audio[:, 1] - heard[:, 1]).max() < 1e-3
    assert np.abs(audio[2 * rate :, 0]).max() > 1e-3
    own_words = [
        word
        for word, (start_sec, _), speaker in json.loads((DIALOGUES / "eval_000.json").read_text())[
            "alignments"
        ]
        if speaker == "SPEAKER_MAIN" and start_sec < 1.0
    ]
    printed = capsys.readouterr().out
    assert "|" in printed and all(word in printed for word in own_words)

    # Beside it, the words of all of it, with their times.
    said = json.loads(sound.with_suffix(".json").read_text())["alignments"]
    assert " ".join(word for word, *_ in said) == printed_words(printed)
    assert [word for word, (start, _), _ in said if start < 1.5][: len(own_words)] == own_words
    ends = [times[1] for _, times, _ in said]
    assert ends == sorted(ends) and ends[-1] <= len(audio) / rate + 0.08

    again = tmp_path / "new/again.wav"
    assert call(*arguments[:-2], f"--out={again}", "--prompt_sec=2") == 0
    assert again.read_bytes() == sound.read_bytes(), "the same seed gives the same sound"


def printed_words(printed: str) -> str:
    """The words of the line that says what Moshi said, without the sign between both parts."""
    (line,) = (line for line in printed.splitlines() if line.startswith("Moshi: "))
    return " ".join(line.removeprefix("Moshi: ").replace(" | ", " ").split())


def test_the_loss_curve_is_drawn(demo_run: tuple[Path, Any]) -> None:
    run_dir, _ = demo_run
    assert call("plot", str(run_dir)) == 0
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--checkpoint={run}", "--audio={wav}"], "Did you mean"),
        (
            ["generate", "--checkpoint=nowhere", "--audio={wav}"],
            "there is no folder nowhere; correct the path.",
        ),
        (
            ["generate", "--checkpoint={checkpoint}", "--audio=no.wav", "--out={tmp}/o.wav"],
            "there is no file no.wav",
        ),
        (["generate", "--checkpoint={checkpoint}", "--audio={wav}", "--out={tmp}/o.mp3"], "--out"),
        (
            [
                "generate",
                "--checkpoint={checkpoint}",
                "--audio={wav}",
                "--out={tmp}/o.wav",
                "--prompt_sec=9",
            ],
            "--prompt_sec",
        ),
        (["plot", "nowhere"], "nowhere"),
        *(
            (
                [*words, f"--out={{tmp}}/{name}"],
                f"--out: the picture is a PNG; give a name with .png, and not {name}",
            )
            for words in (["plot", "{run}"], ["data", "stats", "{run}/x.jsonl"])
            for name in ("loss.jpg", "loss")
        ),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["demo-data", "{run}"], "{run}"),
        (["train", "--confg", "x.yaml"], "unknown option: --confg. Did you mean --config?"),
        (["plan", "--conf=x.yaml", "--gpus=8"], "unknown option: --conf. Did you mean --config?"),
        (["encode", "--Config=x.yaml", "--batch_size=8"], "Did you mean --config?"),
        (["train", "--optim.lr=1"], "--config is missing"),
        (["plan", "-c", "x.yaml"], "unknown option: --c. Did you mean --config?"),
        (["plan"], "--config is missing"),
        (["encode"], "--config is missing"),
        (["sweep", "--fille=x.yaml"], "unknown option: --fille. Did you mean --file?"),
        (["sweep", "--table"], "--file is missing"),
        (["plot"], "--run_dir is missing"),
        (["demo-data", "--outdir=x"], "unknown option: --outdir"),
        (["demo-data", "--out_dir=x"], "unknown option: --out_dir. Did you mean --out?"),
        (["recall-audio", "--out_dir=x"], "unknown option: --out_dir. Did you mean --out?"),
        (["demo-data"], "--out is missing"),
        (["data", "indx"], "unknown command: data indx. Did you mean data index?"),
        (["index", "x"], "unknown command: index. Did you mean data index?"),
        (["dat"], "unknown command: dat. Did you mean data?"),
        (["data", "xyz"], "There are index, annotate, check, show, stats, encode."),
        (["data", "index"], "--folder is missing"),
        (["plan", "nowhere.yaml"], "There is no configuration file nowhere.yaml."),
        (["data", "encode", "nowhere.yaml"], "There is no configuration file nowhere.yaml."),
        *(([name, "nowhere"], "there is no folder nowhere") for name in ("evaluate", "serve")),
        (["export", "nowhere", "--out=x"], "there is no folder nowhere"),
        (["generate", "nowhere", "--audio={wav}"], "there is no folder nowhere"),
        (["recall", "x"], "unexpected argument: x. Did you mean --out=x?"),
        (["recall", "spoken"], "Did you mean --variant=spoken?"),
        (["generate", "{checkpoint}", "{wav}"], "Did you mean --audio={wav}?"),
        (["export", "{checkpoint}", "x"], "unexpected argument: x. Did you mean --out=x?"),
        (["train", "example/demo.yaml", "resume"], "Did you mean --resume?"),
        (["completion", "bash", "x"], "unexpected argument: x. Options are given as --NAME=VALUE."),
        (["train", "--config"], "--config needs a value: --config=VALUE."),
        (["train", "--config", "--resume"], "--config needs a value: --config=VALUE."),
        (["train", "example/demo.yaml", "--max_steps"], "--max_steps needs a value"),
        (["train", "example/demo.yaml", "--config=x.yaml"], "example/demo.yaml. --config is given"),
        (["plan", "example/demo.yaml", "--", "max_steps=x"], "unexpected argument: max_steps=x."),
        *(
            (["config", *words], "unknown key: optim.tt_lr. Did you mean optim.ttt_lr?")
            for words in (["optim.tt_lr"], ["--key=optim.tt_lr"], ["--key", "optim.tt_lr"])
        ),
        (["plan", "example/demo.yaml", "key=deadbeefcafe"], "Did you mean --key=***?"),
        *(
            (words.split(), f"--{option}: {{wav}} is a file; name a folder.")
            for words, option in (
                ("evaluate {checkpoint} --out={wav}", "out"),
                ("generate {checkpoint} --audio={wav} --report={wav}", "report"),
                ("recall --out={wav}", "out"),
                ("demo --out={wav}", "out"),
                ("demo-data {wav}", "out"),
                ("recall-audio {wav}", "out"),
                ("export {checkpoint} --out={wav}", "out"),
            )
        ),
        (["evaluate", "{checkpoint}", "--out="], "--out: expected a path, got nothing"),
        (["help", "nope"], "unknown command: nope. There are train,"),
        (["nope", "--help"], "unknown command: nope. There are train,"),
        (["TRAIN"], "unknown command: TRAIN. Did you mean train?"),
        (["--config=x", "train"], "unknown command: --config=x. Options come behind the command."),
        (["train", "{wav}"], "{wav} is a recording, and no configuration."),
        *(
            (["data", name, "{wav}"], "{wav} is a recording; name a list of recordings")
            for name in ("check", "show", "stats", "annotate")
        ),
        (["init", "{tmp}/a.yaml", "--data={wav}"], "--data: {wav} is a recording; name a list"),
        (["data", "show", "example/demo.yaml"], "demo.yaml is a configuration; name a list"),
        (["generate", "{checkpoint}", "--audio=example/demo.yaml"], "configuration; name a rec"),
        (["evaluate", "{checkpoint}", "--pairs={wav}"], "--pairs: {wav} is a recording, which it"),
        (
            ["plan", "example/demo.yaml", "--gpu_mem", "24"],
            "unknown option: --gpu_mem. Did you mean --gpu_memory?",
        ),
        (
            ["evaluate", "{checkpoint}", "--ttt.chunk_size=10"],
            "unknown option: --ttt.chunk_size. Ask for --help to see them all.",
        ),
        (
            ["evaluate", "{checkpoint}", "--wandb.projct=x"],
            "unknown option: --wandb.projct. Did you mean --wandb.project?",
        ),
    ],
)
def test_a_mistake_is_one_message(
    demo_run: tuple[Path, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: Any,
) -> None:
    run_dir, _ = demo_run
    names: dict[str, Any] = {
        "run": run_dir,
        "checkpoint": run_dir / "checkpoints/checkpoint_000012",
        "wav": DIALOGUES / "eval_000.wav",
        "tmp": tmp_path,
    }
    assert call(*(word.format(**names) for word in arguments)) == 1
    said = capsys.readouterr().err
    assert message.format(**names) in said and said.startswith("\nerror: ")
    assert said.count("\n") == 2, "one paragraph"


@pytest.mark.parametrize(
    ("given", "meant"), [("max_step", "max_steps"), ("cache_dir", "data.cache_dir")]
)
def test_a_misspelled_key_is_not_taken_for_an_option(
    capsys: pytest.CaptureFixture[str], given: str, meant: str
) -> None:
    assert call("data", "check", "example/demo.yaml", f"--{given}=2") == 1
    assert f"{given}: unknown key, did you mean {meant}?" in capsys.readouterr().err


def test_a_list_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{}")
    for name in ("train", "plan", "encode", "sweep"):
        assert call(name, str(path)) == 1
        assert f"{path} is a list of recordings, and no conf" in capsys.readouterr().err


def test_an_unforeseen_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def test_what_earlier_programs_import_is_still_there() -> None:
    assert generate.load_for_inference is inference.load_for_inference


@pytest.mark.slow
def test_the_demonstration(tmp_path: Path) -> None:
    """`make demo`, in an empty folder with the configuration and the model."""
    shutil.copytree(ROOT / "example", tmp_path / "example")
    done = subprocess.run(
        [sys.executable, "-c", "from finetune.__main__ import main; main()", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *_, last = read_metrics(metrics_path(tmp_path / "runs/demo", "eval"))
    assert last["loss"] < 0.65 * first["loss"]
    audio, _ = soundfile.read(tmp_path / "runs/demo/continuation.wav")
    assert np.abs(audio[:, 0]).max() > 0.01
    assert "Next:" in done.stdout
    shares = re.search(r"it answered (\d+)% .* without TTT (\d+)%", done.stdout)
    assert shares is not None
    on, off = map(int, shares.groups())
    assert on > 40 and off < 25
    memory = tmp_path / "runs/demo/memory"
    assert {path.suffix for path in memory.iterdir()} == {".wav", ".png"}
