"""`moshi-ttt evaluate --tasks spoken_recall`: what a model says to a scripted user is counted."""

import csv
import functools
import html
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluation_tools
import numpy as np
import pytest
import torch
from training_tools import checkpoint, train, write_model

from finetune.__main__ import main
from finetune.evaluation.tasks.spoken_recall import measure
from finetune.serve import Row, Spoken
from finetune.spoken import Talk, TalkOptions, make_talk, speech

# A fixture: pytest finds it by its name in this module.
_pictures = evaluation_tools._pictures

DEMO = Path(__file__).parents[3] / "example/demo/model"
TALKS = TalkOptions(num_talks=4, distances_sec=(10.0, 40.0, 60.0), num_facts=4)
WORDS = ["--recall_num_talks=4", "--recall_distances_sec=10,40,60", "--recall_num_facts=4"]
RECOGNIZED_FRAMES = 30
"""By what is said in so many frames, talks are told apart: the first fact is among it."""


@pytest.fixture(scope="module", autouse=True)
def _spoken_once() -> Iterator[None]:
    """The same sentences are heard in all tests: each is synthesized once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech, "synthesize", functools.cache(speech.synthesize))
        yield


def call(*words: Any) -> Any:
    """A command in this process; its exit status."""
    old, sys.argv = sys.argv, ["moshi-ttt", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as left:
            main()
    finally:
        sys.argv = old
    return left.value.code


class Double:
    """An engine without a model: it recognizes talks by their sound, and answers as it is told.

    Args:
        answers: (talk, question's number, row) → the text that it says in the question's window.
    """

    def __init__(self, codec: Any, num_rows: int, answers: Callable[..., str]) -> None:
        self.codec, self.answers = codec, answers
        self.rows = [Row(index) for index in range(num_rows)]
        self.sounds = {sound_of(t): t for t in (make_talk(TALKS, i, seed=5) for i in range(4))}
        self.heard: dict[int, list[bytes]] = {}
        self.saying: dict[int, list[int]] = {}
        self.forgotten: dict[int, list[int]] = {}

    def join(self, *, ttt_on: bool) -> Row | None:
        row = next((row for row in self.rows if not row.taken), None)
        if row is not None:
            row.taken, row.ttt_on, row.num_frames = True, ttt_on, 0
            self.heard[row.index], self.saying[row.index] = [], []
            self.forgotten[row.index] = []
        return row

    def leave(self, row: Row) -> None:
        row.taken = False

    def forget(self, row: Row) -> None:
        self.forgotten[row.index].append(row.num_frames)

    def step(self, frames: Mapping[int, np.ndarray]) -> dict[int, Spoken]:
        return {index: self._say(self.rows[index], frame) for index, frame in frames.items()}

    def _say(self, row: Row, frame: np.ndarray) -> Spoken:
        if row.num_frames < RECOGNIZED_FRAMES:
            self.heard[row.index].append((frame * 32768).astype(np.int16).tobytes())
        else:
            talk = self.sounds[b"".join(self.heard[row.index])]
            for number, question in enumerate(talk.questions):
                if row.num_frames == int(question.window.sec[0] * 12.5) + 4:
                    text = self.answers(talk, number, row, self.forgotten[row.index])
                    tokens = [token for word in text.split() for token in self.codec.tokenize(word)]
                    self.saying[row.index] = tokens
        row.num_frames += 1
        said = self.saying[row.index]
        token = said.pop(0) if said else self.codec.text_padding_id
        return Spoken(token, np.zeros(0, np.float32))


def sound_of(talk: Talk) -> bytes:
    blocks = talk.blocks(1920)
    return b"".join(next(blocks).tobytes() for _ in range(RECOGNIZED_FRAMES))


def scripted(talk: Talk, number: int, row: Row, forgotten: list[int]) -> str:
    """With TTT the truth, without it the queue, and nothing once TTT has forgotten."""
    question = talk.questions[number]
    if forgotten:
        # Just before the question began, and at each so far.
        assert forgotten == [int(q.span.sec[0] * 12.5) for q in talk.questions[: number + 1]]
        return "I see."
    value = question.fact.value if row.ttt_on else question.oldest
    return f"{question.fact.statement} {value}."


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Puts the double in the model's place; `interrupt_after`: frames until Ctrl-C."""
    control = SimpleNamespace(interrupt_after=None, num_steps=0, num_frames=0)

    @contextmanager
    def open_double(model: Any, codec: Any, *, max_users: int, **_: Any) -> Iterator[Double]:
        double = Double(codec, max_users, scripted)
        step = double.step

        def counted(frames: Mapping[int, np.ndarray]) -> dict[int, Spoken]:
            control.num_steps += 1
            control.num_frames += len(frames)
            if control.num_steps == control.interrupt_after:
                raise KeyboardInterrupt
            return step(frames)

        double.step = counted  # type: ignore[method-assign]
        yield double

    monkeypatch.setattr(measure, "open_engine", open_double)
    return control


@pytest.fixture(scope="module")
def with_ttt(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with TTT, hardly trained, whose tokenizer can spell every word."""
    folder = tmp_path_factory.mktemp("recall")
    model = write_model(folder / "model", text_card=500)
    shutil.copy(DEMO / "tokenizer.model", model)
    overrides = {"moshi_paths.hf_repo_id": str(model), "max_steps": 1, "param_dtype": "float32",
                 "full_finetuning": True}  # fmt: skip
    train(config, folder / "run", overrides)
    return checkpoint(folder / "run", 1)


def evaluate(model: Path, out: Path, *words: Any, device: str = "cpu") -> Any:
    tasks = ["--tasks=spoken_recall", f"--device={device}", "--seed=5"]
    return call("evaluate", f"--checkpoint={model}", f"--out={out}", *tasks, *words)


def test_the_truth_the_queue_and_silence_are_told_apart(
    doubled: SimpleNamespace, with_ttt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what was interrupted goes on."""
    out = tmp_path / "out"
    doubled.interrupt_after = 1200  # in the second of three batches
    assert evaluate(with_ttt, out, *WORDS, "--batch_size=5") == 130
    kept = (out / "spoken_recall.jsonl").read_text()
    assert kept.count("\n") == 6, "a header, and the talks of the first batch"
    doubled.interrupt_after = None
    doubled.num_frames = 0
    assert evaluate(with_ttt, out, *WORDS, "--batch_size=5") == 0
    assert (out / "spoken_recall.jsonl").read_text().startswith(kept)
    talks = [make_talk(TALKS, index, seed=5) for index in range(4)]
    lengths = [-(-talk.num_samples // 1920) for talk in talks]
    # Of twelve talks in batches of five, the first two arms of the second are done.
    assert doubled.num_frames == 3 * sum(lengths) - 3 * lengths[0] - 2 * lengths[1]

    found = json.loads((out / "results.json").read_text())["spoken_recall"]
    oldest = [q.oldest == q.fact.value for talk in talks for q in talk.questions]
    assert 0 < sum(oldest) < 12
    assert {arm: of["all"]["value"] for arm, of in found["arms"].items()} == {
        "on": 1.0,
        "off": pytest.approx(sum(oldest) / 12),
        "reset": 0.0,
    }
    assert found["baselines"]["oldest"]["all"] == pytest.approx(sum(oldest) / 12)
    assert found["arms"]["reset"]["outcomes"]["none"] == 12
    assert found["arms"]["off"]["outcomes"]["told"] == 12 - sum(oldest)
    assert (found["num_talks"], found["num_unhealthy"]) == (4, 0)
    said = capsys.readouterr().out
    assert "- TTT on: the right value in 1.00 [0.51, 1.00] of 12 questions, 10 s to 1 min" in said
    assert "TTT on against TTT reset before the question: +1.00 [+0.51, +1.00], better." in said
    page = (out / "report.html").read_text()
    assert "<h2>Spoken recall</h2>" in page and page.count("<svg") == 1
    question = talks[0].questions[0].fact
    assert f"<td>{question.sentence}</td>" in page and f"<td>{question.question}</td>" in page
    with (out / "spoken_recall.csv").open() as file:
        lines = [*csv.DictReader(file)]
    assert [line["recall"] for line in lines[:3]] == ["1.0"] * 3 and len(lines) == 9

    # This model's attention sees 1 s or so: that is said once, with the first conclusion.
    assert said.count("beyond attention's window") == 1
    assert "12 questions, 10 s to 1 min after the fact, all beyond attention's window." in said
    assert html.unescape(page).count("beyond attention's window") == 1

    # A third call hears nothing; other talks are not mixed with these.
    doubled.num_steps = 0
    assert evaluate(with_ttt, out, *WORDS, "--batch_size=5") == 0 and doubled.num_steps == 0
    assert evaluate(with_ttt, out, *WORDS[:-1], "--recall_num_facts=5", "--batch_size=5") == 1
    assert "num_facts was 4, is 5" in capsys.readouterr().err


def test_a_limit_ends_it_and_says_what_is_missing(
    doubled: SimpleNamespace,
    with_ttt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*WORDS, "--batch_size=3", "--recall_max_minutes=1"]
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        measure, "time", SimpleNamespace(monotonic=lambda: clock.now + doubled.num_steps / 20)
    )
    # 1200 steps of a twentieth of a second; a batch has some 1000.
    assert evaluate(with_ttt, tmp_path / "out", *words) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["spoken_recall"]["num_talks"] == 1
    assert any("9 of 12 talks were not heard within" in note for note in results["notes"])
    clock.now = 0.0
    monkeypatch.setattr(measure.Listening, "_is_late", lambda self: True)
    assert evaluate(with_ttt, tmp_path / "none", *words) == 1
    assert "--recall_max_minutes: no talk was heard" in capsys.readouterr().err


SHORT = ["--recall_num_talks=1", "--recall_distances_sec=10", "--recall_num_facts=1",
         "--recall_answer_sec=1"]  # fmt: skip


def test_a_real_model_is_heard_in_all_arms_and_goes_on_as_if_not_interrupted(
    with_ttt: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert evaluate(with_ttt, out, *SHORT, "--batch_size=3") == 0
    whole = (out / "spoken_recall.jsonl").read_text()
    header, *records = whole.splitlines()
    assert [json.loads(record)["arm"] for record in records] == ["on", "off", "reset"]
    assert all(json.loads(record)["num_words"] > 5 for record in records)
    # As if stopped before all of the batch had ended.
    (out / "spoken_recall.jsonl").write_text("\n".join([header, records[1], ""]))
    assert evaluate(with_ttt, out, *SHORT, "--batch_size=3") == 0
    again = (out / "spoken_recall.jsonl").read_text()
    assert sorted(again.splitlines()) == sorted(whole.splitlines())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_all_arms_are_heard(with_ttt: Path, tmp_path: Path) -> None:
    """In two batches, of which the second uses the graphs of the first."""
    out = tmp_path / "out"
    assert evaluate(with_ttt, out, *SHORT, "--batch_size=2", device="cuda") == 0
    _, *records = map(json.loads, (out / "spoken_recall.jsonl").read_text().splitlines())
    assert [record["arm"] for record in records] == ["on", "off", "reset"]
    assert all(record["healthy"] and record["num_words"] > 5 for record in records)


@pytest.fixture(scope="module")
def stock_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock checkpoint, without TTT, with random weights, that can spell every word."""
    model = write_model(tmp_path_factory.mktemp("stock") / "model", text_card=500)
    shutil.copy(DEMO / "tokenizer.model", model)
    return model


def test_a_stock_model_says_to_files_what_it_says_in_an_evaluation(
    stock_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From recall-audio through generate to recall-score, and no recordings anywhere."""
    greedy = ["--temperature=0", "--text_temperature=0"]
    talks = tmp_path / "talks"
    given = [word.replace("--recall_", "--") for word in SHORT]
    assert call("recall-audio", talks, "--seed=5", *given) == 0
    answer = ["--input_dir", talks, "--input_name=input.wav", "--device=cpu", *greedy]
    assert call("generate", f"--checkpoint={stock_model}", *answer) == 0
    assert call("recall-score", talks, f"--out={tmp_path / 'scores.json'}") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())

    words = [*SHORT, *(word.replace("--", "--recall_") for word in greedy)]
    assert evaluate(stock_model, tmp_path / "out", *words) == 0
    assert "as the arm `off`" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())["spoken_recall"]
    assert [*results["arms"]] == ["off"] and results["differences"] == []
    record = json.loads((tmp_path / "out/spoken_recall.jsonl").read_text().splitlines()[1])
    spoken = json.loads((talks / "000/output.json").read_text())["alignments"]
    start_sec, stop_sec = json.loads((talks / "000/meta.json").read_text())["questions"][0][
        "window_sec"
    ]
    near = [[w, *times] for w, times, _ in spoken if start_sec - 1 <= times[0] < stop_sec]
    assert near and record["words"] == near and record["num_words"] == len(spoken)
    assert results["examples"][0]["said"]["off"] == scores["examples"][0]["said"]["model"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recall_num_facts=2"], "--recall_num_facts: 2 facts cannot be asked for at 6"),
        (["--recall_distances_sec=10,11"], "--recall_distances_sec: there is no room"),
        (["--recall_distances_sec=9"], "--recall_distances_sec: must be 10 or more"),
        (["--recall_kinds=animal"], "--recall_kinds: expected thing or place or number"),
        (["--tasks=health", "--recall_num_talks=3"], "counts for spoken_recall alone"),
    ],
)
def test_mistakes_come_before_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    model = write_model(tmp_path / "model")
    assert evaluate(model, tmp_path / "out", *words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
