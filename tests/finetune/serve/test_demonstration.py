"""The demonstration's model, streamed by the engine, is what it was in training."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moshi.models import lm
from training_tools import checkpoint, train

import ttt
from finetune.data import Segment
from finetune.data.codec import Codec
from finetune.inference import load_for_inference
from finetune.serve import open_engine
from ttt import TTTLMModel

ROOT = Path(__file__).parents[3]
DIALOGUES = ROOT / "example/demo/dialogues"
NUM_FRAMES = 130
"""More than the 100 that attention sees, and five chunks of 25."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TTTLMModel, Codec]:
    """A few steps of `example/demo.yaml`; then the memory is made to matter more."""
    run_dir = tmp_path_factory.mktemp("demonstration") / "run"
    few = {"max_steps": 2, "batch_size": 1, "duration_sec": 4, "do_eval": False, "ckpt_freq": 2}
    data = {
        "data.train_data": str(DIALOGUES / "train.jsonl"),
        "data.eval_data": str(DIALOGUES / "eval.jsonl"),
        "data.cache_dir": None,
        "data.num_workers": 0,
        "moshi_paths.hf_repo_id": str(ROOT / "example/demo/model"),
    }
    train(ROOT / "example/demo.yaml", run_dir, few | data)
    model, codec = load_for_inference(checkpoint(run_dir, 2), "cpu")
    assert model.dtype == torch.float32 and list(model.ttt_layers) == [1, 3]
    torch.manual_seed(0)
    for module in model.ttt_layers.values():
        torch.nn.init.normal_(module.ttt_parameters()["target_conv"], std=0.3)
        module.ttt_parameters()["target_gate"].data.fill_(0.1)
    return model, codec


def test_the_engine_computes_what_training_computes(
    trained: tuple[TTTLMModel, Codec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text and audio logits, in two rows: one joins later, and each waits now and then."""
    model, codec = trained
    parts = [codec.read_recording(DIALOGUES / f"{n}_000.wav") for n in ("eval", "train")]
    parts.append(codec.read_recording(DIALOGUES / "train_001.wav"))
    dialogues = [joined(parts), joined(parts[::-1])]
    own = [codec.encode([each])[0, : 1 + model.dep_q] for each in dialogues]
    voices = [each.audio[1].reshape(-1, 1920).numpy() for each in dialogues]
    forced = Forced(model, own)
    monkeypatch.setattr(lm, "sample_token", forced.sample)

    rng = np.random.default_rng(0)
    heard = [0, 0]
    with open_engine(model, codec, max_users=2) as engine:
        forced.record(engine)
        rows = [engine.join()]
        while min(heard) < NUM_FRAMES:
            if heard[0] == 37 and len(rows) == 1:
                rows.append(engine.join())
            talking = [i for i in range(len(rows)) if heard[i] < NUM_FRAMES and rng.random() < 0.9]
            if talking:
                engine.step({i: voices[i][heard[i]] for i in talking})
            for i in talking:
                heard[i] += 1

    for row in range(2):
        user = torch.stack(forced.user[row][1:], dim=1)
        said = torch.cat([own[row], user])[None]
        with torch.no_grad():
            expected = model(said)
            with ttt.without_ttt(model):
                without = model(said)
        text = torch.stack(forced.text[row][:NUM_FRAMES])
        torch.testing.assert_close(text, expected.text_logits[0, 0], atol=2e-4, rtol=0)
        assert (text - without.text_logits[0, 0])[100:].abs().max() > 0.05
        for codebook in range(model.dep_q):
            delay = model.delays[1 + codebook]
            audio = torch.stack(forced.audio[row][codebook][delay:NUM_FRAMES])
            valid = expected.mask[0, codebook, : len(audio)]
            assert valid.all()
            there = expected.logits[0, codebook, : len(audio)]
            torch.testing.assert_close(audio, there, atol=2e-4, rtol=0)


def joined(segments: list[Segment]) -> Segment:
    """One dialogue of `NUM_FRAMES`, of several that follow one another."""
    frames = [each.audio.shape[1] // 1920 for each in segments]
    audio = [each.audio[:, : n * 1920] for each, n in zip(segments, frames, strict=True)]
    text = [each.text_tokens[:n] for each, n in zip(segments, frames, strict=True)]
    return dataclasses.replace(
        segments[0],
        audio=torch.cat(audio, dim=1)[:, : NUM_FRAMES * 1920],
        text_tokens=torch.cat(text)[:NUM_FRAMES],
        num_frames=NUM_FRAMES,
    )


class Forced:
    """Stands in for sampling: the model says what a dialogue does, and its logits are noted.

    Args:
        own: what each row says, [1 + dep_q, T].
    """

    def __init__(self, model: TTTLMModel, own: list[torch.Tensor]) -> None:
        self.delays = model.delays
        self.own = own
        self.text: list[list[torch.Tensor]] = [[] for _ in own]
        self.audio: list[list[list[torch.Tensor]]] = [[[] for _ in range(model.dep_q)] for _ in own]
        self.user: list[list[torch.Tensor]] = [[] for _ in own]
        self.steps = [0] * len(own)
        self.active: list[bool] = []
        self.stream = 0

    def record(self, engine: Any) -> None:
        step: Callable[..., Any] = engine.generator.step

        def recorded(codes: torch.Tensor) -> Any:
            self.active = engine.generator._streaming_state.exec_mask.tolist()
            self.stream = 0
            out = step(codes)
            for row in self.rows():
                self.user[row].append(codes[row, :, 0])
                self.steps[row] += 1
            return out

        engine.generator.step = recorded

    def rows(self) -> list[int]:
        return [row for row, is_active in enumerate(self.active) if is_active]

    def sample(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        """Called for the text, then for each codebook: logits [B, 1, 1, card]."""
        tokens = logits.new_zeros(len(logits), 1, 1, dtype=torch.long)
        for row in self.rows():
            noted = self.text if self.stream == 0 else None
            into = noted[row] if noted else self.audio[row][self.stream - 1]
            into.append(logits[row, 0, 0].clone())
            frame = self.steps[row] - self.delays[self.stream]
            if 0 <= frame < NUM_FRAMES:
                tokens[row] = self.own[row][self.stream, frame]
        self.stream += 1
        return tokens
