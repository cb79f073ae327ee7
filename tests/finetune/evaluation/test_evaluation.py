"""`moshi-ttt evaluate`: known answers come out, nothing is lost or made up, mistakes are named."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import soundfile
import torch
from data_tools import (
    speech_like,
    tiny_codec,
    tiny_mimi,
    write_dataset,
    write_jsonl,
    write_recording,
)
from helpers import DELAYS, random_codes, tiny_args, tiny_model
from matplotlib.figure import Figure
from test_evaluation_streaming import InMemory
from training_tools import checkpoint, train, trainer, write_model

from finetune.cli import evaluate, run
from finetune.config import WandbArgs
from finetune.data import inspect_audio
from finetune.data.audio import AudioInfo
from finetune.errors import UserError
from finetune.evaluation import Options, evaluate_checkpoint
from finetune.evaluation.bin_sums import BinSums
from finetune.evaluation.streaming import ScoredBlock, Scorer
from finetune.evaluation.streams import STREAMS
from finetune.evaluation.tasks import TASKS
from finetune.evaluation.tasks.health import ContinuationOptions
from finetune.evaluation.tasks.health.measure import (
    alarms,
    check_health,
    limits,
    measure,
    repeat_rate,
)
from finetune.evaluation.tasks.pairs import PairOptions
from finetune.evaluation.tasks.pairs.score import (
    Pair,
    PairScorer,
    log_likelihood,
    read_pairs,
    zerospeech_lines,
)
from finetune.evaluation.tasks.pairs.summary import summarize_pairs
from finetune.evaluation.tasks.position.summary import pairwise_edges, summarize_positions
from finetune.kept import Records
from finetune.monitoring import metrics_path, read_metrics
from finetune.statistics import Bootstrap, proportion, slope_parts, student_t
from finetune.step import LossWeights
from ttt import TTTArgs, TTTLMModel, block_streaming

CARD, TEXT_CARD = 20, 30
LOOKED_AT = ("test_a_report_that_stands_alone", "test_of_recordings_without_an_update")
"""Tests whose pictures are drawn: one with all there can be, and one with hardly anything."""


@pytest.fixture(autouse=True)
def _pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures undrawn, which takes most of a small evaluation; they are made all the same."""
    if not request.node.name.startswith(LOOKED_AT):
        monkeypatch.setattr(Figure, "savefig", lambda self, target, **_: target.write("<svg/>"))


# --- known answers --------------------------------------------------------------------------------


def nll_of(margin: int, card: int) -> float:
    """CE of a target whose logit is `margin` above all others, which are equal."""
    return math.log(math.exp(margin) + card - 1) - margin


