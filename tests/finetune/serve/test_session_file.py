"""The file of `moshi-ttt generate --session`: no conversation is lost, or begun, without a word."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import soundfile
from data_tools import speech_like
from forked import Program
from full_disk import FULL, room_for
from recordings_tools import call
from training_tools import checkpoint, train

from finetune.inference import SteadyLMGen
from finetune.interrupt import Stopped
from finetune.serve import files, session_file
from finetune.serve.engine import Engine

GREEDY = ["--temperature=0", "--text_temperature=0", "--device=cpu"]
SECONDS = 10 * 0.08


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("kept") / "run"
    train(config, run_dir, {"max_steps": 1, "param_dtype": "float32", "full_finetuning": True})
    return checkpoint(run_dir, 1)


@pytest.fixture
def generate(trained: Path, tmp_path: Path) -> Any:
    """Answers a recording of 0.8 s in the place of its last answer, with these options."""
    soundfile.write(tmp_path / "in.wav", speech_like(SECONDS, 24000, channels=1), 24000)
    words = [f"--checkpoint={trained}", f"--audio={tmp_path}/in.wav", f"--out={tmp_path}/out.wav"]
    return lambda *more: call("generate", *words, "--overwrite", *GREEDY, *more)


def test_it_says_whether_a_conversation_begins_goes_on_and_is_saved(
    generate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, misspelled = tmp_path / "new/call.session", tmp_path / "new/cal.session"
    for path, begins, age in (
        (kept, f"begins a new session in {kept}\n", "0.8"),
        (kept, f"goes on with {kept}, 0.8 s old\n", "1.6"),
        (misspelled, f"begins a new session in {misspelled}\n", "0.8"),
    ):
        assert generate(f"--session={path}") == 0
        said = capsys.readouterr().out
        assert begins in said
        assert f"saved {path}: all of the conversation, {age} s old\n" in said
    # No lock stays behind.
    assert {path.name for path in kept.parent.iterdir()} == {"call.session", "cal.session"}


def test_a_memory_does_not_replace_all_of_a_conversation(
    generate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [f"--session={tmp_path}/call.session", "--session_part=memory"]
    for words, said in (
        (both, "begins a new session in"),
        (both, f"goes on with the memory in {tmp_path}/call.session"),
        # All holds the memory as well.
        (both[:1], f"goes on with the memory in {tmp_path}/call.session"),
    ):
        assert generate(*words) == 0
        assert said in capsys.readouterr().out
    before = (tmp_path / "call.session").read_bytes()
    assert generate(*both) == 1
    said = capsys.readouterr().err
    assert f"--session_part: {tmp_path}/call.session holds all of a conversation" in said
    assert "leave --session_part out" in said
    assert (tmp_path / "call.session").read_bytes() == before


HOLDING = """
from pathlib import Path
from finetune.serve import GenerateOptions, held_session
path = Path(sys.argv[1])
with held_session(GenerateOptions(checkpoint=path, audio=path, session=path)):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_at_once_do_not_go_on_with_one_conversation(
    generate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "call.session"
    other = Program(HOLDING, path)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    assert generate(f"--session={path}") == 1
    assert f"--session: {path} is in use by process {other.pid} on " in capsys.readouterr().err
    assert not path.exists() and not (tmp_path / "out.wav").exists()
    other.kill()
    other.communicate()
    assert generate(f"--session={path}") == 0 and path.exists()


def test_where_nothing_can_be_kept_nothing_is_computed(
    generate: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(files, "load_for_inference", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "file").touch()
    assert generate(f"--session={tmp_path}/file/call.session") == 1
    assert f"--session: nothing can be kept in {tmp_path}/file (" in capsys.readouterr().err
    monkeypatch.setattr(session_file.FileLock, "take", _refused)  # as in a folder that is read-only
    assert generate(f"--session={tmp_path}/call.session") == 1
    assert f"nothing can be kept in {tmp_path} (Permission" in capsys.readouterr().err


def _refused(*_: Any) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_session_without_room_is_kept_elsewhere_or_said_to_be_lost(
    generate: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_begun: bool,
) -> None:
    path, write = tmp_path / "kept/call.session", session_file.write_whole
    if is_begun:
        assert generate(f"--session={path}") == 0
    before = path.read_bytes() if is_begun else b""

    def without_room_there(where: Path, content: Any) -> None:
        with room_for(100 if where == path else 10**9):
            write(where, content)

    monkeypatch.setattr(session_file, "write_whole", without_room_there)
    assert generate(f"--session={path}") == 1
    said = capsys.readouterr()
    (elsewhere,) = tmp_path.glob("call-*.session")
    assert f"wrote {tmp_path}/out.wav" in said.out
    reason = f"error: --session: {path} cannot be written: {FULL}."
    assert f"{reason} The answer is in {tmp_path}/out.wav." in said.err
    assert f"The conversation is kept in {elsewhere} instead" in said.err
    assert (path.read_bytes() if is_begun else b"") == before
    monkeypatch.setattr(session_file, "write_whole", write)
    assert generate(f"--session={elsewhere}") == 0
    assert f"goes on with {elsewhere}, {1.6 if is_begun else 0.8} s old" in capsys.readouterr().out

    def without_room(where: Path, content: Any) -> None:
        with room_for(100):
            write(where, content)

    monkeypatch.setattr(session_file, "write_whole", without_room)
    assert generate(f"--session={path}") == 1
    said = capsys.readouterr()
    assert f"wrote {tmp_path}/out.wav" in said.out and "stands is lost" in said.err
    assert (f"{path} holds it as it was before this recording" in said.err) is is_begun


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        ([], "with --missing the same command goes on with the others"),
        (["--missing"], "the same command goes on with the others"),
        (["--overwrite"], "and where others were before, these still are"),
    ],
)
def test_stopped_it_says_what_is_kept_and_how_to_go_on(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    advice: str,
) -> None:
    for name, num_frames in (("a", 3), ("b", 20)):
        (tmp_path / "in").mkdir(exist_ok=True)
        sound = speech_like(num_frames * 0.08, 24000, channels=1)
        soundfile.write(tmp_path / f"in/{name}.wav", sound, 24000)
    words = [f"--checkpoint={trained}", f"--audio={tmp_path}/in", f"--out={tmp_path}/out"]
    step, num_steps = Engine.step, 0

    def stopped(engine: Engine, frames: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 12:
            raise Stopped(signal.SIGTERM)
        return step(engine, frames)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stopped)
        assert call("generate", *words, *GREEDY, *more) == 128 + signal.SIGTERM
    said = capsys.readouterr()
    joined = ", " if "these" in advice else ": "
    assert f"interrupted; 1 of 2 answers are kept{joined}{advice}\n" in said.out
    assert "stopped by SIGTERM" in said.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.json", "a.wav"]
    assert call("generate", *words, *GREEDY, "--missing") == 0
    assert (tmp_path / "out/b.wav").exists()


