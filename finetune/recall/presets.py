"""Presets name what is compared, and at which sizes."""

from dataclasses import dataclass
from typing import Any, Literal

from finetune.recall.arms import ARMS
from finetune.recall.model import ModelArgs
from finetune.recall.streams import StreamArgs
from ttt import TTTArgs


@dataclass(frozen=True)
class Preset:
    """An experiment of one size.

    Args:
        arms: names in `ARMS`.
        ttt: options of `TTTArgs` that all arms with TTT share; `chunk_size`, `mini_batch_size` and
            `mixer_heads` are for those whose method reads them.
        num_eval: sequences of the trained length to evaluate on.
        lengths: how many times longer sequences are, and how many of each kind.
        mixer_heads: `num_heads` of TTT; None: as many as attention has. A head's fast
            weights are as large as it is wide, and small models have narrow heads.
    """

    streams: StreamArgs
    model: ModelArgs
    arms: tuple[str, ...]
    ttt: dict[str, Any]
    chunk_size: int
    mini_batch_size: int
    num_steps: int
    batch_size: int
    num_eval: int
    lengths: dict[int, int]
    lr: float = 2e-3
    ttt_lr: float = 2e-3
    mixer_lr: float = 6e-3
    pct_start: float = 0.05
    mixer_heads: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def ttt_args(self, name: str) -> TTTArgs:
        """The TTT of the arm `name`."""
        return ARMS[name].ttt_args(
            self.ttt,
            chunk_size=self.chunk_size,
            mini_batch_size=self.mini_batch_size,
            num_heads=self.mixer_heads,
        )

    def context(self, name: str) -> int:
        """Frames that attention sees in the arm `name`."""
        full = ARMS[name].is_full_attention
        return self.streams.num_frames if full else self.model.context

    def longer(self, name: str) -> dict[int, int]:
        """The `lengths` that the arm `name` is measured at: none with full attention, whose window
        is the trained length, so that it is but another windowed model on longer sequences."""
        return {} if ARMS[name].is_full_attention else self.lengths


def _sized(model: ModelArgs, **options: Any) -> tuple[ModelArgs, StreamArgs]:
    return model, StreamArgs(reach_frames=model.reach_frames, **options)


def preset(name: Literal["cpu", "gpu"], *, variant: str = "text") -> Preset:
    """`cpu`: 0.3 million parameters, ten minutes on two cores. `gpu`: 64 million, sequences 32
    times longer than the window."""
    options: dict[str, Any] = {"variant": variant}
    if name == "cpu":
        model, streams = _sized(ModelArgs(), **options)
        return Preset(
            streams,
            model,
            arms=tuple(name for name, arm in ARMS.items() if not arm.is_finetuned),
            ttt={"start_layer": 0, "layer_frequency": 1},
            chunk_size=16,
            mini_batch_size=16,
            num_steps=400,
            batch_size=8,
            num_eval=128,
            lengths={4: 16, 16: 8, 64: 2},
            pct_start=0.3,
            mixer_heads=1,
        )
    model, streams = _sized(
        ModelArgs(width=768, num_layers=8, num_heads=12, context=32, depformer_width=128),
        num_frames=1024,
        num_pairs=24,
        num_keys=256,
        num_values=64,
        num_fillers=256,
        **options,
    )
    return Preset(
        streams,
        model,
        arms=tuple(ARMS),
        ttt={"start_layer": 1, "layer_frequency": 3},
        chunk_size=64,
        mini_batch_size=16,
        num_steps=900,
        batch_size=8,
        num_eval=64,
        lengths={4: 4, 16: 2},
        lr=5e-4,
        ttt_lr=2e-3,
        mixer_lr=6.7e-4,
        pct_start=0.1,
        dtype="bfloat16",
    )
