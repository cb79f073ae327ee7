"""The demonstration: its speech, its dialogues, and the committed tokenizer and Mimi."""

import json
import random
import wave
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from forked import Program
from full_disk import FULL, room_for
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import get_mimi, get_moshi_lm
from moshi.utils.compile import no_compile
from recordings_tools import call

from finetune.config import check_config, missing_inputs
from finetune.demo import make_dialogues, next_step, training_command
from finetune.demo.dialogues import compose_dialogue
from finetune.errors import UserError
from finetune.spoken import texts
from finetune.spoken.speech import Voice, synthesize
from research.train_mimi import MelLoss

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "example" / "demo"
MODEL = DEMO / "model"
VOICE = Voice("en-us+f3")
SMALL = {"num_dialogues": 2, "min_sec": 4.0, "max_sec": 6.0, "eval_fraction": 0.5, "seed": 3}


@cache
def demo_mimi() -> MimiModel:
    with no_compile():
        config = json.loads((MODEL / "mimi_config.json").read_text())
        return get_mimi(MODEL / "mimi.safetensors", config, "cpu", 8)


def read_wav(path: Path) -> np.ndarray:
    """int16 [S, 2]."""
    with wave.open(str(path), "rb") as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 24_000)
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").reshape(-1, 2)


def listed(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def words_of(folder: Path, entry: dict) -> list:
    return json.loads((folder / entry["path"]).with_suffix(".json").read_text())["alignments"]


def test_words_that_share_an_event_are_told_apart() -> None:
    text = "Well, the king of the hill is in a garden; isn't it on the map?"
    speech = synthesize(text, VOICE)
    assert [word.text for word in speech.words] == text.split()
    times = [time for word in speech.words for time in (word.start_sec, word.end_sec)]
    assert times == sorted(times)
    assert times[0] >= 0 and times[-1] <= speech.duration_sec + 1e-3
    assert all(word.end_sec - word.start_sec > 0.02 for word in speech.words)
    of, the = speech.words[3], speech.words[4]
    assert of.end_sec == the.start_sec


def test_every_word_of_many_turns_gets_a_time() -> None:
    for text in texts.corpus(60, seed=5)[-40:]:
        assert [word.text for word in synthesize(text, VOICE).words] == text.split()


def test_speech_does_not_depend_on_what_was_said_before() -> None:
    first = synthesize("Good morning, Anna.", VOICE)
    synthesize("Something else in another voice.", Voice("en-us+m3", pitch=30))
    again = synthesize("Good morning, Anna.", VOICE)
    assert first.words == again.words
    assert np.array_equal(first.samples, again.samples)


@pytest.mark.parametrize("text", ["", "  ", "two - three"])
def test_what_cannot_be_spoken_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match="cannot be spoken"):
        synthesize(text, VOICE)


def test_a_voice_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="no-such-voice"):
        synthesize("Hello.", Voice("no-such-voice"))


@pytest.mark.parametrize("name", ["en-us+zz9", "en-us+F2", "en-us+", "en-us+f3+m1", "f3"])
def test_a_variant_that_espeak_would_leave_out_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=r"variant.* f2, f3, f4, ") as raised:
        synthesize("Hello.", Voice(name))
    assert repr(name) in str(raised.value)


def test_a_variant_by_its_number_is_spoken() -> None:
    by_number, by_name = (synthesize("Hello.", Voice(name)) for name in ("en-us+12", "en-us+f2"))
    assert np.array_equal(by_number.samples, by_name.samples)


def test_missing_espeak_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['espeakng_loader'] = None\n"
        "from finetune.spoken.speech import Voice, synthesize\n"
        "synthesize('Hello.', Voice('en-us'))"
    )
    output, _ = Program(program).communicate(timeout=100)
    assert "UserError" in output and "pip install 'moshi-ttt[demo]'" in output


