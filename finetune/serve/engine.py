"""Moshi listens and speaks in several conversations at once, a frame of each at a time.

Every conversation is a row of one batch, with its own fast weights, attention caches and Mimi. Rows
come, go, wait and forget by masks; what one row computes does not depend on the others.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import ttt
from finetune.data import Codec
from finetune.inference import SteadyLMGen, check_attention_window
from ttt import TTTLMModel

Samples = np.ndarray
"""Mono audio at Mimi's rate, float32."""


@dataclass
class Spoken:
    """Moshi's text and audio of one frame."""

    text_token: int
    audio: Samples
    """[frame_samples]; nothing if the engine is open for text alone."""
    healthy: bool = True
    """True if all that the model computed for the row was finite. A row that is not stays so until
    it is restarted."""


@dataclass
class Row:
    """A row is one conversation's place in the batch."""

    index: int
    taken: bool = False
    num_steps: int = 0
    """Steps of the model since the row began; the first hears nothing."""
    num_frames: int = 0
    """Frames heard."""
    ttt_on: bool = True
    reset_every_frames: int | None = None
    """TTT forgets each time after so many frames; None: never."""
    begin_frame: int = 0
    """Frame of the callers' clock in which the conversation should begin; see `Engine.join`."""


@dataclass
class Engine:
    """Rows of one batch. Not for several threads at once.

    Use `open_engine`: while it is open, model and Mimi stream and nobody else may use them.
    """

    model: TTTLMModel
    codec: Codec
    generator: SteadyLMGen
    rows: list[Row] = field(default_factory=list)
    has_voice: bool = True
    _start_norms: dict[int, Tensor] = field(default_factory=dict)
    """By TTT layer; the weights stand still while the engine is open."""

    @property
    def frame_samples(self) -> int:
        return int(self.codec.mimi.frame_size)

    @property
    def lag_frames(self) -> int:
        """Return how many frames of a conversation go in before the first comes out: 0 with the
        delays of Moshi."""
        return max(self.generator.max_delay - 1, 0)

    @property
    def num_free(self) -> int:
        return sum(not row.taken for row in self.rows)

    def join(
        self,
        *,
        ttt_on: bool = True,
        reset_every_frames: int | None = None,
        now_frame: int | None = None,
    ) -> Row | None:
        """Begin a conversation; None: all rows are taken.

        A row's chunks count from its first frame. The step in which all rows end theirs takes
        several times as long as others, so where time matters, let a conversation begin in the
        row's `begin_frame`: its chunks then end in frames in which the fewest others' do. That is
        at once for the first caller, and never later than by as many frames as there are other
        callers. What the row computes is the same.

        Args:
            now_frame: the number of the present frame, on a clock of the callers' that goes on
                while they wait; None: nobody waits, and `begin_frame` means nothing.
        """
        for row in self.rows:
            if not row.taken:
                row.taken, row.ttt_on = True, ttt_on
                row.reset_every_frames = reset_every_frames
                if now_frame is not None:
                    row.begin_frame = now_frame + self._frames_to_wait(row, now_frame)
                return row
        return None

    def _frames_to_wait(self, row: Row, now_frame: int) -> int:
        """Return after how many frames a row should begin; see `join`."""
        others = [each for each in self.rows if each.taken and each.ttt_on and each is not row]
        layer = next(iter(self.model.ttt_layers.values()), None)
        if not (row.ttt_on and others) or layer is None:
            return 0
        open_frames = layer.open_frames()
        if open_frames is None:
            return 0
        num_open, chunk_size = open_frames.tolist(), self.model.ttt_args.update_frames

        def phase(each: Row, heard_from: int) -> int:
            """Return the frame in which its open chunk would have begun, modulo the chunk size, if
            it heard every frame. The first step, which hears nothing, is part of a chunk."""
            return (heard_from - num_open[each.index] - (each.num_steps == 0)) % chunk_size

        used = Counter(phase(each, max(each.begin_frame, now_frame)) for each in others)
        # One of these is free, or all phases are among them.
        waits = range(min(len(others), chunk_size - 1) + 1)
        return min(waits, key=lambda wait: used[phase(row, now_frame + wait)])

    def leave(self, row: Row) -> None:
        """End a conversation: the row is free, and nothing is left of it."""
        row.taken, row.ttt_on, row.reset_every_frames, row.begin_frame = False, True, None, 0
        self.restart(row)

    @torch.no_grad()
    def begin(self, row: Row) -> None:
        """Make a row's first step, which hears nothing, if it has not been made."""
        if row.num_steps == 0:
            self._advance([row], self._no_codes())

    def restart(self, row: Row) -> None:
        """Begin a row's conversation anew."""
        only = self._mask([row])
        ttt.clear_rows(self.generator, only)
        ttt.clear_rows(self.codec.mimi, only)
        row.num_steps = row.num_frames = 0

    def forget(self, row: Row) -> None:
        """Make TTT forget what it has learned in a conversation; attention remembers."""
        if self.model.ttt_layers:
            ttt.reset(self.generator, self._mask([row]))

    def row_bytes(self) -> int:
        """Return what the state of one conversation takes."""
        modules = self.generator, self.codec.mimi
        return sum(ttt.row_bytes(module) for module in modules)

    def changes(self) -> dict[int, list[float]]:
        """Return how far each row's fast weights are from where they start, relative to those, by
        TTT layer."""
        layers = self.model.ttt_layers
        if not self._start_norms:
            self._start_norms = {index: module.start_norm() for index, module in layers.items()}
        changes = {i: module.stream_change(self._start_norms[i]) for i, module in layers.items()}
        return {index: change.tolist() for index, change in changes.items()}

    @torch.no_grad()
    def step(self, frames: Mapping[int, Samples]) -> dict[int, Spoken]:
        """Hear a frame of some conversations; the others wait, and notice nothing.

        Args:
            frames: what the users say, [frame_samples] by row.

        Returns:
            What Moshi says, by row; nothing yet for rows in their first `lag_frames`.
        """
        heard = [row for row in self.rows if row.index in frames]
        # A model's first step hears nothing. It is made while the row is still free, with whatever
        # step comes next, so that a conversation begins without waiting. It also gives attention
        # something to see: with nothing, a row that waits would be NaN.
        silent = [row for row in self.rows if row.num_steps == 0]
        if early := [row for row in silent if row in heard or not heard]:
            self._advance(early, self._no_codes())
        if not heard:
            return {}
        silent = [row for row in silent if row not in early]
        codes = self._encode(heard, frames)
        tokens = self._advance([*heard, *silent], codes)
        for row in heard:
            row.num_frames += 1
        speaking = [row for row in heard if row.num_steps > self.generator.max_delay]
        return self._decode(speaking, tokens)

    def _encode(self, heard: list[Row], frames: Mapping[int, Samples]) -> Tensor:
        """[B, num_codebooks, 1] of what users say; of no meaning in other rows."""
        audio = np.zeros((len(self.rows), 1, self.frame_samples), dtype=np.float32)
        for row in heard:
            audio[row.index, 0] = frames[row.index]
        mimi = self.codec.mimi
        mimi.set_exec_mask(self._mask(heard))
        codes: Tensor = mimi.encode(torch.from_numpy(audio).to(self.codec.device))
        return codes[:, : self.codec.user_codebooks].to(self.model.device)

    def _no_codes(self) -> Tensor:
        shape = len(self.rows), self.codec.user_codebooks, 1
        return torch.zeros(shape, dtype=torch.long, device=self.model.device)

    def _advance(self, rows: list[Row], codes: Tensor) -> Tensor:
        """Take one step of the model in some rows: text and audio [B, 1 + dep_q, 1]."""
        for row in rows:
            every = row.reset_every_frames
            if every is not None and row.num_frames and row.num_frames % every == 0:
                self.forget(row)
        self.generator.set_exec_mask(self._mask(rows))
        if self.model.ttt_layers:
            ttt.use_in_rows(self.generator, self._mask([row for row in rows if row.ttt_on]))
        tokens = self.generator.step(codes)
        assert tokens is not None, "out-of-sync generation always answers"
        for row in rows:
            row.num_steps += 1
        return tokens

    def _decode(self, speaking: list[Row], tokens: Tensor) -> dict[int, Spoken]:
        audio = self._voices(speaking, tokens)
        texts = tokens[:, 0, 0].tolist()
        assert self.generator.healthy is not None
        healthy = self.generator.healthy.tolist()
        return {
            row.index: Spoken(
                texts[row.index],
                audio[row.index].copy(),
                healthy[row.index] and bool(np.isfinite(audio[row.index]).all()),
            )
            for row in speaking
        }

    def _voices(self, speaking: list[Row], tokens: Tensor) -> Samples:
        """[B, frame_samples] of what Moshi says; [B, 0] without voice."""
        if not self.has_voice:
            return np.zeros((len(self.rows), 0), dtype=np.float32)
        # Rows that say nothing hold a number that is no code, and so may the places of a session
        # that were yet to be filled: Mimi would raise, and end all calls.
        said = tokens[:, 1:].clamp(0, self.model.card - 1)
        mimi = self.codec.mimi
        mimi.set_exec_mask(self._mask(speaking))
        audio: Tensor = mimi.decode(said.to(self.codec.device))[:, 0]
        return audio.float().cpu().numpy()

    def _mask(self, rows: list[Row]) -> Tensor:
        mask = torch.zeros(len(self.rows), dtype=torch.bool)
        mask[[row.index for row in rows]] = True
        return mask.to(self.model.device)


@contextmanager
def open_engine(
    model: TTTLMModel,
    codec: Codec,
    *,
    max_users: int,
    temperature: float = 0.8,
    text_temperature: float = 0.7,
    has_voice: bool = True,
) -> Iterator[Engine]:
    """An engine with `max_users` free rows.

    Args:
        model: in eval mode.
        temperature, text_temperature: of all rows; with 0 the likeliest code is taken.
        has_voice: False: only the text of what Moshi says is wanted, and no audio is decoded.

    Raises:
        UserError: the model's attention has no window.
    """
    check_attention_window(model)
    mimi = codec._mimi_on_device()
    generator = SteadyLMGen(model, temperature, text_temperature, support_out_of_sync=True)
    steps_per_frame = round(mimi.encoder_frame_rate / mimi.frame_rate)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(codec.lock)
        for module in (model, mimi):
            # Where memory ends while states are made, those that there are would stay.
            stack.callback(module._stop_streaming)
        stack.enter_context(generator.streaming(max_users))
        stack.enter_context(mimi.streaming(max_users))
        ttt.lengthen_caches(mimi, steps_per_frame)
        rows = [Row(index) for index in range(max_users)]
        yield Engine(model, codec, generator, rows, has_voice)
