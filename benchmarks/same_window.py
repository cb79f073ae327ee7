"""A call beside a reference with the same attention window: the same codes in blocks of many
frames, without CUDA graphs or a batch of rows."""

from typing import Any

import torch
from moshi.models.lm_utils import _delay_sequence
from torch import Tensor

from finetune.inference import check_attention_window
from finetune.serve import Engine
from ttt import TTTLMModel, block_streaming

LOOK_FRAMES = 200
"""Frames at a time whose logits are kept."""
BEYOND_FRAME = 3000
"""The window of Moshi 7B, and the length of the rotary table that some implementations have."""
BLOCK_FRAMES = 250


class Tape:
    """Codes of the first row's call, all of them, and its text logits now and then.

    Its size does not grow with the call, which is to be looked at for growth.

    Args:
        engine: of which no step has been made.
        num_frames: of the call.
        every_frames: logits are kept of the first `LOOK_FRAMES` of each part of so many frames, and
            from `BEYOND_FRAME` on.
    """

    def __init__(self, engine: Engine, num_frames: int, every_frames: int) -> None:
        model, generator = engine.model, engine.generator
        assert engine.lag_frames == 0, "what is said at a step is of that step's frame"
        self.starts = sorted({*range(0, num_frames, every_frames), BEYOND_FRAME})
        # The first step hears nothing, and what it says is said with the next.
        shape = model.num_codebooks, 1 + num_frames
        self.codes = torch.zeros(shape, dtype=torch.long, device=model.device)
        size = len(self.starts), LOOK_FRAMES, model.text_card
        self.logits = torch.zeros(size, device=model.device)
        self.num_steps = 0
        step, look = generator.step, generator.on_text_logits_hook
        assert look is not None

        def recorded_step(user: Tensor, *args: Any) -> Tensor | None:
            tokens = step(user, *args)
            if self.num_steps < self.codes.shape[1]:
                self.codes[:, self.num_steps] = torch.cat([tokens[0], user[0]])[:, 0]
                self.num_steps += 1
            return tokens

        def recorded_look(logits: Tensor) -> None:
            look(logits)
            for index, start in enumerate(self.starts):
                if 0 <= self.num_steps - start < LOOK_FRAMES:
                    self.logits[index, self.num_steps - start] = logits[0, 0, 0]

        generator.step = recorded_step
        generator.on_text_logits_hook = recorded_look

    @torch.no_grad()
    def compare(self, model: TTTLMModel) -> dict[str, Any]:
        """Return how far the call's text logits are from the reference's, ‖difference‖ / ‖logits‖,
        by the frame at which `LOOK_FRAMES` begin.

        Args:
            model: the engine's, after it has been closed.
        """
        num_frames = self.num_steps - 1
        codes = self.codes[None, :, 1 : self.num_steps]
        initial = model._get_initial_token()
        delayed = _delay_sequence(model.delays, codes, initial.expand(1, -1, -1))
        heard = torch.cat([initial, delayed], dim=2)[:, :, :num_frames]
        starts = [start for start in self.starts if start < num_frames]
        squares = torch.zeros(len(starts), 2, device=model.device)
        with block_streaming(model, 1, BLOCK_FRAMES):
            for first in range(0, num_frames, BLOCK_FRAMES):
                expected = model.forward_text(heard[:, :, first : first + BLOCK_FRAMES])[1][0, 0]
                for index, start in enumerate(starts):
                    low = max(first, start)
                    high = min(first + len(expected), start + LOOK_FRAMES)
                    if low < high:
                        right = expected[low - first : high - first].float()
                        found = self.logits[index, low - start : high - start]
                        squares[index, 0] += (found - right).square().sum()
                        squares[index, 1] += right.square().sum()
        relative = (squares[:, 0] / squares[:, 1]).sqrt().tolist()
        return {
            "window_frames": check_attention_window(model),
            "difference_from_frame": {
                start: round(value, 7) for start, value in zip(starts, relative, strict=True)
            },
        }
