"""Loss by position, slopes, intervals and conclusions come out as they are known to be."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DELAYS, random_codes, tiny_model
from test_evaluation_streaming import InMemory

from finetune.evaluation.bin_sums import BinSums
from finetune.evaluation.streaming import Scorer
from finetune.evaluation.streams import STREAMS
from finetune.evaluation.tasks import TASKS
from finetune.evaluation.tasks.position.summary import pairwise_edges, summarize_positions
from finetune.statistics import Bootstrap, proportion, slope_parts, student_t
from finetune.step import LossWeights
from ttt import TTTArgs, block_streaming

CARD, TEXT_CARD = 20, 30


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
        # 3.2 s beyond the window say nothing of an hour.
        assert off[stream]["slope_per_hour_beyond_window"]["value"] is None
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


def slopes(durations_sec: Sequence[float], *, window_sec: float = 8.0) -> tuple[Any, Any]:
    """The slopes, per doubling and per hour, of recordings whose loss rises by 0.6 nats an hour."""
    records = []
    for index, duration_sec in enumerate(durations_sec):
        num_bins = math.ceil(duration_sec / 10)
        loss = [3.0 + index + 0.6 * (bin + 0.5) * 10 / 3600 for bin in range(num_bins)]
        sums = {"loss": loss, "weight": [1.0] * num_bins}
        num_frames = round(duration_sec * 12.5)
        streams = dict.fromkeys(STREAMS, sums)
        record = {"arm": "on", "recording": str(index), "num_frames": num_frames}
        records += [record | {"streams": streams, "arm": arm} for arm in ("on", "off")]
    window_frames = round(window_sec * 12.5)
    found = summarize_positions(records, bin_frames=125, window_frames=window_frames, vocabulary={})
    on, (difference,) = found["arms"]["on"]["text"], found["differences"]
    for name in ("slope_per_doubling", "slope_per_hour_beyond_window"):
        # A difference has a slope wherever its arms have one.
        assert (on[name]["value"] is None) == (difference["text"][name]["value"] is None)
    return on["slope_per_doubling"], on["slope_per_hour_beyond_window"]


def test_slopes_are_of_recordings_that_are_long_enough_for_one() -> None:
    per_doubling, per_hour = slopes([24.0] * 4)
    assert per_doubling["count"] == 4 and per_hour["value"] is None
    # Two bins are no two doublings, and five minutes beyond the window no tenth of an hour.
    per_doubling, per_hour = slopes([20.0] * 3 + [310.0] * 3)
    assert (per_doubling["count"], per_hour["value"]) == (3, None)
    # The short one counts for no slope, and 370 s are six minutes beyond a window of 8 s.
    per_doubling, per_hour = slopes([20.0, 370.0, 370.0, 1800.0])
    assert (per_doubling["count"], per_hour["count"]) == (3, 3)
    assert per_hour["value"] == pytest.approx(0.6) and per_hour["low"] == pytest.approx(0.6)
    assert slopes([370.0] * 3, window_sec=30)[1]["value"] is None


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


def estimate(value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "count": 20}


def sentences_of(*compared: tuple[list[str], Any], baseline: Any = None) -> list[str]:
    """What is concluded of pairs of arms, each with an estimate of every stream."""
    differences = [
        {"arms": arms} | {s: {"beyond_window": e} for s, e in zip(STREAMS, estimates, strict=True)}
        for arms, estimates in compared
    ]
    place: dict[str, Any] = {"longest_sec": 600, "attention_window_sec": 240}
    place |= {"num_recordings": 20, "ttt_wrote": True, "warnings": [], "differences": differences}
    place |= {"baseline": baseline}
    return list(TASKS["position"].sentences(place))


def test_conclusions_say_no_more_than_the_intervals() -> None:
    def sentences(arms: Any, *estimates: Any) -> list[str]:
        return sentences_of((arms, estimates))

    better, worse = estimate(-0.02, -0.03, -0.01), estimate(0.02, 0.01, 0.03)
    unsure, tiny = estimate(-0.02, -0.05, 0.01), estimate(2e-5, 1e-5, 3e-5)
    short, sentence = sentences(["on", "off"], better, worse, unsure, tiny)
    assert "is better (text, with padding), and worse (text, words only), compared with" in short
    assert "better: text, with padding −0.0200 [−0.0300, −0.0100]; worse: text, words" in sentence
    assert "no difference shown: first codebook −0.0200" in sentence
    assert len(sentences(["on", "carried"], better, tiny, unsure, tiny)) == 1
    assert sentences(["on", "carried"], better, worse, unsure, tiny)[1].startswith("Warning")
    # One of four streams by a hair is what chance would show.
    barely = estimate(0.02, 0.001, 0.039)
    of_barely = sentences(["on", "carried"], barely, *[unsure] * 3)
    assert "worse: text, with padding" in of_barely[-1]
    assert not any("another recording's state helps" in each for each in of_barely)
    alone = estimate(-0.5, None, None)
    # Of too few, nothing is said that reads like a result.
    (short, sentence) = sentences(["on", "off"], alone, alone, alone, unsure)
    assert "is not shown to be better or worse than itself with TTT off" in short
    few = "too few recordings to show any difference (at least 3 are needed): text, with padding"
    assert f"{few} −0.5000, text, words" in sentence and "better" not in sentence
    assert "no difference shown: other codebooks −0.0200" in sentence


@pytest.mark.parametrize(
    ("of_each", "answer"),
    [
        ((-0.02, -0.03, -0.01), ": this checkpoint is better (text, with padding; text, words"),
        ((0.02, 0.01, 0.03), ": this checkpoint is worse (text, with padding; text, words only"),
        (
            (-0.02, -0.05, 0.01),
            ": this checkpoint is not shown to be better or worse than the base",
        ),
        # A hair's breadth in one of four streams is what chance shows.
        ((-0.02, -0.039, -0.001), "is not shown to be better or worse than the baseline."),
        ((-0.02, None, None), "too few recordings to show any difference"),
    ],
)
def test_first_of_all_it_is_said_whether_ttt_helps(of_each: Any, answer: str) -> None:
    """The control is asked, where there is one."""
    estimates = [estimate(*of_each)] * 4
    opposite = [estimate(0.5, 0.4, 0.6)] * 4
    first, *_ = sentences_of((["on", "off"], opposite), (["on", "baseline"], estimates))
    assert first.startswith("In short") and answer in first and "--baseline" not in first
    first, *_ = sentences_of((["on", "off"], estimates))
    assert ("a control can tell that was trained alike" in first) == (of_each[1] is not None)


@pytest.mark.parametrize(
    ("found", "reservation"),
    [
        ({"of_ttt": [("ttt.enabled", "true", "false")], "beyond": []}, ""),
        (
            {
                "of_ttt": [],
                "beyond": [("optim.lr", "1", "2"), ("step of the checkpoint", "4", "3")],
            },
            "; they differ in more than TTT, so this need not be due to TTT (optim.lr, step of the "
            "checkpoint)",
        ),
        (
            {"unknown": "it is a stock Moshi"},
            "; how the two were trained cannot be compared, so this need not be due to TTT",
        ),
        ({"is_same": True}, ", which is this checkpoint itself"),
    ],
)
@pytest.mark.parametrize(("high", "verdict"), [(-0.01, "is better ("), (0.01, "is not shown to")])
def test_what_is_not_of_ttt_alone_is_said_with_the_answer(
    found: Any, reservation: str, high: float, verdict: str
) -> None:
    """The answer stands first, and may be all that is read."""
    baseline = {"name": "control", "ttt": "no TTT", "is_same": False} | found
    estimates = [estimate(-0.02, -0.03, high)] * 4
    first, second, *_ = sentences_of((["on", "baseline"], estimates), baseline=baseline)
    assert first.startswith("In short") and verdict in first
    assert first.endswith(f" the baseline{reservation}.")
    assert second.startswith("Warning") == bool(reservation)


@pytest.mark.parametrize(
    ("num_right", "num_pairs", "verdict"),
    [
        (2, 2, "too few pairs to tell that from chance"),
        (3, 3, "too few pairs to tell that from chance"),
        (4, 4, "better than chance"),
        (0, 4, "worse than chance"),
        (3, 4, "not shown to differ from chance"),
    ],
)
def test_of_pairs_that_could_show_nothing_it_is_said(
    num_right: int, num_pairs: int, verdict: str
) -> None:
    accuracy = dataclasses.asdict(proportion(num_right, num_pairs))
    found = {"all": {"accuracy": accuracy, "num_scored": num_pairs}, "num_missing": 0}
    (sentence,) = TASKS["pairs"].sentences(found)
    assert sentence.endswith(f": {verdict}.")


def test_what_another_recordings_state_does_as_well_is_not_about_the_recording() -> None:
    """It is said before anything is called better."""
    better, unsure = estimate(-0.02, -0.03, -0.01), estimate(-0.005, -0.02, 0.01)
    worse, alone = estimate(0.02, 0.01, 0.03), estimate(-0.02, None, None)
    text = "what TTT learns here is not about the recording"

    def said(on_off: Any, on_carried: Any) -> list[str]:
        return sentences_of((["on", "off"], on_off), (["on", "carried"], on_carried))

    first, _, second, *_ = said([better] * 4, [unsure] * 4)
    assert first.startswith("Warning: TTT on is no better than with another") and text in first
    assert "TTT on, compared with off" in second
    assert text in said([better] * 4, [worse] * 4)[0]
    # Where it is better in a stream that TTT makes better, that is about the recording.
    assert not any(text in each for each in said([better] * 4, [better, *[unsure] * 3]))
    # In another stream it shows nothing of what TTT brings.
    assert text in said([better, *[unsure] * 3], [unsure, better, unsure, unsure])[0]
    # Two recordings show nothing.
    assert not any(text in each for each in said([alone] * 4, [alone] * 4))


def test_of_ttt_that_makes_nothing_better_no_gain_is_spoken_of() -> None:
    """What it learns need not be of the recording to be of no use, and there is no gain to have."""
    better, unsure = [estimate(-0.02, -0.03, -0.01)] * 4, [estimate(-0.005, -0.02, 0.01)] * 4
    worse = [estimate(0.02, 0.01, 0.03)] * 4
    on_off, carried_off, on_carried = ["on", "off"], ["carried", "off"], ["on", "carried"]
    no_memory, helps = "is not about the recording (", "starting from another recording's state"

    def warned(*compared: tuple[list[str], Any]) -> list[str]:
        text = " ".join(each for each in sentences_of(*compared) if each.startswith("Warning"))
        return [each for each in (no_memory, helps) if each in text]

    for nothing in (unsure, worse):
        assert not warned((on_off, nothing), (on_carried, unsure))
        # It harms less with the other state, and still does not help.
        assert not warned((on_off, nothing), (carried_off, nothing), (on_carried, worse))
        # The other recording's state alone brings something.
        assert warned((on_off, nothing), (carried_off, better), (on_carried, worse)) == [helps]
    assert warned((on_off, better), (carried_off, better), (on_carried, worse)) == [
        no_memory,
        helps,
    ]
    assert warned((on_off, better), (on_carried, unsure)) == [no_memory]
    # The one stream that is better is not the one of the gain.
    first, second = [better[0], *unsure[1:]], [unsure[0], worse[0], *unsure[2:]]
    assert warned((on_off, first), (on_carried, second)) == [no_memory]
    # What was not measured is not ruled out.
    assert warned((on_carried, worse)) == [no_memory, helps]


def test_a_conclusion_is_of_what_was_measured() -> None:
    """A window of 100 frames, recordings of 120 and bins of 125: no bin is beyond the window."""
    nothing: dict[str, Any] = {"value": None, "low": None, "high": None, "count": 0}
    better: dict[str, Any] = {"value": -0.02, "low": -0.03, "high": -0.01, "count": 20}
    position: dict[str, Any] = {"longest_sec": 9.6, "attention_window_sec": 8.0}
    position |= {"num_recordings": 20, "ttt_wrote": True, "warnings": []}
    of_all = [
        "In short (no bin is beyond the attention window), of all four streams together",
        "(no bin is beyond the attention window), in nats: better: text",
    ]
    for mean, sentences in ((better, of_all), (nothing, [])):
        places = {stream: {"mean": mean, "beyond_window": nothing} for stream in STREAMS}
        position["differences"] = [{"arms": ["on", "off"], **places}]
        found = list(TASKS["position"].sentences(position))
        assert len(found) == len(sentences)
        assert all(part in sentence for part, sentence in zip(sentences, found, strict=True))
