"""Presets of the spoken experiment name what is compared, and at which sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from finetune.recall.arms import ARMS
from finetune.recall.model import ModelArgs
from finetune.spoken import (
    NUM_CODEBOOKS,
    VOCAB_SIZE,
    BankArgs,
    Dataset,
    DatasetArgs,
    DialogueArgs,
    EncodedDialogues,
)
from ttt import TTTArgs


@dataclass(frozen=True)
class SpokenStreams:
    """The streams of encoded dialogues."""

    text_card: int = VOCAB_SIZE
    card: int = 256
    num_codebooks: int = 2 * NUM_CODEBOOKS

    @property
    def fact_streams(self) -> set[int]:
        return {0}


@dataclass(frozen=True)
class Stage:
    """Steps of training on talks of one length; the fields are those of `SpokenPreset`."""

    dialogues: EncodedDialogues
    num_steps: int
    batch_size: int
    audio_rows: int


@dataclass(frozen=True)
class SpokenPreset:
    """An experiment of one size.

    Args:
        ttt: options of `TTTArgs` that all arms with TTT share.
        finetune_steps: of the arms that start from the trained model without TTT.
        long_share: of the steps, every other one of the last, whose talks are `data.long_times` as
            long, and so many times fewer in a batch. What is told has to outlast more of what is
            said after it. After long talks alone, a model no longer answers in others.
        answer_weight: of the mean loss of the values that answer questions, beside the text's.
        repeat_weight: of the mean loss of the values that Moshi repeats as they are told: what it
            repeats wrongly when it speaks on its own, it believes itself.
        acknowledgment_weight: of the words that Moshi first says to a fact, "Okay" or "I see", and
            of what ends them: whether it repeats the fact is said there.
        emphasis: weight of names and values in the text; other words have 1, padding 0.2.
        audio_weight: of the audio's loss.
        audio_rows: dialogues of a batch that the depth transformer learns from: it takes most
            of a step, and needs the fewest.
        num_free: dialogues that Moshi speaks in on its own.
    """

    data: DatasetArgs
    model: ModelArgs
    arms: tuple[str, ...]
    ttt: dict[str, Any]
    chunk_size: int
    mini_batch_size: int
    num_steps: int
    finetune_steps: int
    batch_size: int
    audio_rows: int
    num_free: int
    lr: float = 1e-3
    ttt_lr: float = 2e-3
    mixer_lr: float = 6e-3
    pct_start: float = 0.05
    long_share: float = 0.15
    answer_weight: float = 1.0
    repeat_weight: float = 1.0
    acknowledgment_weight: float = 1.0
    emphasis: float = 3.0
    text_padding_weight: float = 0.2
    audio_weight: float = 0.3
    first_codebook_weight: float = 4.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False

    @property
    def streams(self) -> SpokenStreams:
        return SpokenStreams()

    def ttt_args(self, name: str) -> TTTArgs:
        """The TTT of the arm `name`."""
        return ARMS[name].ttt_args(
            self.ttt,
            chunk_size=self.chunk_size,
            mini_batch_size=self.mini_batch_size,
        )

    def context(self, name: str) -> int:
        """Frames that attention sees in the arm `name`."""
        full = ARMS[name].is_full_attention
        return self.data.dialogues.num_frames if full else self.model.context

    def stages(self, name: str, dataset: Dataset) -> list[Stage]:
        """Return what the arm `name` trains on, in the order of `schedule`. Full attention, which
        sees a window of the shorter talks, has them alone."""
        times = self.data.long_times
        num_steps = self.finetune_steps if ARMS[name].is_finetuned else self.num_steps
        num_long = 0 if ARMS[name].is_full_attention else round(self.long_share * num_steps)
        short = dataset.load("train")
        found = [Stage(short, num_steps - num_long, self.batch_size, self.audio_rows)]
        if num_long:
            batch_size, audio_rows = self.batch_size // times, self.audio_rows // times
            found.append(
                Stage(dataset.load("long"), num_long, max(1, batch_size), max(1, audio_rows))
            )
        return found

    def longer(self, name: str) -> dict[int, int]:
        """Return the lengths of talks that the arm `name` is measured on, as multiples of the
        trained one, and how many talks of each."""
        return {} if ARMS[name].is_full_attention else self.data.lengths


def preset(name: Literal["cpu", "gpu"]) -> SpokenPreset:
    """`gpu`: 7 million parameters, talks of 64 s. `cpu`: 1.8 million, one voice, one kind."""
    if name == "gpu":
        model = ModelArgs(width=256, num_layers=6, num_heads=4, context=25, depformer_width=64)
        return SpokenPreset(
            DatasetArgs(dialogues=DialogueArgs(reach_frames=model.reach_frames), pauses=True),
            model,
            arms=(
                "off", "delta_hidden", "delta_input", "delta", "sum_hidden", "sum_input", "sum",
                "linear", "mlp", "full", "finetuned_hidden", "retrained",
            ),
            ttt={"start_layer": 1, "layer_frequency": 2},
            chunk_size=32,
            mini_batch_size=16,
            num_steps=3600,
            finetune_steps=1200,
            batch_size=32,
            audio_rows=8,
            num_free=96,
            dtype="bfloat16",
        )  # fmt: skip
    model = ModelArgs(width=128, num_layers=4, num_heads=4, context=16, depformer_width=32)
    return SpokenPreset(
        DatasetArgs(
            BankArgs(num_voices=1, kinds=("thing",), num_fillers=(60, 30)),
            DialogueArgs(num_frames=400, num_facts=3, reach_frames=model.reach_frames),
            num_spoken=300,
            num_train=6000,
            num_long=600,
            num_eval=64,
            lengths={4: 8},
        ),
        model,
        arms=("off", "delta_hidden"),
        ttt={"start_layer": 1, "layer_frequency": 2},
        chunk_size=16,
        mini_batch_size=16,
        num_steps=600,
        finetune_steps=600,
        batch_size=8,
        audio_rows=2,
        num_free=8,
    )