def test_one_that_is_stopped_leaves_its_session_as_it_was(
    generate: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "call.session"
    assert generate(f"--session={path}") == 0
    before = path.read_bytes()
    stop_after(0, monkeypatch)
    assert generate(f"--session={path}") == 128 + signal.SIGINT
    said = capsys.readouterr().out
    assert "interrupted; nothing of the answer is kept, and the session is as it was" in said
    assert path.read_bytes() == before and not [*tmp_path.glob(".call*")]


def stop_after(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have somebody press Ctrl-C after so many frames."""
    step, left = Engine.step, iter(range(num_steps))

    def stopped(engine: Engine, frames: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(engine, frames)

    monkeypatch.setattr(Engine, "step", stopped)


def test_what_there_is_of_one_answer_is_kept_when_it_is_stopped(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is not taken for the answer, and replaces nothing, nor another part of it."""
    soundfile.write(tmp_path / "a.wav", speech_like(30 * 0.08, 24000, channels=1), 24000)
    words = ["generate", f"--checkpoint={trained}", f"--audio={tmp_path}/a.wav", *GREEDY]
    whole = tmp_path / "whole.wav"
    assert call(*words, f"--out={whole}") == 0
    out = tmp_path / "out/b.wav"
    for name, num_steps in (("b.interrupted1", 12), ("b.interrupted2", 20)):
        with monkeypatch.context() as patch:
            stop_after(num_steps, patch)
            assert call(*words, f"--out={out}") == 128 + signal.SIGINT
        part, _ = soundfile.read(out.with_name(f"{name}.wav"))
        assert (part == soundfile.read(whole)[0][: len(part)]).all()
        seconds = len(part) / 24000
        assert (num_steps - 5) * 0.08 < seconds <= num_steps * 0.08
        said = capsys.readouterr().out
        assert (
            f"interrupted; {seconds:.1f} s of the answer are kept in {out.parent}/{name}.wav"
            in said
        )
        known, all_words = (
            json.loads(path.read_text())["alignments"]
            for path in (out.with_name(f"{name}.json"), whole.with_suffix(".json"))
        )
        assert known, "there are words to keep"
        # The last one may have gone on.
        assert known[:-1] == all_words[: len(known[:-1])]
    assert sorted(path.name for path in out.parent.iterdir()) == [
        *("b.interrupted1.json", "b.interrupted1.wav"),
        *("b.interrupted2.json", "b.interrupted2.wav"),
    ]
    assert call(*words, f"--out={out}") == 0
    assert out.read_bytes() == whole.read_bytes()


def test_what_there_is_of_the_rest_of_a_dialogue_is_kept_when_it_is_stopped(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    soundfile.write(tmp_path / "a.wav", speech_like(30 * 0.08, 24000), 24000)
    words = ["generate", f"--checkpoint={trained}", f"--audio={tmp_path}/a.wav", "--prompt_sec=0.4"]
    assert call(*words, f"--out={tmp_path}/whole.wav") == 0
    whole, _ = soundfile.read(tmp_path / "whole.wav")
    out, step = tmp_path / "out/b.wav", SteadyLMGen.step
    for num_steps, kept in ((0, []), (6, []), (20, ["b.interrupted1.json", "b.interrupted1.wav"])):
        left = iter(range(num_steps))

        def stopped(*args: Any, left: Any = left, **options: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return step(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(SteadyLMGen, "step", stopped)
            assert call(*words, f"--out={out}") == 128 + signal.SIGINT
        said = capsys.readouterr().out
        assert sorted(path.name for path in out.parent.glob("*")) == kept
        if not kept:
            assert "interrupted; nothing of the answer is kept" in said
    part, _ = soundfile.read(out.with_name("b.interrupted1.wav"))
    assert 18 * 1920 <= len(part) <= 20 * 1920
    assert abs(part - whole[: len(part)]).max() < 1e-3
    name = out.parent / "b.interrupted1"
    assert (
        f"interrupted; {len(part) / 24000:.1f} s of the answer are kept in {name}.wav, and their "
        f"words in {name}.json" in said
    )
    begun, all_words = (
        json.loads(path.read_text())["alignments"]
        for path in (Path(f"{name}.json"), tmp_path / "whole.json")
    )
    assert begun and begun[:-1] == all_words[: len(begun) - 1]
