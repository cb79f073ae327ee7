"""Where the program runs: streams that are closed or nobody reads, few files, signals, secrets."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import COMMAND, Program
from training_tools import REPOSITORY, checkpoint, logged_steps, train

from finetune.cli import COMMANDS
from finetune.cli import train as train_command
from finetune.command_line import call
from finetune.config import check_config, load_config
from finetune.monitoring import metrics_path
from finetune.safety import learn_from, learn_from_words, path_problem, redact, secrets
from finetune.safety.outlet import Outlet

KEY = "deadbeefcafe0123456789abcdef0123456789ab"


def program(
    *arguments: Any, code: str = "", environment: Any = None, shell: Any = None, **options: Any
) -> subprocess.Popen[str]:
    """`moshi-ttt` as a user starts it; with `shell`, as the `$0` of that line of bash."""
    command = [sys.executable, "-m", "finetune", *map(str, arguments)]
    if code:
        start = "import sys; sys.argv[0] = 'moshi-ttt'; from finetune.__main__ import main; main()"
        command[1:3] = ["-u", "-c", f"{code}\n{start}"]
    if shell:
        command = ["bash", "-c", shell.replace("$0", shlex.join(command))]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    variables = {name: value for name, value in variables.items() if value is not None}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    return subprocess.Popen(command, cwd=REPOSITORY, env=variables, **options)


def finished(*arguments: Any, **options: Any) -> tuple[Any, Any]:
    process = program(*arguments, **options)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


# --- secrets --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())


@pytest.mark.parametrize(
    "words",
    [
        [f"--wandb.key={KEY}"], [f"wandb.key={KEY}"], ["--wandb.key", KEY], ["wandb.key", "=", KEY],
        ["wandb.key", f"={KEY}"], ["wandb.key=", KEY], [f"--wandb.api_key='{KEY}'"],
        [f"-wandb-key={KEY}"], [f"--wandb.key={KEY}", "--wandb.key=other-secret"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_key_is_known_however_it_is_typed(words: list[str]) -> None:
    learn_from_words(["train", "x.yaml", *words, "--max_steps=1"])
    assert KEY not in redact(f"no {KEY}, or '{KEY}.'")
    assert redact("max_steps: 1, x.yaml, other") == "max_steps: 1, x.yaml, other"


def test_keys_of_files_and_the_environment_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    learn_from_words([])
    learn_from({"wandb.key": ["in-a-list"], "wandb.token": "misspelled", "lr": "123456789"})
    assert redact(f"{KEY} in-a-list misspelled 123456789") == "*** *** *** 123456789"


def test_no_message_repeats_a_key(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "run.yaml"
    content = yaml.safe_load(config.read_text())
    file.write_text(yaml.safe_dump(content | {"wandb": {"key": KEY, "project": [KEY]}}))
    for words in (
        [str(config), f"wandb.key={KEY}"],
        [str(config), f"--optim.lr={KEY}", f"--wandb.key={KEY}"],
        [str(config), f"--run_dir={tmp_path}/file/{KEY}", f"--wandb.key={KEY}"],
        [str(file), f"--optim.lr={KEY}"],
        [f"{tmp_path}/{KEY}.yaml", "--wandb.key", KEY],
    ):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        assert call(train_command, name="train.py") == 1
        said = "".join(capsys.readouterr())
        assert "error: " in said and KEY not in said


@pytest.mark.parametrize("key", [KEY, 3 * KEY])
@pytest.mark.parametrize("words", ["--batch_size={}", "--task={}", "--pair_side={}", "{}", "{}=1"])
def test_a_message_about_an_option_hides_the_key_before_it_is_shortened(
    key: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [words.format(key), "--checkpoint=x", f"--wandb.key={key}"]
    monkeypatch.setattr(sys, "argv", ["moshi-ttt", *given])
    assert call(COMMANDS["evaluate"], name="evaluate") == 1
    said = "".join(capsys.readouterr())
    assert "error: " in said and KEY[:20] not in said


def holding(key: str, folder: Path) -> list[Any]:
    """The files in a folder, and names, that hold a key."""
    return [
        path
        for path in folder.rglob("*")
        if key in str(path.relative_to(folder))
        or (path.is_file() and not path.is_symlink() and key.encode() in path.read_bytes())
    ]


@pytest.mark.slow
def test_no_file_and_no_stream_of_any_command_holds_the_key(config: Path, tmp_path: Path) -> None:
    run_dir, saved = tmp_path / "run", checkpoint(tmp_path / "run", 1)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"base: {config}\nsweep_dir: {tmp_path}/sweep\nruns:\n  a: {{max_steps: 1}}\n")
    audio = config.parent / "eval/0.wav"
    wandb = ("--wandb.project=p", "--wandb.offline=true", f"--wandb.key={KEY}")
    commands: dict[tuple[str | Path, ...], int] = {
        ("train", config, f"--run_dir={run_dir}", "--max_steps=1", *wandb): 0,
        ("train", config, f"--run_dir={run_dir}", f"wandb.key={KEY}"): 1,
        ("train", config, f"--run_dir={run_dir}", "--resume", "--max_steps=2", *wandb): 0,
        ("plan", f"--config={config}", *wandb): 0,
        ("encode", f"--config={config}", f"--data.cache_dir={tmp_path}/codes", *wandb): 0,
        ("sweep", sweep, f"--wandb.key={KEY}", "--wandb.project=p", "--wandb.offline=true"): 0,
        ("sweep", sweep, "--slurm", f"--wandb.key={KEY}"): 1,
        ("sweep", sweep, "--slurm"): 0,
        ("generate", f"--checkpoint={saved}", f"--audio={audio}", "--prompt_sec=0.5",
         f"--out={tmp_path}/o.wav"): 0,
        ("generate", f"--checkpoint={saved}", f"--wandb.key={KEY}"): 1,
        ("evaluate", f"--checkpoint={saved}", f"--out={tmp_path}/evaluation", "--tasks=position",
         f"--data={config.parent}/eval/all.jsonl", *wandb): 0,
        ("evaluate", f"--batch_size={KEY}", f"--checkpoint={saved}", f"--wandb.key={KEY}"): 1,
        ("plot", run_dir): 0,
        ("recall", f"--wandb.key={KEY}"): 1,
        ("demo-data", tmp_path / "data", f"--wandb.key={KEY}"): 1,
    }  # fmt: skip
    for command, expected in commands.items():
        status, output = finished(*command, environment={"WANDB_API_KEY": KEY, "WANDB_SILENT": "1"})
        assert status == expected, (command, output)
        assert KEY not in output, command
        assert "Traceback" not in output, (command, output)
    assert holding(KEY, tmp_path) == []
    assert (tmp_path / "sweep/sweep.sbatch").is_file()


# --- standard streams -----------------------------------------------------------------------------


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError

    flush = None  # type: ignore[assignment]


def test_a_stream_that_nobody_reads_falls_silent() -> None:
    outlet = Outlet(Gone())
    for _ in range(3):
        assert print("text", file=outlet) is None
        outlet.flush()
    closed = io.StringIO()
    closed.close()
    outlet = Outlet(closed)
    assert not outlet.isatty()
    outlet.write("text")
    outlet.flush()


def test_a_terminal_that_knows_ascii_alone() -> None:
    bytes_written = io.BytesIO()
    outlet = Outlet(io.TextIOWrapper(bytes_written, encoding="ascii"))
    outlet.write("größer … \udcff\n")
    outlet.flush()
    assert bytes_written.getvalue() == rb"gr\xf6\xdfer \u2026 \udcff" + b"\n"


SHOUTS = """
import os, finetune.trainer
step = finetune.trainer.Trainer.train_step
def shouting(self):
    for descriptor in (1, 2):
        os.write(descriptor, b"a line of C code")
    step(self)
