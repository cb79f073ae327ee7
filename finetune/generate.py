"""Continue a dialogue: Moshi listens to the user's channel and speaks.

The model runs in stock `moshi`'s `LMGen`, one frame at a time, with its TTT state.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from moshi.models.lm import LMGen
from torch import Tensor

from finetune.checkpoint import load_trained_weights
from finetune.config import load_config
from finetune.data import FRAME_RATE_HZ, Codec, Segment, count_frames
from finetune.distributed import join_world
from finetune.errors import UserError
from finetune.model import build_codec, find_checkpoint, load_model
from finetune.start import require_checkpoint
from ttt import TTTLMModel


@dataclass
class Continuation:
    """What was said, prompt included.

    audio: float32 [2, num_samples] at Mimi's rate: left Moshi, right the user.
    text: Moshi's words, with `|` between the prompt's and its own.
    codes: int64 [1 + Moshi's codebooks, T].
    """

    audio: Tensor
    text: str
    codes: Tensor


def load_for_inference(checkpoint: Path, device: str = "auto") -> tuple[TTTLMModel, Codec]:
    """The model of a checkpoint folder, in eval mode, and its codec.

    Raises:
        UserError: no checkpoint there, or its base model cannot be found any more.
    """
    require_checkpoint(checkpoint, "--checkpoint")
    args = load_config(checkpoint / "args.yaml", {"device": device})
    if (checkpoint / "consolidated" / "consolidated.safetensors").is_file():
        # All weights are here: what they started from may be gone.
        args.moshi_paths.init_from = None
    info = find_checkpoint(args.moshi_paths)
    model = load_model(args, info, join_world(args.device).device)
    load_trained_weights(model, args, checkpoint)
    return model.eval().requires_grad_(False), build_codec(info, model)


@torch.no_grad()
def continue_dialogue(
    model: TTTLMModel,
    codec: Codec,
    dialogue: Segment,
    *,
    prompt_sec: float,
    seed: int = 0,
    temperature: float = 0.8,
    text_temperature: float = 0.7,
) -> Continuation:
    """Moshi hears the user's channel of `dialogue` to its end, and speaks after `prompt_sec`.

    During the prompt, Moshi's own words and voice are those of the recording.

    Raises:
        UserError: the prompt is as long as the recording.
    """
    codes = codec.encode([dialogue])
    num_frames = dialogue.num_valid_frames
    prompt_frames = count_frames(prompt_sec) if prompt_sec > 0 else 0
    if prompt_frames >= num_frames:
        raise UserError(
            f"--prompt_sec: {prompt_sec:g} s leave nothing to say of a recording of "
            f"{num_frames / FRAME_RATE_HZ:.1f} s ({dialogue.path})."
        )
    torch.manual_seed(seed)
    said = _generate(model, codes, num_frames, prompt_frames, temperature, text_temperature)
    voice = codec.decode(said[:, 1:])[0]
    user = dialogue.audio[1:]
    num_samples = min(voice.shape[-1], user.shape[-1])
    audio = torch.cat([voice[:, :num_samples].cpu(), user[:, :num_samples]])
    text = " | ".join(
        codec.detokenize(part) for part in (said[0, 0, :prompt_frames], said[0, 0, prompt_frames:])
    )
    return Continuation(audio, text, said[0].cpu())


def _generate(
    model: TTTLMModel,
    codes: Tensor,
    num_frames: int,
    prompt_frames: int,
    temperature: float,
    text_temperature: float,
) -> Tensor:
    """Moshi's text and audio codes, [1, 1 + dep_q, T], given the user's in `codes` [1, 17, T]."""
    own, user = codes[:, : 1 + model.dep_q], codes[:, 1 + model.dep_q :]
    text_of_step: list[int | None] = [None]

    def force_text(token: Tensor) -> None:
        if text_of_step[0] is not None:
            token[:] = text_of_step[0]

    generator = LMGen(model, temp=temperature, temp_text=text_temperature, on_text_hook=force_text)
    delays = torch.tensor(model.delays[1 : 1 + model.dep_q], device=codes.device)
    streams = torch.arange(1, 1 + model.dep_q, device=codes.device)
    frames = []
    with generator.streaming(1):
        # Step s predicts text frame s and, of a delayed stream, frame s - delay. It reads the
        # user's frame s - 1; at step 0 the model hears its initial token, whatever it is given.
        for step in range(num_frames + max(model.delays)):
            heard = user[:, :, min(max(step - 1, 0), num_frames - 1), None]
            forced = None
            text_of_step[0] = int(own[0, 0, step]) if step < prompt_frames else None
            if step < prompt_frames:
                # All codebooks of a step are forced or none: the last frame of the prompt's delayed
                # codebooks is the model's own.
                at = step - delays
                forced = own[:, streams, at.clamp(min=0)][:, :, None]
                forced = torch.where((at < 0)[None, :, None], model.initial_token_id, forced)
            frame = generator.step(heard, depformer_replace_tokens=forced)
            if frame is not None:
                frames.append(frame)
    return torch.cat(frames, dim=2)[:, :, :num_frames]
