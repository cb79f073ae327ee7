"""No command replaces a file of the user unasked: not one that it reads, and not one that was there
for something else. What it has written itself, it writes again."""

import json
import os
import shutil
from pathlib import Path

import pytest
import soundfile
from recordings_tools import call

from finetune.config.command_options import PlotOptions

ROOT = Path(__file__).parents[2]
DIALOGUES = ROOT / "example/demo/dialogues"
ONE = "eval_000"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a recording, its transcript, its list, and the log of a run."""
    for suffix in (".wav", ".json"):
        shutil.copy(DIALOGUES / f"{ONE}{suffix}", tmp_path)
    duration = soundfile.info(tmp_path / f"{ONE}.wav").duration
    line = json.dumps({"path": f"{ONE}.wav", "duration": duration})
    (tmp_path / "list.jsonl").write_text(f"{line}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.train.jsonl").write_text('{"step": 1, "time": 0, "loss": 2.0}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


WORDS = {
    "show": ("data", "show", "list.jsonl", "--duration_sec=2"),
    "check": ("data", "check", "list.jsonl", "--fast", "--workers=1"),
    "stats": ("data", "stats", "list.jsonl", "--workers=1"),
    "plot": ("plot", "run"),
    "generate": ("generate", f"{ROOT}/example/memory", f"--audio={ONE}.wav"),
}


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        # Its sound would go into the recording itself.
        ((*WORDS["show"], f"--out={ONE}.png"), f"{ONE}.wav"),
        ((*WORDS["show"], "--out=mine.png"), "mine.png"),
        ((*WORDS["show"],), "segment.png"),
        ((*WORDS["show"],), "segment.wav"),
        ((*WORDS["check"], f"--json={ONE}.json"), f"{ONE}.json"),
        ((*WORDS["check"], "--html=run.yaml"), "run.yaml"),
        ((*WORDS["check"], f"--cache={ONE}.wav"), f"{ONE}.wav"),
        ((*WORDS["stats"], "--out=mine.png"), "mine.png"),
        ((*WORDS["plot"], "--out=mine.png"), "mine.png"),
        ((*WORDS["plot"],), "run/loss.png"),
        (("init", "mine.yaml"), "mine.yaml"),
        ((*WORDS["generate"], "--report=run"), "run/report.html"),
        (("data", "index", "."), "data.jsonl"),
        (("recall", "--out=.", "--steps=2"), "report.md"),
        (("recall", "--out=.", "--steps=2"), "recall.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_file_of_somebody_else_stays(
    folder: Path, words: tuple[str, ...], kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (folder / kept).exists():
        (folder / kept).write_text("mine")
    before = contents(folder)
    assert call(*words) == 1
    assert contents(folder) == before
    assert f"{kept} is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "files"),
    [
        ((*WORDS["show"], "--out=new/a.png"), ["a.png", "a.wav"]),
        (
            (*WORDS["check"], "--json=new/a.json", "--html=new/a.html", "--cache=new/kept"),
            ["a.html", "a.json", "kept"],
        ),
        ((*WORDS["stats"], "--out=new/a.png"), ["a.png"]),
        ((*WORDS["plot"], "--out=new/a.png"), ["a.png"]),
    ],
    ids=list(WORDS)[:4],
)
def test_what_a_command_has_written_it_writes_again(
    folder: Path, words: tuple[str, ...], files: list[str]
) -> None:
    for _ in range(2):
        assert call(*words) == 0
        assert sorted(path.name for path in (folder / "new").iterdir()) == files


def test_a_segment_in_the_place_of_another_is_said_to_be(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for said in (False, True):
        assert call(*WORDS["show"]) == 0
        assert ("in the place of those of an earlier call" in capsys.readouterr().out) is said


def test_a_report_is_written_again_and_answers_are_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*WORDS["generate"], "--device=cpu", "--report=new")
    for name in ("a", "b"):
        assert call(*words, f"--out=new/{name}.wav") == 0
    before = contents(folder)
    assert call(*words, "--out=new/b.wav") == 1
    assert "new/b.wav (and 1 more) is there already. Give" in capsys.readouterr().err
    assert contents(folder) == before


def test_of_one_command_another_replaces_nothing(folder: Path) -> None:
    assert call(*WORDS["stats"], "--out=a.png") == 0
    before = contents(folder)
    assert call(*WORDS["plot"], "--out=a.png") == 1
    assert call(*WORDS["show"], "--out=a.png") == 1
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ((*WORDS["check"], "--json=list.jsonl"), "--json: list.jsonl"),
        ((*WORDS["check"], "--html=link"), "--html: link"),
        ((*WORDS["check"], "--cache=link"), "--cache: link"),
        (("init", "list.jsonl", "--data=list.jsonl"), "--out: list.jsonl"),
        (
            (
                *("evaluate", f"{ROOT}/example/memory", "--pairs=pairs.jsonl", "--out=."),
                *("--tasks=pairs", "--overwrite"),
            ),
            "--out: pairs.jsonl",
        ),
        (
            (
                *("data", "index", "parts", "--pair={id}.wav,{id}_user.wav", "--join"),
                *("--joined_dir=parts", "--overwrite", "--out=new.jsonl"),
            ),
            "--joined_dir: parts/a.wav",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value[:3]),
)
def test_what_a_command_reads_stays(
    folder: Path, words: tuple[str, ...], read: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it may replace what is there, and through links."""
    (folder / "link").symlink_to("list.jsonl")
    (folder / "pairs.jsonl").write_text("{}\n")
    (folder / "parts").mkdir()
    for name in ("a", "a_user"):
        soundfile.write(folder / f"parts/{name}.wav", [0.0] * 24000, 24000)
    before = contents(folder)
    assert call(*words) == 1
    assert f"{read} is read by this command, and would be lost" in capsys.readouterr().err
    assert contents(folder) == before