class Rigged:
    """Makes a model know its targets the better the later they come, or the worse.

    The logit of the target at step s is `margins(s)` above the others. The text of the recordings
    is one token throughout, for the model must not see its targets.
    """

    def __init__(self, model: Any, margins: Any, token: int) -> None:
        self.model, self.margins, self.token, self.step = model, margins, token, 0
        model.forward_text = self.text
        model.forward_depformer_training = self.audio

    def text(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, _, num_steps = sequence.shape
        self.steps = torch.arange(self.step, self.step + num_steps)
        self.step += num_steps
        logits = torch.zeros(num_rows, 1, num_steps, TEXT_CARD)
        logits[..., self.token] = self.margins(self.steps)
        return torch.zeros(num_rows, num_steps, self.model.dim), logits

    def audio(self, targets: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        targets = targets[:, 1 : 1 + self.model.dep_q].clamp(0, CARD - 1)
        return torch.nn.functional.one_hot(targets, CARD) * self.margins(self.steps)[:, None]


def test_loss_by_position_is_what_it_is_known_to_be() -> None:
    """Three recordings of different lengths, whose loss falls by a known amount at frame 20."""
    model = tiny_model(TTTArgs(enabled=False), dtype=torch.float32)
    token, lengths, bin_frames = 7, [60, 45, 30], 10
    rows = [random_codes(batch=1, num_frames=n, seed=n)[0] for n in lengths]
    for row in rows:
        row[0] = token
    Rigged(model, lambda steps: torch.where(steps < 20, 1.0, 3.0), token)
    sums = BinSums(model, len(rows), max(lengths), bin_frames)
    weights = LossWeights(text_padding=0.5, first_codebook=1.0)
    with block_streaming(model, len(rows), 8):
        scorer = Scorer(model, [InMemory(r) for r in rows], weights=weights, block_frames=8)
        for block in scorer.score():
            sums.add(block)
    records = [
        {
            "arm": "off",
            "recording": str(i),
            "num_frames": n,
            "streams": sums.of_row(i, n),
        }
        for i, n in enumerate(lengths)
    ]
    result = summarize_positions(
        records,
        bin_frames=bin_frames,
        window_frames=20,
        vocabulary={"text": TEXT_CARD, "words": TEXT_CARD, "first_codebook": CARD,
                    "other_codebooks": CARD},
    )  # fmt: skip
    assert result["num_recordings"] == 3 and result["attention_window_sec"] == 1.6
    assert result["guessing"]["first_codebook"] == pytest.approx(math.log(CARD))
    off = result["arms"]["off"]
    for stream, card in (("text", TEXT_CARD), ("words", TEXT_CARD), ("first_codebook", CARD)):
        curve = off[stream]["curve"]
        assert [point["start_sec"] for point in curve] == [0.0, 0.8, 1.6, 2.4, 3.2]
        expected = [nll_of(1, card)] * 2 + [nll_of(3, card)] * 3
        for point, value in zip(curve, expected, strict=True):
            assert point["value"] == pytest.approx(value, abs=1e-5)
            # Nothing differs between recordings, so the interval has no width; two have none.
            if point["count"] == 3:
                assert point["low"] == pytest.approx(point["high"], abs=1e-5)
            else:
                assert point["low"] is None
        assert [point["count"] for point in curve] == [3, 3, 3, 2, 2]
        assert off[stream]["beyond_window"]["value"] == pytest.approx(nll_of(3, card), abs=1e-5)
        assert off[stream]["slope_per_doubling"]["value"] < -0.3
        assert off[stream]["slope_per_hour_beyond_window"]["value"] == pytest.approx(0, abs=1e-3)
    # Delayed codebooks are predicted a step later, so their frame 19 is one of the good ones.
    share = [1.0, 0.9, 0.0, 0.0, 0.0]
    for point, bad in zip(off["other_codebooks"]["curve"], share, strict=True):
        assert point["value"] == pytest.approx(
            bad * nll_of(1, CARD) + (1 - bad) * nll_of(3, CARD), abs=1e-5
        )
    # Every target counts once: all frames, but the last one of a delayed codebook.
    counts = sums.sums[3].sum(-1)
    assert counts[:, 0].tolist() == lengths
    assert counts[:, 2].tolist() == [n - DELAYS[2] for n in lengths]


def test_slopes_are_within_recordings() -> None:
    """A long recording that is hard throughout does not make late positions look hard."""
    x: np.ndarray = np.arange(4.0)
    weight = np.array([[1.0, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    loss = weight * np.array([[1.0, 1.5, 0, 0], [5, 5.5, 6, 6.5], [3, 3.5, 4, 0]])
    rise, spread = slope_parts(x, loss, weight)
    assert rise.sum() / spread.sum() == pytest.approx(0.5)
    estimate = Bootstrap(3).ratio(rise, spread)
    assert estimate.low == pytest.approx(0.5) and estimate.high == pytest.approx(0.5)


def test_quantiles_of_student_are_those_of_the_tables() -> None:
    for probability, degrees, expected in (
        (0.975, 1, 12.7062),
        (0.975, 3, 3.18245),
        (0.975, 10, 2.22814),
        (0.99375, 2, 8.8602),
        (0.975, 10_000, 1.96020),
    ):
        assert student_t(probability, degrees) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_recordings", [3, 4, 8, 40])
def test_intervals_cover_what_they_should(num_recordings: int) -> None:
    generator = np.random.default_rng(0)
    bootstrap, trials, covered = Bootstrap(num_recordings), 400, 0
    for _ in range(trials):
        weight = generator.uniform(10, 20, num_recordings)
        loss = weight * generator.normal(2.0, 0.5, num_recordings)
        estimate = bootstrap.ratio(loss, weight)
        assert estimate.low is not None and estimate.high is not None
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.91 <= covered / trials <= 0.99


def test_one_or_two_recordings_have_no_interval_and_pairing_cancels_what_is_common() -> None:
    for num_recordings in (1, 2):
        few = np.full(num_recordings, 3.0)
        alone = Bootstrap(num_recordings).ratio(few, few / 1.5)
        assert (alone.value, alone.low, alone.high) == (1.5, None, None)
    generator = np.random.default_rng(0)
    weight = generator.uniform(10, 20, 40)
    loss = weight * generator.normal(2.0, 0.5, 40)
    other = loss + 0.1 * weight
    difference = Bootstrap(40).ratio_difference((loss, other), (weight, weight))
    assert difference.low == pytest.approx(-0.1) and difference.high == pytest.approx(-0.1)


def test_proportions_have_sensible_intervals_at_the_ends() -> None:
    assert proportion(200, 200).low == pytest.approx(0.9812, abs=1e-4)
    half = proportion(50, 100)
    assert (half.low, half.high) == (
        pytest.approx(0.4038, abs=1e-4),
        pytest.approx(0.5962, abs=1e-4),
    )
    assert proportion(0, 0).value is None


def test_curves_cover_every_bin_once() -> None:
    for num_bins in (1, 2, 3, 5, 13, 90, 361):
        ranges = pairwise_edges(num_bins)
        covered = [bin for start, stop in ranges for bin in range(start, stop)]
        assert covered == list(range(num_bins)) and len(ranges) <= 20


def test_conclusions_say_no_more_than_the_intervals() -> None:
    def estimate(value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
        return {"value": value, "low": low, "high": high, "count": 20}

    def sentences(arms: Any, *estimates: Any) -> list[Any]:
        by_stream = dict(zip(STREAMS, estimates, strict=True))
        difference = {"arms": arms} | {s: {"beyond_window": e} for s, e in by_stream.items()}
        place: dict[str, Any] = {
            "longest_sec": 600,
            "attention_window_sec": 240,
            "differences": [difference],
        }
        place |= {"num_recordings": 20, "ttt_wrote": True, "warnings": []}
        return list(TASKS["position"].sentences(place))

    better, worse = estimate(-0.02, -0.03, -0.01), estimate(0.02, 0.01, 0.03)
    unsure, tiny = estimate(-0.02, -0.05, 0.01), estimate(2e-5, 1e-5, 3e-5)
    (sentence,) = sentences(["on", "off"], better, worse, unsure, tiny)
    assert "better: text, with padding −0.0200 [−0.0300, −0.0100]; worse: text, words" in sentence
    assert "no difference shown: first codebook −0.0200" in sentence
    assert len(sentences(["on", "carried"], better, tiny, unsure, tiny)) == 1
    assert sentences(["on", "carried"], better, worse, unsure, tiny)[1].startswith("Warning")
    # One of four streams by a hair is what chance would show.
    barely = estimate(0.02, 0.001, 0.039)
    assert "worse: text, with padding" in sentences(["on", "carried"], barely, *[unsure] * 3)[0]
    assert len(sentences(["on", "carried"], barely, unsure, unsure, unsure)) == 1
    alone = estimate(-0.5, None, None)
    assert "better" not in sentences(["on", "off"], alone, alone, alone, alone)[0]


# --- pairs ----------------------------------------------------------------------------------------


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """Two pairs of silence (good) and noise, mono, of different lengths; one of them 16 kHz."""
    for index, (sec, rate) in enumerate([(1.0, 24000), (1.7, 16000)]):
        soundfile.write(tmp_path / f"good{index}.wav", np.zeros(round(sec * rate)), rate)
        noise = speech_like(sec, rate, channels=1, seed=index)
        soundfile.write(tmp_path / f"bad{index}.wav", noise, rate)
    lines = [
        {"good": f"good{i}.wav", "bad": f"bad{i}.wav", "id": f"p{i}", "group": "ab"[i]}
        for i in range(2)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", lines)
    return tmp_path


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


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with TTT, its data, and what its training logged."""
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    data = write_dataset(run_dir.parent / "data", [4.0, 3.1, 2.3, 4.0], seed=9)
    overrides: dict[str, Any] = {
        "do_eval": True,
        "data.eval_data": str(data),
        "health_sec": 1,
        "duration_sec": 3.2,
    }
    overrides |= {"model.attention_context": 10, "param_dtype": "float32"}
    train(config, run_dir, overrides)
    return checkpoint(run_dir, 4), data


def options(trained: tuple[Path, Any], out: Path, **changes: Any) -> Any:
    path, data = trained
    health = ContinuationOptions(num_continuations=2, prompt_sec=0.4, health_sec=1.0)
    given: dict[str, Any] = {
        "tasks": ("position",),
        "bin_sec": 0.8,
        "batch_size": 2,
        "device": "cpu",
    }
    given |= {"data": str(data), "health": health, "block_frames": 7}
    return Options.complete()(checkpoint=path, out=out, **{**given, **changes})


def test_a_report_that_stands_alone(
    trained: tuple[Path, Path], tmp_path: Path, pair_folder: Path
) -> None:
    results = evaluate_checkpoint(
        options(
            trained,
            tmp_path / "out",
            tasks=("position", "pairs", "health"),
            pairs=pair_folder / "pairs.jsonl",
        )
    )
    out = tmp_path / "out"
    assert set(results["position"]["arms"]) == {"on", "off", "reset", "carried"}
    assert json.loads((out / "results.json").read_text())["conclusions"] == results["conclusions"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "Loss by position" in page
    # Nothing is loaded: no script, no picture or style from elsewhere.
    assert not any(mark in page for mark in ("<script", "src=", "@import", "<link"))
    rows = (out / "position.csv").read_text().splitlines()
    curve = results["position"]["arms"]["on"]["text"]["curve"]
    assert rows[1].split(",")[:3] == ["on", "text", "0.0"]
    assert float(rows[1].split(",")[6]) == curve[0]["value"]
    assert (out / "pairs.csv").exists() and (out / "health.csv").exists()
    assert len((out / "zerospeech.txt").read_text().splitlines()) == 4
    assert not list(out.glob("codes_*"))


def test_wandb_gets_the_numbers_and_the_report(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, Any] = {}
    finished: list[bool] = []

    class Run:
        log = staticmethod(logged.update)
        finish = staticmethod(lambda: finished.append(True))

    def opened(folder: Any, args: Any, config: Any, *, resumed: Any) -> Any:
        assert (args.project, args.offline) == ("speech", True) and not resumed
        assert config["evaluation"]["arms"] == ("off",)
        return Run

    monkeypatch.setattr("finetune.evaluation.dashboard.open_wandb", opened)
    chosen: dict[str, Any] = {
        "wandb": WandbArgs("speech", offline=True),
        "arms": ("off",),
        "limit": 1,
    }
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **chosen))
    mean = results["position"]["arms"]["off"]["text"]["mean"]["value"]
    assert logged["position/off/text/mean"] == mean and "report" in logged and finished


def test_an_interrupted_evaluation_continues_and_gives_the_same(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_checkpoint(options(trained, tmp_path / "whole", arms=("on", "carried")))
    score, passes = Scorer.score, []

    def interrupted(self: Any, **given: Any) -> Iterator[ScoredBlock]:
        passes.append(len(self.rows))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return score(self, **given)

    monkeypatch.setattr(Scorer, "score", interrupted)
    path = tmp_path / "out" / "position.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(options(trained, tmp_path / "out", arms=("on", "carried")))
    kept = path.read_text().splitlines()
    assert len(kept) == 1 + 2 * 2 and not list(path.parent.glob("codes_*"))
    # As if the power had failed in the middle of a line.
    path.write_text(path.read_text() + '{"arm": "on", "rec')
    again = evaluate_checkpoint(options(trained, tmp_path / "out", arms=("on", "carried")))
    # Four passes of two recordings each, and the one that was interrupted.
    assert passes == [2] * 5 and path.read_text().splitlines()[: len(kept)] == kept
    assert again["position"]["arms"] == whole["position"]["arms"]
    # All is there: nothing runs a third time. Fewer recordings: those of the others stay apart.
    fewer = evaluate_checkpoint(options(trained, tmp_path / "out", limit=3, arms=("on",)))
    assert len(passes) == 5 and fewer["position"]["num_recordings"] == 3


def test_results_of_other_options_are_never_mixed(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    evaluate_checkpoint(options(trained, tmp_path / "out", arms=("off",), limit=1))
    with pytest.raises(UserError, match=r"bin_frames was 10, is 5.*Choose another --out"):
        evaluate_checkpoint(options(trained, tmp_path / "out", bin_sec=0.4))


def position_records(out: Path, arm: str) -> dict[str, Any]:
    """The records of an arm, by recording."""
    records = [json.loads(line) for line in (out / "position.jsonl").open()][1:]
    return {r["recording"]: r for r in records if r["arm"] == arm}


def test_the_batch_size_changes_no_record(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Donors of a batch end at different frames, rows too."""
    for size in (1, 4):
        chosen: dict[str, Any] = {"arms": ("on", "carried"), "batch_size": size}
        evaluate_checkpoint(options(trained, tmp_path / str(size), **chosen))
    for arm in ("on", "carried"):
        alone, together = (position_records(tmp_path / size, arm) for size in "14")
        assert len(alone) == 4
        for name, record in alone.items():
            for stream in STREAMS:
                for key, values in record["streams"][stream].items():
                    other = together[name]["streams"][stream][key]
                    assert values == pytest.approx(other, rel=1e-4), (arm, stream, key)


@pytest.mark.parametrize("changed", ["0.wav", "0.json"])
def test_a_changed_file_of_the_same_size_is_read_again(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    data = write_dataset(tmp_path / "data", [2.0, 2.0])
    evaluate_checkpoint(options(trained, tmp_path / "out", data=str(data), arms=("off",)))
    file = tmp_path / "data" / changed
    status, passes, score = file.stat(), [], Scorer.score
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))

    def counted(self: Any, **given: Any) -> Iterator[ScoredBlock]:
        passes.append(len(self.rows))
        return score(self, **given)

    monkeypatch.setattr(Scorer, "score", counted)
    evaluate_checkpoint(options(trained, tmp_path / "out", data=str(data), arms=("off",)))
    assert passes == [1]


def test_changed_recordings_of_pairs_are_scored_again(pair_folder: Path) -> None:
    model, options = preferring(0, 1.0), PairOptions()
    _, records, _ = scores_of(model, pair_folder, options)
    file = pair_folder / "bad0.wav"
    os.utime(file, ns=(0, 10**9))
    _, again, task = scores_of(model, pair_folder, options)
    assert len(list(again)) == len(list(records)) + 1 and len(task.results()) == 4


def test_a_loss_that_is_not_finite_is_named_and_counted_nowhere(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Scorer.score

    def broken(self: Any, **given: Any) -> Iterator[ScoredBlock]:
        for block in score(self, **given):
            for row, recording in enumerate(self.rows):
                if recording.num_frames == 39:
                    block.nll[row, 1, block.frames[1] >= 20] = math.nan
            yield block

    monkeypatch.setattr(Scorer, "score", broken)
    results = evaluate_checkpoint(options(trained, tmp_path / "out", arms=("on", "off")))
    assert results["position"]["num_recordings"] == 3
    assert math.isfinite(results["position"]["arms"]["on"]["first_codebook"]["mean"]["value"])
    (missing,) = results["missing"]["position"]
    assert "loss is not finite at 1.6 s" in missing
    assert results["conclusions"][0].startswith("Warning: The loss of 1 recordings is not finite")
    # Not a single one left: that is said, too.
    chosen: dict[str, Any] = {
        "data": str(write_dataset(tmp_path / "data", [3.1])),
        "arms": ("off",),
    }
    results = evaluate_checkpoint(options(trained, tmp_path / "none", **chosen))
    assert "there is no loss by position" in results["conclusions"][1]


def test_resets_before_anything_is_learned_are_refused(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--reset_frames: TTT writes after every 5 .* at least 6"):
        evaluate_checkpoint(options(trained, tmp_path / "out", reset_frames=5))
    # What is read counts, not the length of the files.
    results = evaluate_checkpoint(options(trained, tmp_path / "out", max_sec=0.8))
    assert "reset" not in results["position"]["arms"]
    assert any("the arm `reset` is left out" in note for note in results["notes"])


def test_of_recordings_without_an_update_nothing_is_concluded(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    results = evaluate_checkpoint(options(trained, tmp_path / "out", max_sec=0.4))
    assert list(results["position"]["arms"]) == ["on", "off"]
    (conclusion,) = results["conclusions"]
    assert "TTT never wrote" in conclusion and conclusion.startswith("Warning")


def test_who_is_too_short_is_nobodys_donor(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [2.0, 0.3, 1.5, 0.3])
    chosen: dict[str, Any] = {"data": str(data), "arms": ("on", "carried")}
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **chosen))
    assert results["position"]["num_recordings"] == 4
    donors = {r["control"] for r in position_records(tmp_path / "out", "carried").values()}
    assert {donor[-5:] for donor in donors} == {"0.wav", "2.wav"}


def test_another_recordings_state_is_what_the_carried_arm_starts_with(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Every recording is the donor of another one."""
    results = evaluate_checkpoint(options(trained, tmp_path / "out", arms=("on", "off", "carried")))
    records = [json.loads(line) for line in (tmp_path / "out/position.jsonl").open()][1:]
    donors = {r["recording"]: r["control"] for r in records if r["arm"] == "carried"}
    assert len(donors) == 4 and all(donor != own for own, donor in donors.items())
    assert set(donors.values()) == set(donors)
    first = {(r["arm"], r["recording"]): r["streams"]["text"]["loss"][0] for r in records}
    assert all(first["carried", own] != first["on", own] for own in donors)
    assert len(results["position"]["differences"]) == 3


def test_what_cannot_be_read_is_listed_and_counted(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    data = write_dataset(tmp_path / "data", [2.0, 2.0])
    (tmp_path / "data/0.json").unlink()
    results = evaluate_checkpoint(options(trained, tmp_path / "out", data=str(data)))
    assert (
        results["position"]["num_recordings"] == 1 and "carried" not in results["position"]["arms"]
    )
    assert len(results["missing"]["data"]) == 1 and "0.json" in results["missing"]["data"][0]
    assert any("it needs two recordings" in note for note in results["notes"])
    assert results["position"]["arms"]["on"]["text"]["mean"]["low"] is None
    page = (tmp_path / "out/report.html").read_text()
    assert "0.json" in page and "there are no intervals" in page


def test_a_stock_moshi_is_a_baseline(trained: tuple[Path, Path], tmp_path: Path) -> None:
    stock = write_model(tmp_path / "model")
    config = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps(config | {"context": 10}))
    results = evaluate_checkpoint(options((stock, trained[1]), tmp_path / "stock"))
    assert list(results["position"]["arms"]) == ["off"]
    assert any("has no TTT" in note for note in results["notes"])
    compared = evaluate_checkpoint(
        options(trained, tmp_path / "out", arms=("on",), baseline=tmp_path / "stock")
    )
    assert [d["arms"] for d in compared["position"]["differences"]] == [["on", "baseline"]]
    # And the other way round.
    other = evaluate_checkpoint(
        options((stock, trained[1]), tmp_path / "other", baseline=tmp_path / "out")
    )
    assert ["off", "baseline"] in [d["arms"] for d in other["position"]["differences"]]
    assert any("compared with the baseline: loss beyond" in c for c in other["conclusions"])


def test_a_wrong_baseline_is_told_before_anything_is_computed(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_checkpoint(options(trained, tmp_path / "base", arms=("on",)))
    monkeypatch.setattr("finetune.evaluation.bench.load_for_inference", None)

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=message):
            evaluate_checkpoint(options(trained, tmp_path / "out", arms=("on",), **changes))

    refused("no evaluation of loss by position", baseline=tmp_path / "none")
    refused("bin_frames 10, and this is 5", baseline=tmp_path / "base", bin_sec=0.4)
    data = write_dataset(tmp_path / "data", [2.0])
    refused("is of other recordings", baseline=tmp_path / "base", data=str(data))
    (tmp_path / "base/position.jsonl").write_text("no json\n")
    refused(r"--baseline: .*is damaged", baseline=tmp_path / "base")


def test_a_baseline_is_compared_by_what_was_read(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """The same files by another path are the same; a file that was another one is left out."""
    data = write_dataset(tmp_path / "data", [2.0, 1.5])
    evaluate_checkpoint(options(trained, tmp_path / "base", data=str(data), arms=("on",)))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    chosen: dict[str, Any] = {"baseline": tmp_path / "base", "arms": ("on",), "limit": 2}
    chosen |= {"data": str(tmp_path / "link" / data.name)}
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **chosen))
    assert results["position"]["num_recordings"] == 2
    difference = results["position"]["differences"][0]
    assert difference["arms"] == ["on", "baseline"] and difference["text"]["mean"]["value"] == 0
    write_recording(tmp_path / "data", "0.wav", 2.0, rate_hz=16_000)
    results = evaluate_checkpoint(options(trained, tmp_path / "out", **chosen))
    assert results["position"]["num_recordings"] == 1
    assert "size_bytes was" in results["missing"]["baseline"][0]


def test_earlier_results_are_not_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"
    Records(path, {"a": 1}).append({"b": "é"})
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"b": ')
    monkeypatch.setattr("pathlib.Path.write_text", None)
    assert list(Records(path, {"a": 1})) == [{"b": "é"}] and path.read_bytes() == kept


def test_training_logs_the_health_of_speech(trained: tuple[Path, Path]) -> None:
    for record in read_metrics(metrics_path(trained[0].parent.parent, "eval")):
        for name in ("entropy", "modal_share", "padding_share", "silence_share", "repeat_rate"):
            assert math.isfinite(record[f"health/{name}"])


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"duration_sec": 2.9}, "segments (duration_sec) of 3 s, and these are of 2.9 s"),
        ({"health_sec": 0.9}, "it takes at least 1 s, and these are 0.9 s"),
        ({"duration_sec": 2, "health_sec": 0}, None),
        ({"duration_sec": 2, "do_eval": False}, None),
        ({"duration_sec": 3, "health_sec": 1}, None),
    ],
)
def test_speech_that_cannot_be_checked_is_told_at_the_start(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, Any],
    why: Any,
) -> None:
    given: dict[str, Any] = {"do_eval": True, "duration_sec": 4, "health_sec": 6, **overrides}
    run = trainer(config, tmp_path, given)
    said = capsys.readouterr().out
    assert ("health of speech is not checked" in said) == (why is not None) and (why or "") in said
    assert (run.speech_check is None) == (why is not None or not overrides.get("health_sec"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": "nowhere"}, "nowhere is no checkpoint"),
        (
            {"tasks": "positions"},
            "--tasks: expected position or pairs or health or spoken_recall, got 'positions'",
        ),
        ({"arms": "on,of"}, "--arms: expected on or off or reset or carried, got 'of'"),
        ({"tasks": "pairs"}, "pairs needs --pairs"),
        ({"tasks": "position", "pairs": "nope.jsonl"}, "--pairs: counts for the task pairs alone"),
        ({"tasks": "health", "baseline": "base"}, "--baseline: counts for the task position alone"),
        ({"wandb.offline": "true"}, "--wandb.offline: name the project too"),
        ({"wandb.offline": "yse"}, "--wandb.offline: expected true or false"),
        ({"checkpoint": ""}, "--checkpoint is missing"),
        ({"checkpoint": "", "chekpoint": "x"}, "unknown option: --chekpoint"),
        ({"pair_side": "left"}, "--pair_side: expected moshi or user"),
        ({"data": "none.jsonl"}, "none.jsonl does not exist"),
        ({"data": "EMPTY"}, "is empty"),
        ({"bin_sec": "wide"}, "--bin_sec: expected a number"),
        ({"device": "gpu"}, "--device: expected auto or cpu or cuda"),
        ({"limits": "3"}, "unknown option: --limits"),
    ],
)
def test_mistakes_are_named(
    trained: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: dict[str, str],
    message: Any,
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    path, data = trained
    given = {"checkpoint": str(path), "data": str(data), "out": str(tmp_path / "out")} | arguments
    if not given["checkpoint"]:
        del given["checkpoint"]
    if given["data"] == "EMPTY":
        given["data"] = str(tmp_path / "empty.jsonl")
    assert run(lambda: evaluate(**given)) == 1
    assert message in capsys.readouterr().err


def test_the_command_says_what_came_out(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = trained
    given: dict[str, Any] = {
        "checkpoint": str(path),
        "data": str(data),
        "out": str(tmp_path / "out"),
    }
    given |= {"tasks": "position", "arms": "on,off", "bin_sec": "0.8", "limit": "2"}
    assert run(lambda: evaluate(**given)) == 0
    printed = capsys.readouterr().out
    assert "- TTT on, compared with off" in printed and "report.html" in printed


def test_results_that_never_came_stand_in_nobodys_way(tmp_path: Path) -> None:
    """An evaluation that ran out of memory at once goes on with another batch size."""
    path = tmp_path / "health.jsonl"
    Records(path, {"batch_size": 4})
    Records(path, {"batch_size": 2}).append({"index": 0})
    assert [record["index"] for record in Records(path, {"batch_size": 2})] == [0]
    with pytest.raises(UserError, match="batch_size was 2, is 1"):
        Records(path, {"batch_size": 1})
    path.write_text('{"notes": "mine"}\n')
    with pytest.raises(UserError, match="it does not say which"):
        Records(path, {"batch_size": 1})


@pytest.mark.parametrize(
    ("where", "sizes", "ways"),
    [
        ("finetune.evaluation.streaming.Scorer.score", {}, ["batch_size (now 2)"]),
        ("finetune.evaluation.bench.load_for_inference", {"batch_size": 1}, []),
    ],
)
def test_memory_that_is_too_small_is_one_message(
    trained: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    sizes: Any,
    ways: Any,
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(where, too_large)
    assert run(lambda: evaluate_checkpoint(options(trained, tmp_path / "out", **sizes))) == 1
    message = capsys.readouterr().err
    assert "error: The GPU ran out of memory" in message
    expected = [f"a smaller --{way}" for way in [*ways, "block_frames (now 7)"]]
    assert f"Less memory takes: {'; '.join(expected)}; --device cpu" in message
