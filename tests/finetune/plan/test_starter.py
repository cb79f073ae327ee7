"""`moshi-ttt init`: a first configuration that fits."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import COMMAND, run_on_terminal
from full_disk import FULL, room_for
from recordings_tools import call

from finetune.config import TrainArgs, load_config
from finetune.model import exported_ttt_args
from finetune.plan import plan, starter

ROOT = Path(__file__).parents[3]


def data(folder: Path, length_sec: float, number: int = 40) -> Path:
    (folder / "a.wav").touch()
    (folder / "a.json").write_text('{"alignments": []}')
    line = json.dumps({"path": "a.wav", "duration": length_sec})
    (folder / "data.jsonl").write_text(f"{line}\n" * number)
    return folder / "data.jsonl"


@pytest.mark.parametrize(
    ("goal", "length_sec", "gpus", "gpu_memory"),
    [
        ("remember", 400, 1, 80),
        ("remember", 30, 2, 40),
        ("adapt", 60, 4, 24),
        ("remember", 100, 1, 24),
    ],
)
def test_the_file_is_valid_and_plan_says_that_it_fits(
    tmp_path: Path,
    goal: str,
    length_sec: int,
    gpus: int,
    gpu_memory: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "made/my.yaml"
    words = [f"--goal={goal}", f"--gpus={gpus}", f"--gpu_memory={gpu_memory}"]
    assert call("init", out, "--data", data(tmp_path, length_sec), *words) == 0
    args = load_config(out)
    assert args.data.train_data == str(tmp_path / "data.jsonl")
    lines = list(plan(args, num_gpus=gpus, gpu_memory_gb=gpu_memory))
    assert lines[-1] == "it fits"
    (peak,) = [line for line in lines if line.strip().startswith("peak")]
    said = capsys.readouterr().out
    assert re.search(rf"some {float(peak.split()[1]):.0f} of {gpu_memory} GB", said)
    assert f"moshi-ttt plan --config {out} --gpus {gpus}" in said
    # Where there is no train.py.
    several = f"torchrun --nproc-per-node {gpus} -m finetune train {out}\n"
    assert f"then: {f'moshi-ttt train {out}' if gpus == 1 else several}" in said
    assert "but: " not in said
    assert args.ttt.enabled == (goal == "remember")
    # Only where nothing else fits.
    assert args.base_precision == ("nf4" if (gpus, gpu_memory) == (1, 24) else "bfloat16")
    if goal == "remember":
        # Something must be left for TTT to remember.
        window = args.model.attention_context or 3000
        assert window < 12.5 * args.duration_sec <= 12.5 * length_sec + 12.5


def test_a_larger_gpu_takes_more_at_once(tmp_path: Path) -> None:
    sizes: list[Any] = []
    for gpu_memory in (28, 80):
        out = tmp_path / f"{gpu_memory}.yaml"
        words = ["--goal=adapt", f"--gpu_memory={gpu_memory}"]
        assert call("init", out, "--data", data(tmp_path, 100), *words) == 0
        args = load_config(out)
        sizes.append(args.batch_size)
        assert args.batch_size * args.num_microbatches == 16
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(("gpus", "most"), [(1, 27), (4, 27), (64, 64)])
def test_a_step_takes_no_more_than_there_is(tmp_path: Path, gpus: int, most: int) -> None:
    """Of recordings that are a little longer than a segment the rest is no second one; each GPU
    takes one at least."""
    out, listed = tmp_path / "my.yaml", data(tmp_path, 11.9, 14)
    text = listed.read_text()
    listed.write_text(text + data(tmp_path, 12.3, 13).read_text())
    words = ["--goal=adapt", "--gpu_memory=80", f"--gpus={gpus}"]
    assert call("init", out, "--data", listed, *words) == 0
    args = load_config(out)
    assert args.duration_sec == 12
    assert most // 2 < args.batch_size * args.num_microbatches * gpus <= most


@pytest.mark.parametrize(
    ("num_layers", "layers"), [(1, [0]), (4, [1, 3]), (6, [1, 3, 5]), (32, [5, 11, 17, 23, 29])]
)
def test_layers_learn_that_the_model_has(
    tmp_path: Path, num_layers: int, layers: list[int]
) -> None:
    shape = json.loads((ROOT / "example/demo/model/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape | {"num_layers": num_layers}))
    out = tmp_path / "my.yaml"
    words = ["--goal=remember", "--gpu_memory=24", f"--repo={tmp_path}"]
    assert call("init", out, "--data", data(tmp_path, 30), *words) == 0
    assert load_config(out).ttt.layers(num_layers) == layers


@pytest.mark.parametrize(("length_sec", "context"), [(30, None), (6, 25)])
def test_attention_is_cut_only_where_it_would_see_all(
    tmp_path: Path, length_sec: int, context: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model of the demonstration sees 8 s."""
    out = tmp_path / "my.yaml"
    words = ["--goal=remember", "--gpu_memory=24", f"--repo={ROOT / 'example/demo/model'}"]
    assert call("init", out, "--data", data(tmp_path, length_sec), *words) == 0
    assert load_config(out).model.attention_context == context
    assert ("what attention sees (8 s)" in out.read_text()) is (context is not None)
    said = "warning: attention sees 8 s, which is most of a recording or all of it"
    assert (said in capsys.readouterr().out) is (context is not None)


