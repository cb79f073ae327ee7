"""Options of `moshi-ttt generate`, `moshi-ttt serve` and `moshi-ttt export`."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import AfterValidator

from finetune.config import (
    AUDIO,
    CHECKPOINT,
    FOLDER,
    POSITIONAL,
    WRITABLE,
    WRITABLE_FOLDER,
    FilePath,
    Precision,
    Seed,
    Size,
)
from finetune.errors import UserError
from finetune.kept import Output
from ttt.options import NonNegative, abbreviated

FRAMES_PER_SEC = 12.5


def _valid_use(text: str) -> str:
    if text not in ("on", "off"):
        kind, _, seconds = text.partition(":")
        try:
            number = float(seconds)
        except ValueError:
            number = math.nan
        if kind != "reset" or not 0.08 <= number <= 1e6:
            raise ValueError(
                f"must be on, off or reset:SECONDS, as in reset:60; got {abbreviated(text)}"
            )
    return text


def _plain_name(text: str) -> str:
    if not text or Path(text).name != text:
        raise ValueError(f"must be a file's name without a folder, got {abbreviated(text)}")
    if any(sign in text for sign in "*?["):
        raise ValueError(f"must be a name, not a pattern (*, ? or [), got {abbreviated(text)}")
    return text


TTTUse = Annotated[str, AfterValidator(_valid_use)]
FileName = Annotated[str, AfterValidator(_plain_name)]
Device = Literal["auto", "cpu", "cuda"]
Part = Literal["all", "memory"]


def reset_every_frames(use: str) -> int | None:
    """Return after how many frames `--ttt reset:SECONDS` resets; None: never."""
    if not use.startswith("reset:"):
        return None
    return max(1, round(float(use.removeprefix("reset:")) * FRAMES_PER_SEC))


@dataclass(frozen=True)
class GenerateOptions:
    checkpoint: Annotated[FilePath, POSITIONAL, CHECKPOINT]
    """A folder run_dir/checkpoints/checkpoint_NNNNNN, or of a stock Moshi."""

    audio: Annotated[FilePath | None, AUDIO] = None
    """A recording of what the user says, mono or stereo, of any usual rate; or a folder of such, at
    any depth."""

    input_dir: Annotated[FilePath | None, FOLDER] = None
    """Instead of --audio: a tree, in which every file called --input_name is answered where it
    is."""

    input_name: FileName = "input.wav"
    """The files of --input_dir to answer."""

    output_name: FileName = "output.wav"
    """What the answers in --input_dir are called."""

    out: Annotated[FilePath | None, WRITABLE] = None
    """The wav to write, or for a folder the folder to write to; null: output.wav, or output."""

    overwrite: bool = False
    """Replace answers that are there."""

    missing: bool = False
    """Keep answers that are there, and answer the other recordings alone."""

    stereo: bool = False
    """Write both: left Moshi, right the user."""

    user_channel: Literal["right", "left", "mix"] = "right"
    """What the user says of a stereo recording; the rest is not heard."""

    prompt_sec: Annotated[float, Ge(0), Le(86_400)] = 0.0
    """Continue a stereo dialogue, left Moshi, right the user: seconds in which Moshi says what it
    says in the recording; with a transcript (.json) beside it, the prompt has its words."""

    ttt: TTTUse = "on"
    """on; off: as if the model had no TTT; reset:SECONDS: TTT forgets that often."""

    session: FilePath | None = None
    """Go on from this file if it is there, and keep in it where the conversation ends."""

    session_part: Part = "all"
    """What is kept: all, so that the conversation goes on exactly; or only what TTT has learned."""

    report: Annotated[FilePath | None, WRITABLE_FOLDER] = None
    """The folder to write a report to: what TTT does, per layer and chunk, beside the words."""

    batch_size: Size = 8
    """Recordings side by side."""

    seed: Seed = 0
    """Seed of the sampling."""

    temperature: NonNegative = 0.8
    """Temperature of the audio; 0 always takes the likeliest code."""

    text_temperature: NonNegative = 0.7
    """Temperature of the text."""

    base_precision: Precision | None = None
    """How the weights of the base are kept: bfloat16, float8 or nf4; null: as in training."""

    device: Device = "auto"
    """Where to compute; `auto`: on the GPU if there is one."""

    def check(self) -> None:
        """Check the options against one another.

        Raises:
            UserError: options that exclude or lack one another.
        """
        if (self.audio is None) == (self.input_dir is None):
            raise UserError("--audio: give a recording or a folder, or a tree by --input_dir.")
        if self.input_dir is not None and self.out is not None:
            raise UserError("--out: with --input_dir the answers are beside the inputs; drop it.")
        if self.input_dir is None:
            self._refuse_given("input_name", "output_name", why="without --input_dir")
        if self.session is None:
            self._refuse_given("session_part", why="without --session")
        if self.missing and self.overwrite:
            raise UserError("--missing: it keeps the answers that --overwrite replaces; drop one.")
        if self.input_name == self.output_name:
            raise UserError(f"--output_name: {self.output_name} is the input; choose another name.")
        if not self.output_name.endswith(".wav"):
            raise UserError(f"--output_name: {self.output_name} must end in .wav.")
        if not self.prompt_sec:
            return
        # It takes one recording, hears the right channel, writes both, and uses TTT throughout.
        unread = "input_dir", "session", "report", "user_channel", "stereo", "batch_size", "ttt"
        self._refuse_given(*unread, "missing", why="with --prompt_sec")

    def outputs(self) -> list[Output]:
        """Return what is known before recordings are looked for: not the answers."""
        if self.report is None:
            return []
        names = "report.json", "report.html"
        return [Output(self.report / name, "--report", "generate") for name in names]

    def _refuse_given(self, *names: str, why: str) -> None:
        """Refuse options that nothing would read.

        Raises:
            UserError: one of them differs from its default.
        """
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"--{name}: means nothing {why}; drop it.")


@dataclass(frozen=True)
class ServeOptions:
    checkpoint: Annotated[FilePath, POSITIONAL, CHECKPOINT]
    """A folder run_dir/checkpoints/checkpoint_NNNNNN, or of a stock Moshi."""

    host: str = "127.0.0.1"
    """The address to listen on; any but this machine's own needs --token."""

    port: Annotated[int, Ge(0), Le(65_535)] = 8998
    """The port to listen on; 0: any that is free."""

    token: str | None = None
    """What callers must know: `Authorization: Bearer TOKEN`, or `?token=TOKEN`. Better given in the
    environment, as MOSHI_TTT_TOKEN: a command line can be read by others."""

    max_users: Annotated[int, Ge(1), Le(1024)] = 1
    """Callers at once; each takes memory, used or not."""

    on_late: Literal["pause", "silence"] = "pause"
    """What happens when a caller's audio is late: the conversation waits, or Moshi hears
    silence."""

    ttt: TTTUse = "on"
    """on; off: as if the model had no TTT; reset:SECONDS: TTT forgets that often."""

    drain_sec: Annotated[float, Ge(0), Le(86_400)] = 30.0
    """How long calls may go on after SIGTERM."""

    seed: Seed = 0
    """Seed of the sampling."""

    temperature: NonNegative = 0.8
    """Temperature of the audio; 0 always takes the likeliest code."""

    text_temperature: NonNegative = 0.7
    """Temperature of the text."""

    base_precision: Precision | None = None
    """How the weights of the base are kept: bfloat16, float8 or nf4; null: as in training."""

    device: Device = "auto"
    """Where to compute; `auto`: on the GPU if there is one."""


@dataclass(frozen=True)
class ExportOptions:
    checkpoint: Annotated[FilePath, POSITIONAL, CHECKPOINT]
    """A folder run_dir/checkpoints/checkpoint_NNNNNN."""

    out: Annotated[FilePath, WRITABLE_FOLDER]
    """The folder to write to; new or empty."""

    form: Literal["merged", "adapters"] = "merged"
    """merged: all weights, LoRA merged into them; adapters: LoRA alone, for the base model."""

    push: str | None = None
    """Then upload it to this repository of the Hugging Face hub: a private one, made if there is
    none."""

    device: Device = "auto"
    """Where to compute; `auto`: on the GPU if there is one."""