finetune.trainer.Trainer.train_step = shouting
"""


CLOSED = """
import os, sys
for descriptor in range(3):
    os.close(descriptor)
sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None
"""
"""What Python makes of streams that are closed as it starts."""


@pytest.mark.parametrize(
    "is_forked", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["", "from its start"]
)
def test_closed_streams_take_no_files_place(config: Path, tmp_path: Path, is_forked: bool) -> None:
    run = ("train", config, f"--run_dir={tmp_path}", "--do_eval=true")
    if is_forked:
        status = Program(f"{CLOSED}\n{SHOUTS}\n{COMMAND}", *run).wait(timeout=200)
    else:
        status, _ = finished(*run, code=SHOUTS, shell="$0 <&- >&- 2>&-", stdout=None, stderr=None)
    assert status == 0
    assert holding("C code", tmp_path) == []
    for kind in ("train", "eval"):
        for line in metrics_path(tmp_path, kind).read_text().splitlines():
            json.loads(line)
    assert train(config, tmp_path, {"resume": True, "max_steps": 5}).step == 5


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["$0 | head -n1", "$0 | true", "$0 2>&1 >/dev/full"])
def test_a_pipe_that_ends_does_not_end_the_run(config: Path, tmp_path: Path, shell: str) -> None:
    run = ("train", config, f"--run_dir={tmp_path}")
    status, output = finished(*run, shell=f"set -o pipefail; {shell}")
    assert status == 0 and "Traceback" not in output and "Exception" not in output
    assert logged_steps(tmp_path) == [1, 2, 3, 4]


# --- the rest of the system -----------------------------------------------------------------------

PLACES: dict[str, Any] = {
    "few files": ({}, "ulimit -n 64; $0"),
    "ASCII": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "$0"),
    "no home": ({"HOME": None}, "$0"),
    "a home that is not there": ({"HOME": "/proc/nowhere", "MPLCONFIGDIR": "/proc/nowhere"}, "$0"),
    "a dumb terminal": ({"TERM": "dumb"}, 'script -qec "$0" /dev/null'),
    "no terminal type": ({"TERM": None}, "$0"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("variables", "shell"), PLACES.values(), ids=PLACES)
def test_places_to_run_in(config: Path, tmp_path: Path, variables: Any, shell: Any) -> None:
    name = "plain" if variables.get("LC_ALL") == "C" else "größe"
    run: tuple[Any, ...] = ("train", config, f"--run_dir={tmp_path}/{name}", "--data.num_workers=2")
    run += ("--do_eval=true", "--health_sec=0")
    status, output = finished(*run, shell=shell, environment=variables)
    assert status == 0, output
    assert "warning" not in output.lower() and "Traceback" not in output
    status, output = finished("plot", f"{tmp_path}/{name}", shell=shell, environment=variables)
    assert status == 0 and "loss.png" in output
    assert len(output.strip().splitlines()) == 1, output


@pytest.mark.slow
def test_a_name_that_the_locale_does_not_know_is_one_message(config: Path, tmp_path: Path) -> None:
    variables, shell = PLACES["ASCII"]
    run = ("train", config, f"--run_dir={tmp_path}/größe")
    status, output = finished(*run, shell=shell, environment=variables)
    assert status == 1 and "Traceback" not in output, output
    assert output.strip().splitlines()[-1].startswith("error: run_dir: ")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "100k", "400k"])
def test_shared_memory_that_is_too_small_is_one_message(
    config: Path, tmp_path: Path, size: str
) -> None:
    mount = f'unshare -m bash -c "mount -t tmpfs -o size={size} none /dev/shm && $0"'
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("only root can mount")
    run = ("train", config, f"--run_dir={tmp_path}/run", "--data.num_workers=2")
    status, output = finished(*run, shell=mount)
    assert status == 1
    assert "Traceback" not in output and "Exception" not in output
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: ") and "data.num_workers" in last and "--shm-size" in last


CLOCK = """
import time
now = time.time
time.time = lambda: 2 * start - now()  # it runs backwards
start = now()
"""


@pytest.mark.slow
def test_a_clock_that_runs_backwards_harms_nothing(config: Path, tmp_path: Path) -> None:
    run = ("train", config, f"--run_dir={tmp_path}", "--ckpt_freq=1", "--do_eval=true")
    status, output = finished(*run, code=CLOCK)
    assert status == 0, output
    assert logged_steps(tmp_path) == [1, 2, 3, 4]


def slowed(place: str, name: str, seconds: int = 4) -> str:
    """Code that says so, and waits, before a function is called."""
    return f"""