def test_dialogues_are_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    make_dialogues(here, **SMALL)
    program = (
        "from pathlib import Path\n"
        "from finetune.demo.dialogues import make_dialogues\n"
        f"make_dialogues(Path({str(there)!r}), **{SMALL!r})"
    )
    other = Program(program)
    output, _ = other.communicate(timeout=100)
    assert other.returncode == 0, output
    names = sorted(path.name for path in here.iterdir())
    assert names == sorted(path.name for path in there.iterdir())
    assert len(names) == 7  # two wav, two json, train.jsonl, eval.jsonl, parameters.json
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names)


def test_a_folder_made_before_is_kept_and_any_other_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dialogues"
    folder.mkdir()
    make_dialogues(folder, **SMALL)
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    make_dialogues(folder, **SMALL)
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match="not made by this call"):
        make_dialogues(folder, **SMALL | {"seed": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["dialogues"]


def test_a_full_disk_leaves_nothing_of_the_dialogues(tmp_path: Path) -> None:
    folder = tmp_path / "dialogues"
    with room_for(50_000), pytest.raises(UserError) as failing:
        make_dialogues(folder, **SMALL)
    assert str(failing.value) == f"{folder} cannot be written: {FULL}."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"num_dialogues": 1}, {"min_sec": 9.0}, {"min_sec": 1.0}, {"eval_fraction": 0.9}]
)
def test_parameters_out_of_range_are_named(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        make_dialogues(tmp_path / "dialogues", **SMALL | wrong)
    assert not any(tmp_path.iterdir())


def test_committed_dialogues_are_what_training_reads() -> None:
    assert (len(listed(DEMO / "dialogues", "train")), len(listed(DEMO / "dialogues", "eval"))) == (
        2,
        1,
    )
    for entry in listed(DEMO / "dialogues", "train") + listed(DEMO / "dialogues", "eval"):
        samples = read_wav(DEMO / "dialogues" / entry["path"])
        assert len(samples) == round(entry["duration"] * 24_000)
        words = words_of(DEMO / "dialogues", entry)
        assert [word[1] for word in words] == sorted(word[1] for word in words)
        for column, label in enumerate(("SPEAKER_MAIN", "SPEAKER_USER")):
            own = [time for _, time, speaker in words if speaker == label]
            assert own, f"{entry['path']}: {label} says nothing"
            spoken = np.zeros(len(samples), dtype=bool)
            for start_sec, end_sec in own:
                assert 0 <= start_sec < end_sec <= entry["duration"]
                spoken[int(start_sec * 24_000) : int(end_sec * 24_000) + 1] = True
            level = np.abs(samples[:, column].astype(float))
            assert level[spoken].mean() > 500  # of 32767
            assert level[~spoken].mean() < 0.05 * level[spoken].mean()
        assert abs(np.corrcoef(samples.T.astype(float))[0, 1]) < 0.1


def test_the_two_voices_differ_in_pitch() -> None:
    dialogue = compose_dialogue(random.Random(1), "train", 12.0, 12.0)
    pitches_hz: dict[str, list[float]] = {"moshi": [], "user": []}
    for turn in dialogue.turns:
        samples = turn.speech.samples
        for start in range(0, len(samples) - 2048, 2048):
            frame = samples[start : start + 2048]
            if np.sqrt((frame**2).mean()) > 0.05:
                similarity = np.correlate(frame, frame, "full")[2048 + 60 : 2048 + 400]
                pitches_hz[turn.speaker].append(24_000 / (61 + int(similarity.argmax())))
    assert np.median(pitches_hz["moshi"]) > 1.3 * np.median(pitches_hz["user"])


def test_evaluation_never_reads_a_training_sentence() -> None:
    def spoken(split: texts.Split, seed: int) -> set[str]:
        rng = random.Random(seed)
        turns = [turn for _ in range(300) for turn in texts.topic(rng, split)]
        turns += [turn for _ in range(50) for turn in texts.greeting(rng, split)]
        turns += [texts.backchannel(rng, split) for _ in range(50)]
        return {sentence for turn in turns for sentence in texts.sentences_of(turn)}

    train, held_out = spoken("train", 0) | spoken("train", 1), spoken("eval", 0)
    assert len(train) > 500 and len(held_out) > 200
    assert not train & held_out


def test_tokenizer_has_moshis_special_pieces_and_spells_what_it_never_saw() -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(str(MODEL / "tokenizer.model"))
    ids = (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id())
    assert ids == (0, 1, 2, 3) and tokenizer.vocab_size() == 500
    for text in ("Good morning, Anna, how are you?", "Zürich, 42 % — 東京!"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert 0 not in tokenizer.encode(text)
    assert len(tokenizer.encode("Good morning, Anna, how are you?")) < 16


def test_mimi_carries_sound_and_streams_the_same_codes() -> None:
    mimi = demo_mimi()
    entry = listed(DEMO / "dialogues", "eval")[0]
    samples = read_wav(DEMO / "dialogues" / entry["path"])
    target = torch.from_numpy(samples.T.copy()).float()[:, None, : 60 * 1920] / 32768
    with torch.no_grad():
        codes = mimi.encode(target)
        rebuilt = mimi.decode(codes)
        with mimi.streaming(2):
            streamed = torch.cat([mimi.encode(frame) for frame in target.split(1920, -1)], dim=-1)
        loss = MelLoss()
        loss_of_silence = loss(torch.zeros_like(target), target)
        assert loss(rebuilt, target) < 0.4 * loss_of_silence
    assert codes.shape == (2, 8, 60) and codes.min() >= 0 and codes.max() < 256
    assert torch.equal(codes, streamed)
    assert all(len(codes[:, k].unique()) > 25 for k in range(8))


def test_the_model_folder_builds_a_small_moshi() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    for key in ("mimi_name", "mimi_config_name", "tokenizer_name"):
        assert (MODEL / config.pop(key)).is_file()
    assert config.pop("moshi_name") == "model.safetensors" and config.pop("model_type") == "moshi"
    model = get_moshi_lm(None, config, dtype=torch.float32)
    assert isinstance(model, LMModel) and model.num_codebooks == 17
    num_params = sum(parameter.numel() for parameter in model.parameters())
    assert 2_400_000 < num_params < 2_800_000


def test_committed_files_are_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 3_000_000


def test_the_command_says_what_it_has_written_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "talks"
    words = ["demo-data", folder, "--num_dialogues=2", "--min_sec=8", "--max_sec=9"]
    for first in (f"wrote {folder}: ", f"{folder} holds them already: "):
        assert call(*words) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"{first}2 dialogues, listed in train.jsonl and eval.jsonl",
            f"next: moshi-ttt data check {folder}/train.jsonl",
            "then: moshi-ttt train example/demo.yaml "
            f"--data.train_data={folder}/train.jsonl --data.eval_data={folder}/eval.jsonl",
        ]


def test_the_command_for_training_names_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = "--data.train_data={0}/train.jsonl --data.eval_data={0}/eval.jsonl"
    monkeypatch.chdir(tmp_path)
    from_elsewhere = training_command(Path("dd"))
    assert from_elsewhere == (
        f"moshi-ttt train {ROOT}/example/demo.yaml {data.format('dd')} "
        f"--moshi_paths.hf_repo_id={ROOT}/example/demo/model"
    )
    _, _, config, *options = from_elsewhere.split()
    overrides = dict(option.removeprefix("--").split("=") for option in options)
    args = check_config(config, overrides)
    assert [key for key, _ in missing_inputs(args)] == ["data.train_data", "data.eval_data"]
    monkeypatch.setattr(next_step, "_PROJECT", tmp_path)
    assert training_command(Path("dd")) == (
        "in the project's folder, where README.md is: moshi-ttt train example/demo.yaml "
        f"{data.format(tmp_path / 'dd')}"
    )
