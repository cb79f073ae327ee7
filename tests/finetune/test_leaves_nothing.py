"""A command that fails before it does anything leaves nothing that it made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from recordings_tools import call

from finetune.command_line import run
from finetune.errors import UserError
from finetune.kept import make_folder

ROOT = Path(__file__).parents[2]
DIALOGUES = ROOT / "example/demo/dialogues"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Moshi whose weights were cut off."""
    folder = shutil.copytree(ROOT / "example/memory", tmp_path_factory.mktemp("base") / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """A folder of recordings, with one in it."""
    shutil.copy(DIALOGUES / "eval_000.wav", tmp_path)
    (tmp_path / "calls/monday").mkdir(parents=True)
    shutil.copy(DIALOGUES / "eval_000.wav", tmp_path / "calls/monday")
    line = {"path": "gone.wav", "duration": 10}
    (tmp_path / "gone.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path / "calls"


EVAL = DIALOGUES / "eval.jsonl"
DATA = f"--data.eval_data={EVAL}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"evaluate {{damaged}} --data={EVAL} --tasks=position --out=new/out", "model.safet"),
        ("generate {damaged} --audio=calls --out=new/out", "model.safet"),
        ("generate {damaged} --audio=eval_000.wav --session=new/part/it.session", "model.safet"),
        ("generate {damaged} --audio=eval_000.wav --report=new/report", "model.safet"),
        ("export {damaged} --out=new/out", "{damaged}"),
        ("recall --out=new/out --device=cuda", "sees no GPU"),
        ("recall --out=new/out --device=cuda --variant=spoken", "sees no GPU"),
        ("demo --out=new/out --device=cuda", "sees no GPU"),
        *(
            (f"{name} example/demo.yaml --data.train_data=gone.jsonl {DATA} --run_dir=new/run "
             "--data.cache_dir=new/codes", "gone.wav is missing")
            for name in ("train", "data encode")
        ),
    ],
)  # fmt: skip
def test_nothing_is_left(
    damaged: Path,
    calls: Path,
    words: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = calls.parent
    monkeypatch.chdir(here)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (here / "example").symlink_to(ROOT / "example")
    before = sorted(here.rglob("*"))
    assert call(*words.format(damaged=damaged).split()) == 1
    assert message.format(damaged=damaged) in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before


def test_what_is_in_a_folder_stays(tmp_path: Path) -> None:
    """So do folders that were there, and those of a command that does not fail."""
    (tmp_path / "mine").mkdir()

    def work() -> None:
        for name in ("mine", "mine/empty/deep", "kept", "kept/empty"):
            make_folder(tmp_path / name)
        (tmp_path / "kept/result").touch()

    def fail() -> None:
        work()
        raise UserError("no")

    assert run(fail) == 1
    assert sorted(tmp_path.rglob("*")) == [tmp_path / n for n in ("kept", "kept/result", "mine")]
    assert run(work) == 0
    assert run(fail) == 1
    assert (tmp_path / "mine/empty/deep").is_dir() and (tmp_path / "kept/empty").is_dir()
