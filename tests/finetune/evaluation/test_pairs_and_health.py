"""Scores of pairs of recordings, and measures of the health of speech, whose answers are known."""

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import evaluation_tools
import numpy as np
import pytest
import soundfile
import torch
from data_tools import tiny_codec, tiny_mimi
from helpers import random_codes, tiny_args, tiny_model

from finetune.data import inspect_audio
from finetune.data.audio import AudioInfo
from finetune.errors import UserError
from finetune.evaluation.tasks.health.measure import (
    SHARES,
    alarms,
    check_health,
    limits,
    measure,
    repeat_rate,
)
from finetune.evaluation.tasks.health.summary import summarize_health
from finetune.evaluation.tasks.pairs.options import PairOptions
from finetune.evaluation.tasks.pairs.score import (
    Pair,
    PairScorer,
    log_likelihood,
    read_pairs,
    zerospeech_lines,
)
from finetune.evaluation.tasks.pairs.summary import summarize_pairs
from finetune.kept import Records
from ttt import TTTArgs, TTTLMModel

# Fixtures: pytest finds them by their names in this module.
pair_folder = evaluation_tools.pair_folder


# --- pairs ----------------------------------------------------------------------------------------


def preferring(code: int, margin: float) -> TTTLMModel:
    """A model that takes `code` for likelier than all others in every codebook, by `margin`."""
    model = tiny_model(TTTArgs(enabled=False), dtype=torch.float32, **STREAMS_OF_TINY_CODEC)

    def audio(targets: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(targets), model.dep_q, targets.shape[2], model.card)
        logits[..., code] = margin
        return logits

    model.forward_depformer_training = audio  # type: ignore[method-assign, assignment]
    return model


STREAMS_OF_TINY_CODEC: dict[str, Any] = {
    "n_q": 16,
    "dep_q": 8,
    "card": 32,
    "text_card": 40,
    "delays": [0, *[0, 1, 1, 1, 1, 1, 1, 1] * 2],
    "depformer_context": 8,
}


def scores_of(
    model: TTTLMModel, folder: Path, options: PairOptions
) -> tuple[list[Pair], Records, PairScorer]:
    pairs = read_pairs(folder / "pairs.jsonl")
    records = Records(folder / f"{id(model)}.jsonl", {})
    task = PairScorer(
        model, tiny_codec(), pairs, options=options, batch_size=3, block_frames=10, records=records
    )
    task.run()
    return pairs, records, task


@pytest.mark.parametrize("margin", [2.0, -2.0])
def test_a_known_preference_comes_out_in_sign_and_value(pair_folder: Path, margin: float) -> None:
    """A model that likes (or dislikes) the code of silence finds silence likelier (or less)."""
    mimi = tiny_mimi()
    silent = int(mimi.encode(torch.zeros(1, 1, 24000))[0, 0].mode().values)
    model = preferring(silent, margin)
    options = PairOptions()
    pairs, records, task = scores_of(model, pair_folder, options)
    summary = summarize_pairs(pairs, records, task.missing, options)
    assert summary["all"]["accuracy"]["value"] == (1.0 if margin > 0 else 0.0)
    assert summary["groups"]["a"]["num_scored"] == summary["groups"]["b"]["num_scored"] == 1

    by_wav = {record["wav"]: record for record in records}
    good = by_wav[str(pairs[0].good)]
    codes = mimi.encode(torch.zeros(1, 1, 13 * 1920))[0, 0]
    hits = int((codes == silent).sum())
    expected = margin * hits - 13 * math.log(math.exp(margin) + 31)
    assert good["num_frames"] == 13 and hits > 4
    assert log_likelihood(good, options) == pytest.approx(expected / 13, abs=1e-5)
    assert log_likelihood(good, PairOptions(length_norm="sum")) == pytest.approx(expected, abs=1e-4)
    with_others = log_likelihood(good, PairOptions(other_codebooks_weight=0.5, length_norm="sum"))
    assert with_others < expected - 10

    lines = dict(line.split() for line in zerospeech_lines(pairs, records, options))
    assert lines.keys() == {"good0", "good1", "bad0", "bad1"}
    assert float(lines["good0"]) == pytest.approx(expected / 13, abs=1e-5)