@pytest.mark.parametrize("goal", ["adapt", "remember"])
def test_a_small_model_gets_what_it_learns_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], goal: str
) -> None:
    def written(name: str, repo: Path) -> TrainArgs:
        out = tmp_path / f"{name}.yaml"
        words = [f"--goal={goal}", "--gpu_memory=8", f"--repo={repo}", f"--run_dir={tmp_path}/run"]
        assert call("init", out, "--data", listed, *words) == 0
        return load_config(out)

    def learns_fast(args: TrainArgs) -> bool:
        return (args.optim.lr, args.optim.ttt_lr, args.param_dtype) == (2e-3, 2e-3, "float32")

    dialogues = ROOT / "example/demo/dialogues"
    listed = tmp_path / "data.jsonl"
    lines = [json.loads(each) for each in (dialogues / "train.jsonl").read_text().splitlines()]
    listed.write_text(
        "".join(
            f"{json.dumps({**each, 'path': str(dialogues / each['path'])})}\n" for each in lines
        )
    )
    empty = written("empty", ROOT / "example/demo/model")
    said = capsys.readouterr().out
    assert "has no weights of Moshi, so that all of it is trained from random ones" in said
    assert "far smaller than Moshi 7B (128 wide)" in said and "but: " not in said
    assert learns_fast(empty) and empty.full_finetuning and empty.moshi_paths.random_init
    # What was written trains.
    few = ["--device=cpu", "--max_steps=2", "--compile=false", f"--data.cache_dir={tmp_path}/codes"]
    assert call("train", tmp_path / "empty.yaml", *few) == 0
    capsys.readouterr()

    trained = written("trained", ROOT / "example/memory")
    assert learns_fast(trained) and trained.lora.enable and not trained.moshi_paths.random_init
    assert "random" not in capsys.readouterr().out