def test_words_beside_a_recording_that_is_to_be_joined_stay(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "parts/stereo").mkdir(parents=True)
    for side in ("left", "right"):
        soundfile.write(folder / f"parts/a_{side}.wav", [0.0] * 24000, 24000)
        (folder / f"parts/a_{side}.txt").write_text("of the part")
    (folder / "parts/stereo/a.left.txt").write_text("mine")
    words = ("data", "index", "parts", "--pair={id}_left.wav,{id}_right.wav", "--join")
    before = contents(folder)
    assert call(*words) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "parts/stereo/a.left.txt is there, and there is no parts/stereo/a.wav" in said
    assert contents(folder) == before
    assert call(*words, "--overwrite") == 0
    assert (folder / "parts/stereo/a.left.txt").read_text() == "of the part"


def test_a_segment_that_is_listed_itself_stays(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a sound of the command, and is what the command reads now."""
    assert call(*WORDS["show"], "--out=a.png") == 0
    for path in ("a.wav", "link.wav"):
        (folder / "link.wav").unlink(missing_ok=True)
        (folder / "link.wav").symlink_to("a.wav")
        (folder / "list.jsonl").write_text(json.dumps({"path": path, "duration": 2.0}) + "\n")
        before = contents(folder)
        assert call(*WORDS["show"], "--out=a.png") == 1
        assert "a.wav is read by this command, and would be lost" in capsys.readouterr().err
        assert contents(folder) == before


def test_two_outputs_in_one_file_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert call(*WORDS["check"], "--json=a", "--html=./a") == 1
    assert "--html: --json writes to a as well; give two names" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("words", "name"), [(["--cache=kept"], "kept"), ([], ".list.jsonl.checked")]
)
def test_results_are_kept_where_they_were_cut_off(
    folder: Path, words: list[str], name: str
) -> None:
    """Killed while the first is written, or later, a file of results is one all the same; also
    when others have come behind that, and when it was cut off again."""
    assert call(*WORDS["check"], *words) == 0
    whole = (folder / name).read_bytes()
    cut_off = [whole[:size] for size in (0, 1, 2, 3, 10, len(whole) - 5, len(whole))]
    for content in (*cut_off, b'\n["ab\n\n["\n["0', b"\0" * 5000 + whole, b"?\n" + whole):
        (folder / name).write_bytes(content)
        for _ in range(2):
            assert call(*WORDS["check"], *words) == 0
        after = (folder / name).read_bytes()
        assert after.startswith(content) and whole.strip() in after


def test_what_is_kept_beside_a_list_may_be_damaged_all_over(folder: Path) -> None:
    for content in (b"\0" * 5000, b"\0" * 5000 + b"\n{}", b"[[1], 2]\n" + b"[" * 10**6):
        (folder / ".list.jsonl.checked").write_bytes(content)
        for _ in range(2):
            assert call(*WORDS["check"]) == 0
        assert (folder / ".list.jsonl.checked").read_bytes().startswith(content)


def test_a_file_of_results_that_cannot_be_reached_is_done_without(
    folder: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """Of a link to a name too long, a loop of links, or a file in a folder that may not be read the
    system does not even say whether it is there."""
    (folder / "far").symlink_to("x" * 300)
    (folder / "loop").symlink_to("loop")
    (folder / "closed").mkdir(mode=0)
    request.addfinalizer(lambda: (folder / "closed").chmod(0o700))
    names = ["far", "far/kept", "loop", "loop/kept"]
    if os.geteuid():
        names.append("closed/kept")
    for name in names:
        caplog.clear()
        assert call(*WORDS["check"], f"--cache={name}") == 0
        (said,) = [each.getMessage() for each in caplog.records if "--cache" in each.getMessage()]
        assert said.startswith(f"{name} cannot be written (")


@pytest.mark.parametrize("option", ["--json", "--html", "--cache"])
@pytest.mark.parametrize("name", ["pipe", "link", "/dev/stdout", "/dev/fd/1", "/dev/zero"])
def test_pipes_and_devices_are_told_that_a_file_is_needed(
    folder: Path, option: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where standard output is a file, as here."""
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("pipe")
    before = sorted(folder.iterdir())
    assert call(*WORDS["check"], f"{option}={name}") == 1
    wanted = f"{option}: {name} is a pipe or a device, but a plain file is needed; choose"
    assert wanted in capfd.readouterr().err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        (*WORDS["check"], "--json=link.png"),
        (*WORDS["show"], "--out=link.png"),
        (*WORDS["plot"], "--out=link.png"),
        (*WORDS["stats"], "--out=link.png"),
        ("data", "index", ".", "--out=link.jsonl", "--overwrite"),
        ("init", "link.yaml", f"--data={DIALOGUES}/train.jsonl"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_link_to_nothing_stays(
    folder: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    links = [folder / f"link.{suffix}" for suffix in ("png", "jsonl", "yaml")]
    for link in links:
        link.symlink_to("elsewhere/mine")
    assert call(*words) == 1
    said = capsys.readouterr().err
    assert "is a link to elsewhere/mine, which is not there, and would be replaced" in said
    assert all(link.is_symlink() for link in links)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of talks, the first of which has an answer."""
    folder = tmp_path_factory.mktemp("talks") / "talks"
    assert call("recall-audio", folder, "--num_talks=1", "--distances_sec=10") == 0
    meta = folder / "000/meta.json"
    (folder / "000/output.txt").write_text("\n" * len(json.loads(meta.read_text())["questions"]))
    return folder


@pytest.mark.parametrize("name", ["meta.json", "input.wav", "output.txt"])
def test_scores_replace_nothing_of_the_talks(
    talks: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(talks)
    path = talks / "000" / name
    assert call("recall-score", talks, f"--out={path}") == 1
    assert (
        f"{path} is there already, and was not written by moshi-ttt recall-score"
        in capsys.readouterr().err
    )
    assert contents(talks) == before
    scores = path.parents[2] / f"{name}.scores"
    for _ in range(2):
        assert call("recall-score", talks, f"--out={scores}") == 0
    assert json.loads(scores.read_text())["answers"]


def test_the_picture_in_a_runs_folder_may_be_of_an_earlier_version(tmp_path: Path) -> None:
    """Which left no mark; by its name it is the run's."""
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"\x89PNG of before")
    (own,) = PlotOptions(tmp_path).outputs()
    assert own.path == picture and own.may_replace()
    (named,) = PlotOptions(tmp_path, out=picture).outputs()
    assert not named.may_replace()
    picture.write_text("mine")
    assert not own.may_replace()