def test_the_other_side_is_silent_and_stereo_is_taken_as_it_is(pair_folder: Path) -> None:
    codec = tiny_codec()
    options: dict[str, Any] = {
        "batch_size": 1,
        "block_frames": 10,
        "records": Records(pair_folder / "r", {}),
    }
    pairs = read_pairs(pair_folder / "pairs.jsonl")
    silence = codec.mimi.encode(torch.zeros(1, 1, 13 * 1920))[0]
    noise, rate = soundfile.read(pairs[0].bad, dtype="float32")
    padded = torch.zeros(1, 1, 13 * 1920)
    padded[0, 0, : len(noise)] = torch.from_numpy(noise)
    speech = codec.mimi.encode(padded)[0]
    model = preferring(0, 1.0)
    sides: dict[Literal["moshi", "user"], Any] = {"moshi": (speech, silence)}
    sides["user"] = (silence, speech)
    for side, first in sides.items():
        task = PairScorer(model, codec, pairs, options=PairOptions(side=side), **options)
        codes = task._encode(pairs[0].bad, _info(pairs[0].bad))
        assert (codes[1:9] == first[0]).float().mean() > 0.99
        assert (codes[9:] == first[1]).float().mean() > 0.99
        assert (codes[0] == codec.text_padding_id).all()
    stereo = pair_folder / "stereo.wav"
    soundfile.write(stereo, np.stack([noise * 0, noise], 1), rate)
    codes = task._encode(stereo, _info(stereo))
    assert (codes[9:] == speech).float().mean() > 0.99


def _info(path: Path) -> AudioInfo:
    return inspect_audio(path, channels=(1, 2))


def test_missing_recordings_are_counted_and_never_scored(pair_folder: Path) -> None:
    (pair_folder / "bad1.wav").write_bytes(b"not audio")
    (pair_folder / "good0.wav").unlink()
    lines = (pair_folder / "pairs.jsonl").read_text()
    third = json.dumps({"good": "good1.wav", "bad": "bad0.wav", "group": "a"})
    (pair_folder / "pairs.jsonl").write_text(lines + third + "\n")
    pairs, records, task = scores_of(preferring(0, 1.0), pair_folder, PairOptions())
    summary = summarize_pairs(pairs, records, task.missing, PairOptions())
    assert (summary["num_pairs"], summary["num_missing"]) == (3, 2)
    assert "is missing" in summary["missing"]["p0"] and "cannot be read" in summary["missing"]["p1"]
    assert all(why.endswith(", or remove its line") for why in summary["missing"].values())
    assert summary["all"]["num_scored"] == 1 and summary["groups"]["b"]["num_scored"] == 0
    assert summary["groups"]["b"]["accuracy"]["value"] is None
    assert summary["scores"][0]["missing"] and summary["scores"][0]["good"] is None
    scored = zerospeech_lines(pairs, records, PairOptions())
    assert [line.split()[0] for line in scored] == ["bad0", "good1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"good": "a.wav"}\n', "pairs.jsonl:1: malformed line"),
        ('{"good": "a", "bad": "b", "id": 1}\n' * 2, "pairs.jsonl:2: the id '1' has come before"),
    ],
)
def test_wrong_pair_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs(path)
    with pytest.raises(UserError, match="cannot read"):
        read_pairs(tmp_path / "none.jsonl")


def test_changed_recordings_of_pairs_are_scored_again(pair_folder: Path) -> None:
    model, options = preferring(0, 1.0), PairOptions()
    _, records, _ = scores_of(model, pair_folder, options)
    file = pair_folder / "bad0.wav"
    os.utime(file, ns=(0, 10**9))
    _, again, task = scores_of(model, pair_folder, options)
    assert len(list(again)) == len(list(records)) + 1 and len(task.results()) == 4