import time, {place.split(":")[0]} as module
owner = module{"." + place.split(":")[1] if ":" in place else ""}
before = owner.{name}
def slowly(*arguments, **options):
    print("HERE", flush=True)
    time.sleep({seconds})
    return before(*arguments, **options)
owner.{name} = slowly
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("train", slowed("finetune.trainer", "load_model"), "stopped by"),
        ("resume", slowed("finetune.trainer", "load_model"), "stopped by"),
        ("train", slowed("finetune.trainer:Trainer", "next_batches"), "stopped after step 1"),
        ("train", slowed("finetune.trainer", "evaluate"), "stopped before the first step"),
        ("encode", slowed("finetune.data.codec:Codec", "encode_audio"), "stopped by"),
        ("evaluate", slowed("finetune.data.codec:Codec", "encode_blocks"), "stopped by"),
        ("generate", slowed("finetune.inference", "generate_codes"), "stopped by"),
    ],
    ids=["loading", "resuming", "waiting for data", "evaluating", "encode", "evaluate", "generate"],
)
def test_a_signal_ends_it_with_a_message(
    config: Path, tmp_path: Path, number: Any, command: str, code: str, said: str
) -> None:
    run_dir = tmp_path / "run"
    if command != "encode" and command != "train":
        train(config, run_dir)
    saved, data = checkpoint(run_dir, 4), config.parent / "eval"
    arguments = {
        "train": ("train", config, f"--run_dir={run_dir}", "--max_steps=1000", "--do_eval=true"),
        "resume": ("train", config, f"--run_dir={run_dir}", "--max_steps=1000", "--resume"),
        "encode": ("encode", f"--config={config}", f"--data.cache_dir={tmp_path}/codes"),
        "evaluate": ("evaluate", f"--checkpoint={saved}", f"--data={data}/all.jsonl",
                     "--tasks=position", f"--out={tmp_path}/out"),
        "generate": ("generate", f"--checkpoint={saved}", f"--audio={data}/0.wav",
                     "--prompt_sec=0.5", f"--out={tmp_path}/o.wav"),
    }[command]  # fmt: skip
    process = program(*arguments, code=code)
    assert process.stdout is not None
    for line in process.stdout:
        if "HERE" in line:
            break
    time.sleep(0.3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert said in output.strip().splitlines()[-1]
    assert "Traceback" not in output
    if command == "train" and "stopped by" in said:
        assert not run_dir.exists()


# --- paths ----------------------------------------------------------------------------------------

NO_PATHS = ["a" * 5000, "x/" * 2500, "a\0b", "\ud800", "~nobody_has_this_name/x", "b" * 256]


@pytest.mark.parametrize("path", NO_PATHS, ids=lambda path: ascii(path)[:20])
def test_what_no_path_can_be_is_one_message(config: Path, path: str) -> None:
    assert path_problem(path) is not None
    keys = ["run_dir", "data.train_data", "data.eval_data", "data.cache_dir",
            "moshi_paths.moshi_path", "moshi_paths.init_from"]  # fmt: skip
    for key in keys:
        ((found, text),) = check_config(config, {key: path}).problems
        assert found == key and len(text) < 300
        text.encode()
    assert check_config(config).problems == []


@pytest.mark.parametrize("path", ["a", "/a/b", "~/a", "größe", "\udcff", "a" * 255, "../x"])
def test_what_a_path_can_be(config: Path, path: str) -> None:
    assert path_problem(path) is None
    assert load_config(config, {"run_dir": path}).run_dir == os.path.expanduser(path)
