"""The Hugging Face hub: asked once, for a few seconds at most, and without its library's noise."""

import contextlib
import dataclasses
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from moshi.models import loaders
from recordings_tools import call
from training_tools import LM_CONFIG

from finetune.config import DataArgs, LoraArgs, ModelPaths, TrainArgs
from finetune.errors import UserError
from finetune.model import find_checkpoint, hub
from finetune.plan import plan

TIMEOUT_SEC = 0.5
REPO = "kyutai/no-such-moshi"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Sets the hub's address, for processes that cannot wait; the connections that it got."""
    monkeypatch.setattr(hub, "TIMEOUT_SEC", TIMEOUT_SEC)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "*")
    with contextlib.ExitStack() as stack:

        def at(endpoint: Any, answer: Any = None) -> list[Any]:
            connections: list[Any] = []
            if endpoint is None:
                server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"

                def serve() -> None:
                    with contextlib.suppress(OSError):  # the test is over
                        while True:
                            connections.append(server.accept()[0])
                            if answer:
                                connections[-1].sendall(answer)

                threading.Thread(target=serve, daemon=True).start()
                stack.callback(lambda: [connection.close() for connection in connections])
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            return connections

        yield at


CLOSED, SILENT, NO_ADDRESS = "http://127.0.0.1:9", None, "http://[no address"


@pytest.mark.parametrize("endpoint", [CLOSED, SILENT, NO_ADDRESS, ""])
def test_a_hub_that_does_not_answer_is_given_up_in_time(
    asked: Callable[..., Any], endpoint: str | None
) -> None:
    connections = asked(endpoint)
    started_at = time.monotonic()
    assert not hub.is_reachable()
    assert time.monotonic() - started_at < TIMEOUT_SEC + 0.5
    assert len(connections) == (endpoint is SILENT)


def test_many_addresses_take_no_longer_than_one(
    asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a name has where a firewall lets nothing through: each would be waited for."""
    asked(CLOSED)

    def connect(*args: Any, **kwargs: Any) -> None:
        time.sleep(4 * TIMEOUT_SEC)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", connect)
    started_at = time.monotonic()
    assert not hub.is_reachable()
    assert time.monotonic() - started_at < TIMEOUT_SEC + 0.5


@pytest.mark.parametrize("status", ["200 OK", "403 Forbidden", "500 Internal Server Error"])
def test_any_answer_counts(asked: Callable[..., Any], status: str) -> None:
    asked(SILENT, answer=f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
    assert hub.is_reachable()


def test_what_is_no_answer_does_not(asked: Callable[..., Any]) -> None:
    asked(SILENT, answer=b"SSH-2.0-OpenSSH_9.6\r\n")
    assert not hub.is_reachable()


ARGS = TrainArgs(
    DataArgs(train_data="nowhere.jsonl"),
    "run",
    moshi_paths=ModelPaths(hf_repo_id=REPO),
    lora=LoraArgs(enable=True, rank=2),
)


@pytest.mark.parametrize("endpoint", [CLOSED, SILENT])
def test_plan_says_once_that_the_hub_is_not_there_and_goes_on(
    asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, endpoint: str | None
) -> None:
    # Of that size Moshi's shape takes no time.
    shape = {key: value for key, value in LM_CONFIG.items() if key in loaders._lm_kwargs}
    monkeypatch.setattr(loaders, "_lm_kwargs", loaders._lm_kwargs | shape)
    connections = asked(endpoint)
    noise = io.StringIO()
    started_at = time.monotonic()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        lines = list(plan(ARGS, num_gpus=1, gpu_memory_gb=80))
    assert time.monotonic() - started_at < TIMEOUT_SEC + 3
    assert noise.getvalue() == ""
    assert [line for line in lines if REPO in line] == [lines[0]]
    assert lines[0].endswith(f"shape of Moshi 7B, as {REPO} cannot be asked")
    assert lines[-1] == "it fits" and len(connections) <= 1


def answer(error: Any) -> Callable[..., Any]:
    def download(*_: Any, **__: Any) -> None:
        if issubclass(error, HFValidationError | LocalEntryNotFoundError):
            raise error("no such name")
        raise error("404", response=requests.Response())

    return download


def words_of_init(tmp_path: Path, repo: str) -> list[Any]:
    (tmp_path / "data.jsonl").write_text(json.dumps({"path": "a.wav", "duration": 60}) + "\n")
    data = ["--data", tmp_path / "data.jsonl", "--goal=adapt", "--gpu_memory=80"]
    return ["init", tmp_path / "my.yaml", *data, f"--repo={repo}"]


@pytest.mark.parametrize("error", [RepositoryNotFoundError, GatedRepoError, HFValidationError])
def test_a_repository_that_the_hub_does_not_have_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: type[Exception],
) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    monkeypatch.setattr(hub, "hf_hub_download", answer(error))
    assert call(*words_of_init(tmp_path, REPO)) == 1
    said = capsys.readouterr().err
    assert f"--repo: '{REPO}' is no local folder, and the Hugging Face hub has no" in said
    assert "hf auth login" in said and not (tmp_path / "my.yaml").exists()
    with pytest.raises(UserError, match=f"moshi_paths.hf_repo_id: '{REPO}' is no local folder"):
        list(plan(ARGS, num_gpus=1, gpu_memory_gb=80))


def test_a_folder_that_is_not_there_is_no_repository(
    asked: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked(CLOSED)
    assert call(*words_of_init(tmp_path, f"{tmp_path}/no/model")) == 1
    assert "/no/model' is no local folder, and the" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (EntryNotFoundError, f"{REPO} has no config.json"),
        (LocalEntryNotFoundError, f"{REPO} cannot be asked"),
        (HfHubHTTPError, f"{REPO} cannot be asked"),
    ],
)
def test_init_says_what_it_assumes_and_why(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: type[Exception],
    why: str,
) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    monkeypatch.setattr(hub, "hf_hub_download", answer(error))
    assert call(*words_of_init(tmp_path, REPO)) == 0
    assert f"its sizes are for the shape of Moshi 7B, as {why}\n" in capsys.readouterr().out


def test_a_folder_without_a_shape_is_said_to_have_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(*words_of_init(tmp_path, str(tmp_path))) == 0
    said = capsys.readouterr().out
    assert f"the shape of Moshi 7B, as {tmp_path} has no config.json\n" in said


@pytest.mark.parametrize("endpoint", [CLOSED, SILENT])
def test_a_run_without_the_hub_is_one_message(
    asked: Callable[..., Any], recwarn: Any, endpoint: str | None
) -> None:
    connections = asked(endpoint)
    noise = io.StringIO()
    paths = dataclasses.replace(ARGS.moshi_paths, random_init=True)
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        for _ in range(2):
            with pytest.raises(UserError, match=f"hf_repo_id: '{REPO}' is no local folder"):
                find_checkpoint(paths)
    assert noise.getvalue() == ""
    assert [str(warning.message) for warning in recwarn] == []
    assert len(connections) <= 1, "it is asked once"