@pytest.mark.parametrize("goal", ["remember", "adapt"])
def test_a_model_with_ttt_goes_on_as_it_was_trained(
    tmp_path: Path, goal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its memory was thrown away, with another chunk_size than it had."""
    repo, out = ROOT / "example/memory", tmp_path / "my first.yaml"
    words = [f"--goal={goal}", "--gpu_memory=8", f"--repo={repo}", f"--run_dir={tmp_path}/run"]
    listed = ROOT / "example/demo/dialogues/train.jsonl"
    assert call("init", out, "--data", listed, *words) == 0
    said = capsys.readouterr().out
    assert f"note: {repo} was trained with TTT, and the run goes on from it" in said
    assert f"train '{out}'" in said, "it can be pasted"
    args = load_config(out)
    assert args.moshi_paths.init_from == args.moshi_paths.hf_repo_id == str(repo)
    assert args.ttt == exported_ttt_args(repo / "ttt.safetensors")
    assert args.ttt.chunk_size == 32
    # What plan and train say of TTT that is left behind.
    assert call("plan", "--config", out, "--gpu_memory=8", "--device=cpu") == 0
    assert "leaves it out" not in capsys.readouterr().out


def test_a_base_that_lacks_more_than_weights_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "example/demo/model/config.json", tmp_path)
    words = ["--goal=adapt", "--gpu_memory=8", f"--repo={tmp_path}"]
    assert call("init", tmp_path / "my.yaml", "--data", data(tmp_path, 30), *words) == 0
    said = capsys.readouterr().out
    assert "but: train will end with this error: moshi_paths.mimi_config_path: there is no" in said


def test_a_folder_that_holds_a_run_is_not_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.yaml").touch()
    words = ["--data", data(tmp_path, 100), "--goal=adapt", "--gpu_memory=80"]
    for name, chosen in (("run", "run-3"), ("empty", "empty"), ("new", "new")):
        assert call("init", tmp_path / f"{name}.yaml", *words, f"--run_dir={tmp_path / name}") == 0
        assert load_config(tmp_path / f"{name}.yaml").run_dir == str(tmp_path / chosen)
        said = f"{tmp_path / name} holds something already: the run's folder is to be"
        assert (said in capsys.readouterr().out) is (name != chosen)


def test_what_cannot_be_is_said_and_nothing_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my.yaml"
    words = ["init", out, "--data", data(tmp_path, 100), "--goal=adapt"]
    assert call(*words, "--gpu_memory=8") == 1
    assert "at the least it takes" in capsys.readouterr().err and not out.exists()
    # Shared by eight, it takes less than on one of them in fewer bits, which is tried last.
    assert call(*words, "--gpu_memory=7", "--gpus=8") == 1
    assert "at the least it takes 7.4 GB" in capsys.readouterr().err
    out.write_text("mine")
    assert call(*words, "--gpu_memory=80") == 1
    assert "is there already" in capsys.readouterr().err and out.read_text() == "mine"
    out.unlink()
    assert call(*words) == 1
    assert "--gpu_memory is missing" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", data(tmp_path, 60), "--goal=adapt", "--gpus=1", "--gpu_memory=80"]
    before = sorted(path.name for path in tmp_path.iterdir())
    write = starter.write_whole

    def without_room(*what: Any) -> None:
        with room_for(100):
            write(*what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starter, "write_whole", without_room)
        assert call("init", tmp_path / "my.yaml", *words) == 1
    assert f"my.yaml cannot be written: {FULL}." in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("lengths", "status"), [((0, -3, 100), 0), ((0, -3), 1)])
def test_recordings_without_a_length_do_not_count(
    tmp_path: Path, lengths: tuple[int, ...], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"path": "a.wav", "duration": length}) for length in lengths]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    out = tmp_path / "my.yaml"
    words = ["--data", tmp_path / "data.jsonl", "--goal=adapt", "--gpu_memory=80"]
    assert call("init", out, *words) == status
    if status:
        assert "lists no recording that has a length" in capsys.readouterr().err
    else:
        assert "# 1 recording," in out.read_text()


@pytest.mark.parametrize("folder", ["a,b", "half:"])
def test_data_that_a_configuration_would_read_as_another_path_are_refused(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / folder
    place.mkdir()
    path = data(place, 100)
    if folder == "half:":
        path = path.rename(tmp_path / "data.jsonl:5")
    out = tmp_path / "my.yaml"
    assert call("init", out, "--data", path, "--goal=adapt", "--gpu_memory=80") == 1
    assert f"--data: {path} cannot stand in a configuration" in capsys.readouterr().err
    assert not out.exists()


def test_on_a_terminal_what_is_missing_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    listed, wrong = data(tmp_path, 100), tmp_path / "wrong.jsonl"
    empty, other = tmp_path / "empty", tmp_path / "wrong.txt"
    empty.mkdir()
    answers = f"\n{wrong}\n{other}\n{empty}\n{listed}\nlearn\nnull\nadapt\nmuch\n80\n"
    monkeypatch.setattr(sys, "stdin", Terminal(answers))
    assert call("init", tmp_path / "my.yaml") == 0
    said = capsys.readouterr()
    for question in (
        "The JSONL to train on.\ndata: ",
        "manner or subject, without TTT.\ngoal: ",
        "Memory of each GPU, in GB.\ngpu_memory: ",
    ):
        assert question in said.out
    of_data, rest = said.err.splitlines()[:3], said.err.splitlines()[3:]
    assert all(str(path) in line for path, line in zip((wrong, other, empty), of_data, strict=True))
    assert rest == [
        "expected remember or adapt, got 'learn'",
        "expected remember or adapt, got nothing",
        "expected a number, got 'much'",
    ]
    assert not load_config(tmp_path / "my.yaml").ttt.enabled

    monkeypatch.setattr(sys, "stdin", Terminal(f"{tmp_path / 'data.jsonl'}\n"))  # and Ctrl-D
    assert call("init", tmp_path / "other.yaml") == 1
    assert "--goal is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--goal=learn", "error: --goal: expected remember or adapt, got 'learn'"),
        ("--goal=null", "error: --goal: expected remember or adapt, got nothing"),
        ("--gpu_memory=much", "error: --gpu_memory: expected a number, got 'much'"),
        ("--data=", "error: --data: expected a path, got nothing"),
    ],
)
def test_null_is_no_choice_where_the_command_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    given = {"--data": data(tmp_path, 60), "--goal": "adapt", "--gpu_memory": 80}
    name, _, text = word.partition("=")
    words = [f"{key}={value}" for key, value in (given | {name: text}).items()]
    assert call("init", tmp_path / "my.yaml", *words) == 1
    assert capsys.readouterr().err.strip() == message


def test_a_terminal_shows_how_many_recordings_are_read(tmp_path: Path) -> None:
    words = ["--data", data(tmp_path, 60), "--goal=adapt", "--gpu_memory=80"]
    status, said = run_on_terminal(COMMAND, "init", tmp_path / "my.yaml", *words)
    assert status == 0, said
    measured, read = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", said).split("wrote")
    assert re.search(r"measuring \S+ 40/40 ", measured)
    assert re.search(r"reading transcripts \S+ 40/40 ", read)


def test_evaluation_data_that_hold_nothing_leave_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "eval.jsonl").touch()
    words = ["--data", data(tmp_path, 60), "--goal=adapt", "--gpu_memory=80"]
    out = tmp_path / "my.yaml"
    assert call("init", out, *words, "--eval_data", tmp_path / "eval.jsonl") == 1
    assert "eval.jsonl is empty" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("wrong", ["untranscribed", "no audio", "a damaged line", "in eval_data"])
def test_data_that_stop_training_are_to_be_checked_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    listed, out = data(tmp_path, 60), tmp_path / "my.yaml"
    words = ["--goal=adapt", "--gpu_memory=80"]
    if wrong == "untranscribed":
        (tmp_path / "a.json").unlink()
    elif wrong == "no audio":
        (tmp_path / "a.wav").unlink()
    elif wrong == "a damaged line":
        listed.write_text(listed.read_text() + "{\n")
    else:
        other = tmp_path / "eval.jsonl"
        other.write_text('{"path": "b.wav", "duration": 60}\n')
        words += ["--eval_data", str(other)]
    assert call("init", out, "--data", listed, *words) == 0
    but, *steps = capsys.readouterr().out.splitlines()[-4:]
    place = {"a damaged line": "data.jsonl:41", "in eval_data": "eval.jsonl:1"}
    start = f"but: train will stop at these data: {tmp_path / place.get(wrong, 'data.jsonl:1')}: "
    assert but.startswith(start)
    assert steps[0] == f"next: moshi-ttt data check {out}"
    assert [each.split(" --")[0] for each in steps[1:]] == [
        "then: moshi-ttt plan",
        f"then: moshi-ttt train {out}",
    ]