# --- health ---------------------------------------------------------------------------------------


def test_measures_of_known_speech() -> None:
    codec = tiny_codec()
    pad, end = codec.text_padding_id, codec.end_of_text_padding_id
    tokens = torch.stack([torch.tensor([pad, end, 9, pad]), torch.tensor([1, 1, 2, 2])])
    found = measure(codec, tokens, torch.tensor([-80.0, -20, -20, -80]), silent_db=-60)
    assert found["entropy"] == pytest.approx(math.log(2)) and found["modal_share"] == 0.5
    assert found["padding_share"] == 0.75 and found["silence_share"] == 0.5
    loop = list(range(10)) * 4
    assert repeat_rate(loop) == pytest.approx(21 / 31)
    # Silence repeats lawfully; and what is new is no repetition.
    assert repeat_rate([5] * 60) == 0 and repeat_rate(list(range(60))) == 0


def test_alarms_ring_for_collapse_alone() -> None:
    usual: dict[str, Any] = {
        "entropy": 3.0,
        "modal_share": 0.3,
        "padding_share": 0.7,
        "silence_share": 0.5,
        "repeat_rate": 0.0,
    }
    assert alarms(usual, usual) == []
    for broken in (
        {"entropy": 1.0},
        {"modal_share": 0.7},
        {"padding_share": 1.0},
        {"padding_share": 0.2},
        {"silence_share": 1.0},
        {"repeat_rate": 0.6},
    ):
        assert [alarm.measure for alarm in alarms(usual | broken, usual)] == list(broken)
    # A share below 0 is no limit.
    assert limits(usual)["padding_share"] == "< 0.30 or ≥ 0.98"
    assert limits(usual | {"padding_share": 0.3})["padding_share"] == "≥ 0.98"
    # The user talks all the time: then silence is no collapse.
    listening = usual | {"silence_share": 0.95, "padding_share": 0.95}
    assert alarms(listening | {"silence_share": 1.0, "padding_share": 1.0}, listening) == []


def test_continuations_are_seeded_and_leave_the_random_state_alone() -> None:
    codec = tiny_codec()
    model = tiny_model(tiny_args(), dtype=torch.float32, **STREAMS_OF_TINY_CODEC)
    codes = random_codes(num_frames=40, num_streams=17, text_card=40, card=32)
    before = torch.get_rng_state()
    first = check_health(model, codec, codes, prompt_frames=5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert check_health(model, codec, codes, prompt_frames=5, seed=1) == first
    assert check_health(model, codec, codes, prompt_frames=5, seed=2) != first
    assert (
        first[0]["recorded"]
        == check_health(model, codec, codes, prompt_frames=5, seed=2)[0]["recorded"]
    )
    stuck = preferring(3, 0.0)
    for linear in stuck.linears:
        torch.nn.init.zeros_(linear.weight)
    results = check_health(stuck, codec, codes, prompt_frames=5, seed=1, temperature=0)
    assert results[0]["generated"]["modal_share"] == 1.0
    assert "modal_share" in [
        alarm.measure for alarm in alarms(results[0]["generated"], results[0]["recorded"])
    ]


def test_shares_that_are_alike_in_a_few_continuations_have_an_interval_with_a_width() -> None:
    alike = {"entropy": 3.0} | dict.fromkeys(SHARES, 0.0)
    found = summarize_health([{"generated": alike, "recorded": alike}] * 3)["measures"]
    assert found["entropy"]["generated"]["value"] == 3
    for name in SHARES:
        estimate = found[name]["generated"]
        # Wilson's interval of 0 of 3.
        assert estimate["value"] == estimate["low"] == 0
        assert estimate["high"] == pytest.approx(0.5615, abs=1e-4)
