import json
import os
import re
import socket
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from forked import Program, run_on_terminal
from tensorboard.summary.writer import event_file_writer

from finetune.errors import UserError
from finetune.monitoring import (
    MetricsLogger,
    describe,
    format_count,
    format_duration,
    open_wandb,
    plot_losses,
    read_metrics,
)

ROOT = Path(__file__).parents[3]
KEY = "0123456789abcdef0123456789abcdef01234567"
ESCAPE = "\x1b"


@dataclass
class Wandb:
    project: str | None = None
    offline: bool = True
    key: str | None = None
    run_name: str | None = None


@pytest.fixture(autouse=True)
def files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads its files by name, which of files of one second and process is that of a
    counter, and its tenth comes before its ninth. No run resumes in the second it began in."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def open_logger(run_dir: Path, resumed_step: int | None = None, **wandb: Any) -> MetricsLogger:
    return MetricsLogger(
        run_dir, wandb_args=Wandb(**wandb), config={"lr": 1.0}, resumed_step=resumed_step
    )


def steps(run_dir: Path, kind: str) -> list[Any]:
    return [r["step"] for r in read_metrics(run_dir / f"metrics.{kind}.jsonl")]


def scalars(run_dir: Path, tag: str) -> list[Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tb"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


# --- files


def test_every_line_is_complete_valid_json_at_once(tmp_path: Path) -> None:
    def refuse(constant: Any) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with open_logger(tmp_path) as metrics:
        metrics.log("train", 1, {"loss": 2.5, "ttt/layer_05/effect": 1e-9})
        metrics.log("train", 2, {"loss": float("nan"), "grad_norm": float("inf"), "lr": -1e400})
        metrics.log("eval", 2, {"text_perplexity": 7.0})
        text = (tmp_path / "metrics.train.jsonl").read_text()  # before closing
    first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert first["time"].endswith("+00:00")
    assert {"step": 1, "loss": 2.5, "ttt/layer_05/effect": 1e-9}.items() <= first.items()
    assert (second["loss"], second["grad_norm"], second["lr"]) == ("NaN", "Infinity", "-Infinity")
    assert read_metrics(tmp_path / "metrics.train.jsonl")[1]["grad_norm"] == float("inf")
    assert steps(tmp_path, "eval") == [2]


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    with open_logger(tmp_path) as metrics:
        metrics.log("train", 3, {"loss": 2.5})
        metrics.log("eval", 3, {"loss": 3.5})
    assert scalars(tmp_path, "train/loss") == [(3, 2.5)]
    assert scalars(tmp_path, "eval/loss") == [(3, 3.5)]


def test_resuming_cuts_off_the_steps_that_run_again(tmp_path: Path) -> None:
    with open_logger(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.log("train", step, {"loss": step})
        metrics.log("eval", 4, {"loss": 4})
    with (tmp_path / "metrics.train.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    with open_logger(tmp_path, resumed_step=3) as metrics:
        metrics.log("train", 4, {"loss": 40})
    assert steps(tmp_path, "train") == [1, 2, 3, 4]
    assert steps(tmp_path, "eval") == []
    assert scalars(tmp_path, "train/loss") == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert sorted(p.name for p in tmp_path.glob("metrics*")) == [
        "metrics.eval.jsonl",
        "metrics.train.jsonl",
    ]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    wandb = Wandb(project="p")
    with MetricsLogger(tmp_path / "run", wandb_args=wandb, config={}, enabled=False) as metrics:
        metrics.log("train", 1, {"loss": 1.0})
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.train.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match=r"metrics\.train\.jsonl cannot be written.*space"),
        open_logger(tmp_path) as metrics,
    ):
        metrics.log("train", 1, {"loss": 1.0})


def test_an_unwritable_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.eval.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.eval\.jsonl cannot be written"):
        open_logger(tmp_path)


def test_a_run_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run cannot be written"):
        open_logger(tmp_path / "run")


# --- wandb


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """wandb as a new user has it: no login, no settings, and a server that nobody answers for."""
    pytest.importorskip("wandb")
    for name in [n for n in os.environ if n.startswith("WANDB_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # 10 s at exit without a network
    return tmp_path / "home"


def run_python(code: str, *arguments: Any, **environment: Any) -> tuple[int, str, str]:
    """Run `code` in a process of its own, without a terminal: exit status, output, errors."""
    words = map(str, arguments)
    process = Program(textwrap.dedent(code), *words, environment=environment, stderr_apart=True)
    output, errors = process.communicate(timeout=120)
    return process.wait(), output, errors


WANDB_RUN = """
    import sys
    from pathlib import Path
    from types import SimpleNamespace
    from finetune.monitoring.console import setup_logging
    from finetune.monitoring.metrics import MetricsLogger

    setup_logging()
    run_dir, key = Path(sys.argv[1]), sys.argv[2]
    args = SimpleNamespace(project="speech", offline=True, key=key, run_name="first")
    config = {"lr": 1.0, "wandb": {"key": key, "project": "speech"}}
    for done in (None, 1):
        with MetricsLogger(
            run_dir, wandb_args=args, config=config, resumed_step=done
        ) as metrics:
            metrics.log("train", 1, {"loss": 1.0})
            metrics.log("eval", 1, {"loss": 1.0})
"""


def test_wandb_offline_works_and_the_key_is_nowhere(tmp_path: Path, wandb_home: Path) -> None:
    run_dir = tmp_path / "run"
    # The key is on the command line too, which wandb saves with a run.
    status, output, errors = run_python(WANDB_RUN, run_dir, KEY)
    assert status == 0, errors
    sync_from = re.findall(r"wandb sync (\S+)", output)
    assert len(sync_from) == 2 and all(list(Path(p).glob("*.wandb")) for p in sync_from)
    run_id = (run_dir / "wandb_run_id").read_text().strip()
    assert len(list(run_dir.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))) == 2

    everything = [p for top in (run_dir, wandb_home) for p in top.rglob("*") if p.is_file()]
    assert len(everything) > 5
    assert [p for p in everything if KEY.encode() in p.read_bytes()] == []
    assert KEY not in output + errors


@pytest.mark.parametrize(("run_name", "name"), [(None, "second"), ("mine", "mine")])
def test_a_wandb_run_is_called_like_its_folder_unless_it_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_name: str | None, name: str
) -> None:
    given: dict[str, Any] = {}

    def init(**options: Any) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(
            id="1", dir=options["dir"], define_metric=lambda *_, **__: None, finish=lambda **_: None
        )

    wandb = SimpleNamespace(init=init, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "second")
    open_logger(Path(), project="p", offline=True, run_name=run_name).close()
    assert given["name"] == name


def test_wandb_without_network_is_one_message(tmp_path: Path, wandb_home: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)cannot be reached.*--wandb\.offline=true") as caught:
        open_logger(tmp_path / "run", project="speech", offline=False, key=KEY)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert "WANDB_API_KEY" not in os.environ
    assert not (tmp_path / "run" / "wandb").exists()


def test_wandb_without_a_key_does_not_ask(tmp_path: Path, wandb_home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code, text = run_on_terminal(
            """
            import sys
            from pathlib import Path
            from types import SimpleNamespace
            from finetune.errors import UserError
            from finetune.monitoring.metrics import MetricsLogger
            args = SimpleNamespace(project="speech", offline=False, key=None, run_name=None)
            try:
                MetricsLogger(Path(sys.argv[1]), wandb_args=args, config={})
            except UserError as error:
                print(error)
            """,
            tmp_path / "run",
            WANDB_BASE_URL=f"http://127.0.0.1:{server.getsockname()[1]}",
        )
    assert code == 0
    assert "give a valid wandb.key" in text and "choice" not in text


def test_wandb_missing_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'moshi-ttt\[wandb\]'"):
        open_logger(tmp_path, project="speech")


# --- console

CONSOLE_RUN = """
    import logging
    from finetune.monitoring.console import Progress, setup_logging

    setup_logging()
    logging.getLogger("finetune.trainer").info("writes to %s", "x" * 100)
    logging.getLogger("urllib3").info("noise")
    metrics = {"loss": 5.314, "text_loss": 3.1, "audio_loss": 2.21, "lr": 1e-3, "step_sec": 0.31}
    with Progress(total=20) as progress:
        for step in range(1, 21):
            progress.update(step, metrics if step % 10 == 0 else {})
        progress.message("eval [at] step 20")
        logging.getLogger("finetune.trainer").warning("careful")
"""


def test_in_a_pipe_lines_are_plain() -> None:
    # FORCE_COLOR, which CI services like to set, must not bring the bar into a file.
    out = run_python(CONSOLE_RUN, FORCE_COLOR="1")[1]
    assert ESCAPE not in out and "\r" not in out
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in out.splitlines()]
    assert lines == [
        "writes to " + "x" * 100,
        "step 10/20  loss 5.31 (text 3.10 audio 2.21)  lr 1.0e-03  0.31 s/step  eta 0:00",
        "step 20/20  loss 5.31 (text 3.10 audio 2.21)  lr 1.0e-03  0.31 s/step  eta 0:00",
        "eval [at] step 20",
        "warning: careful",
    ]


def test_on_a_terminal_the_bar_is_live() -> None:
    code, text = run_on_terminal(CONSOLE_RUN)
    assert code == 0
    assert ESCAPE + "[1A" in text  # the cursor goes up: the bar is drawn again in its place
    assert "step 20/20" in text and "━" in text and "noise" not in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    rows = [row.rstrip() for row in re.split(r"[\r\n]+", plain)]
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d eval \[at\] step 20", row) for row in rows)
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d warning: careful", row) for row in rows)


def test_other_ranks_only_warn_and_say_who_they_are() -> None:
    _, out, _ = run_python(
        """
        import logging
        from finetune.monitoring.console import Progress, setup_logging
        setup_logging(rank=3)
        logging.getLogger("finetune.trainer").info("hello")
        logging.getLogger("finetune.trainer").warning("hot")
        with Progress(total=1, enabled=False) as progress:
            progress.update(1, {"loss": 1.0})
            progress.message("done")
        """
    )
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[rank 3\] warning: hot\n", out)


def test_numbers_for_people() -> None:
    assert [format_count(x) for x in (940, 2900, 84_200, 1.2e6)] == ["940", "2.9k", "84k", "1.2M"]
    assert [format_duration(x) for x in (58, 725, 11220)] == ["0:58", "12:05", "3:07:00"]
    assert describe({}) == ""
    assert describe({"loss": float("nan")}) == "loss nan"
    diverged = {"loss": 2.351e32, "text_loss": 12345.678, "audio_loss": 1e5}
    assert describe(diverged) == "loss 2.35e+32 (text 12345.68 audio 1.00e+05)"


# --- plot


def draw(run_dir: Path) -> int:
    picture = plot_losses(run_dir, run_dir / "plots" / "loss.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    return picture.stat().st_size


def test_plot_of_a_long_run_with_gaps(tmp_path: Path) -> None:
    with open_logger(tmp_path) as metrics:
        for step in range(1, 301):
            loss = float("nan") if step == 50 else 100.0 / step
            metrics.log("train", step, {"loss": 2 * loss, "text_loss": loss, "audio_loss": loss})
        metrics.log("eval", 300, {"loss": 1.0, "text_loss": 0.5, "audio_loss": 0.5})
    assert draw(tmp_path) > 20_000


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_plot_of_a_single_point(tmp_path: Path, kind: Literal["train", "eval"]) -> None:
    with open_logger(tmp_path) as metrics:
        metrics.log(kind, 1, {"loss": 3.0})
    draw(tmp_path)


def test_plot_without_metrics_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no metrics"):
        plot_losses(tmp_path, tmp_path / "loss.png")
    (tmp_path / "metrics.train.jsonl").write_text("hello\n")
    with pytest.raises(UserError, match=r"metrics\.train\.jsonl, line 1"):
        plot_losses(tmp_path, tmp_path / "loss.png")


def test_an_evaluation_in_a_runs_folder_is_not_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SimpleNamespace(id="evaluation", dir=str(tmp_path), define_metric=lambda *_, **__: None)
    wandb = SimpleNamespace(init=lambda **_: run, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "wandb_run_id").write_text("training")
    open_wandb(tmp_path, Wandb("p"), {}, resumed=False, keeps_id=False)
    assert (tmp_path / "wandb_run_id").read_text() == "training"
