"""Continue a dialogue: Moshi listens to the user's channel and speaks.

The model runs in stock `moshi`'s `LMGen`, one frame at a time, with its TTT state.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from moshi.models import loaders
from moshi.models.lm import LMGen
from safetensors.torch import load_file
from torch import Tensor

from finetune.checkpoint import (
    load_trained_weights,
    require_own_base,
    require_sound,
    require_sound_start,
)
from finetune.config import DataArgs, ModelPaths, Precision, TrainArgs, load_run_config
from finetune.data import FRAME_RATE_HZ, Codec, Segment, count_frames
from finetune.distributed import join_world
from finetune.errors import UserError
from finetune.kept import is_stock, require_checkpoint
from finetune.model import (
    TTT_FILE,
    build_codec,
    exported_ttt_args,
    find_checkpoint,
    find_recorded,
    load_model,
)
from finetune.safety import all_finite
from ttt import TTTLMModel, eager_streaming, ttt_parameters, use_in_rows
from ttt.layers.frozen import frozen_linears

logger = logging.getLogger(__name__)


@dataclass
class Continuation:
    """Continuation of a dialogue; the prompt is included.

    audio: float32 [2, num_samples] at Mimi's rate: left Moshi, right the user.
    text: Moshi's words, with `|` between the prompt's and its own.
    codes: int64 [1 + Moshi's codebooks, T].
    """

    audio: Tensor
    text: str
    codes: Tensor


def load_for_inference(
    checkpoint: Path, device: str = "auto", base_precision: Precision | None = None
) -> tuple[TTTLMModel, Codec]:
    """The model of a checkpoint folder, in eval mode, and its codec.

    Args:
        checkpoint: of a run; or a folder of a stock Moshi, laid out as on Hugging Face, which is
            loaded as it is, with the TTT of an export (`ttt.safetensors`) or without: in bfloat16,
            and on a CPU, which multiplies bfloat16 several times slower, in float32.
        base_precision: of the frozen weights; None: as in the run, and of merged weights or a stock
            folder as they are.

    Raises:
        UserError: no checkpoint there, a damaged one, or its base model cannot be found any more,
            or was replaced.
    """
    args = checkpoint_args(checkpoint, device)
    if base_precision is not None:
        args.base_precision = base_precision
    # Nothing trains here, so nothing is compiled.
    args.compile = False
    info = find_base(checkpoint, args)
    world = join_world(args.device)
    device_used = world.device
    require_sound(checkpoint)
    if not is_stock(checkpoint):
        require_sound_start(args.moshi_paths, world)
        require_own_base(checkpoint)
    if is_stock(checkpoint) and device_used.type == "cpu":
        args.param_dtype = "float32"
    model = load_model(args, info, device_used)
    if not is_stock(checkpoint):
        load_trained_weights(model, args, checkpoint)
    elif args.ttt.enabled:
        _load_exported_ttt(model, checkpoint / TTT_FILE)
    codec = build_codec(info, model, word_start=args.data.word_start)
    return model.eval().requires_grad_(False), codec


def find_base(checkpoint: Path, args: TrainArgs) -> loaders.CheckpointInfo:
    """Find the files of the model that a checkpoint was trained on, or of a stock Moshi its own.

    Raises:
        UserError: they are not where the checkpoint's configuration says.
    """
    if is_stock(checkpoint):
        return find_checkpoint(args.moshi_paths)
    return find_recorded(checkpoint / "args.yaml", args.moshi_paths)


def nonfinite_weights(model: TTTLMModel) -> str | None:
    """Return which weights are NaN or infinite, in a sentence; None: all are numbers."""
    weights = [*model.named_parameters()]
    weights += [(f"{name}.weight", layer.scales) for name, layer in frozen_linears(model)]
    bad = [name for name, weight in weights if not all_finite(weight)]
    if not bad:
        return None
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"weights of the model are NaN or infinite ({', '.join(bad[:3])}{more})"


def check_attention_window(model: TTTLMModel) -> int:
    """The largest number of frames that attention sees.

    Raises:
        UserError: some layer has no window, so there is no cache of bounded size.
    """
    windows = [layer.self_attn.context for layer in model.transformer.layers]
    if None in windows:
        raise UserError(
            "--checkpoint: attention has no window in this model (context is null in its "
            "config.json), so its cache would grow without end. Set a context there."
        )
    return max(windows)


def checkpoint_args(checkpoint: Path, device: str = "auto") -> TrainArgs:
    """The configuration that made a checkpoint; of a stock Moshi, one that leaves it as it is.

    Raises:
        UserError: no checkpoint there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: there is no {device!r}; choose from auto, cpu, cuda.")
    if is_stock(checkpoint):
        return TrainArgs(
            data=DataArgs(),
            run_dir="",
            ttt=exported_ttt_args(checkpoint / TTT_FILE),
            moshi_paths=ModelPaths(hf_repo_id=str(checkpoint)),
            device=cast(Literal["auto", "cpu", "cuda"], device),
        )
    require_checkpoint(checkpoint, "--checkpoint")
    args = load_run_config(checkpoint / "args.yaml", {"device": device})
    if (checkpoint / "consolidated" / "consolidated.safetensors").is_file():
        # All weights are here: what they started from may be gone.
        args.moshi_paths.init_from = None
        # Merged, they are no longer the base that was kept in fewer bits.
        args.base_precision = "bfloat16"
    return args


def _load_exported_ttt(model: TTTLMModel, path: Path) -> None:
    own, given = ttt_parameters(model), load_file(path)
    if differ := sorted(own.keys() ^ given.keys()):
        raise UserError(f"{path} is of another model: see {differ[0]}.")
    for name, weight in given.items():
        if weight.shape != own[name].shape:
            raise UserError(f"{path} is of another model: see {name}.")
        own[name].data.copy_(weight)


class SteadyLMGen(LMGen):
    """`LMGen`, in which a row that has become NaN spoils no other: sampling raises, for all rows,
    where there is no probability to sample by."""

    def __init__(
        self, model: TTTLMModel, temperature: float, text_temperature: float, **options: Any
    ):
        super().__init__(
            model,
            temp=temperature,
            temp_text=text_temperature,
            on_text_logits_hook=self._make_finite,
            **options,
        )
        self.healthy: Tensor | None = None
        """[B], of the last step."""

    def _make_finite(self, logits: Tensor) -> None:
        self.healthy = logits.isfinite().flatten(1).all(1)
        logits.nan_to_num_()

    def depformer_step(self, text_token: Tensor, transformer_out: Tensor) -> Tensor:
        tokens: Tensor = super().depformer_step(text_token, transformer_out.nan_to_num())
        return tokens


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
    on_stop: Callable[[Continuation | None], object] | None = None,
) -> Continuation:
    """Moshi hears the user's channel of `dialogue` to its end, and speaks after `prompt_sec`.

    During the prompt, Moshi's own words and voice are those of the recording.

    Args:
        on_stop: takes what there is when somebody stops it, or None if that is not more than the
            prompt.

    Raises:
        UserError: the prompt is as long as the recording; see `generate_codes`.
    """
    codes = codec.encode([dialogue])
    num_frames = dialogue.num_valid_frames
    prompt_frames = count_frames(prompt_sec) if prompt_sec > 0 else 0
    if prompt_frames >= num_frames:
        raise UserError(
            f"--prompt_sec: {prompt_sec:g} s leave nothing to say of a recording of "
            f"{num_frames / FRAME_RATE_HZ:.1f} s ({dialogue.path})."
        )

    def stopped(frames: Sequence[Tensor]) -> None:
        if on_stop is None:
            return
        begun = None
        if len(frames) > prompt_frames:
            logger.info("keeping what there is of the answer; Ctrl-C again leaves at once")
            begun = _heard(codec, dialogue, torch.cat([*frames], dim=2), prompt_frames)
        on_stop(begun)

    torch.manual_seed(seed)
    said = generate_codes(
        model,
        codes[:, :, :num_frames],
        prompt_frames=prompt_frames,
        temperature=temperature,
        text_temperature=text_temperature,
        on_stop=stopped,
    )
    return _heard(codec, dialogue, said, prompt_frames)


def _heard(codec: Codec, dialogue: Segment, said: Tensor, prompt_frames: int) -> Continuation:
    """Return codes [1, 1 + dep_q, T], of the dialogue's beginning or all of it, as they sound."""
    voice = codec.decode(said[:, 1:])[0]
    user = dialogue.audio[1:]
    num_samples = min(voice.shape[-1], user.shape[-1])
    audio = torch.cat([voice[:, :num_samples].cpu(), user[:, :num_samples]])
    text = " | ".join(
        codec.detokenize(part) for part in (said[0, 0, :prompt_frames], said[0, 0, prompt_frames:])
    )
    return Continuation(audio, text, said[0].cpu())


@torch.no_grad()
def generate_codes(
    model: TTTLMModel,
    codes: Tensor,
    *,
    prompt_frames: int,
    temperature: float,
    text_temperature: float,
    ttt_rows: Tensor | None = None,
    after_step: Callable[[], object] = lambda: None,
    on_stop: Callable[[Sequence[Tensor]], object] = lambda _: None,
    use_cuda_graphs: bool = True,
) -> Tensor:
    """Moshi's text and audio codes, [B, 1 + dep_q, T], given the user's in `codes` [B, 17, T].

    The first `prompt_frames` of Moshi's own are those in `codes`.

    Args:
        ttt_rows: a mask [B] of booleans, the rows that use TTT; None: all.
        after_step: is called after every frame, while the model is streaming.
        on_stop: takes the frames that there are when somebody stops it, [B, 1 + dep_q, 1] each.
        use_cuda_graphs: on a GPU. In training one could not be recorded while another thread
            encodes audio.

    Raises:
        UserError: what the model computed is not finite.
    """
    num_rows, _, num_frames = codes.shape
    own, user = codes[:, : 1 + model.dep_q], codes[:, 1 + model.dep_q :]
    text_of_step: list[Tensor | None] = [None]

    def force_text(token: Tensor) -> None:
        if text_of_step[0] is not None:
            token[:] = text_of_step[0]

    generator = SteadyLMGen(model, temperature, text_temperature, on_text_hook=force_text)
    delays = torch.tensor(model.delays[1 : 1 + model.dep_q], device=codes.device)
    streams = torch.arange(1, 1 + model.dep_q, device=codes.device)
    frames: list[Tensor] = []
    num_steps = num_frames + max(model.delays)
    # Read once, at the end: a GPU would wait for every step.
    healthy_steps = torch.tensor(num_steps, device=codes.device)
    streaming = generator.streaming if use_cuda_graphs else partial(eager_streaming, generator)
    keeping = _handing_over(frames, healthy_steps, max(model.delays), on_stop)
    with keeping, _caches_of(model, num_steps), streaming(num_rows):
        if ttt_rows is not None:
            use_in_rows(generator, ttt_rows)
        # Step s predicts text frame s and, of a delayed stream, frame s - delay. It reads the
        # user's frame s - 1; at step 0 the model hears its initial token, whatever it is given.
        for step in range(num_steps):
            heard = user[:, :, min(max(step - 1, 0), num_frames - 1), None]
            forced = None
            text_of_step[0] = own[:, 0, step] if step < prompt_frames else None
            if step < prompt_frames:
                # All codebooks of a step are forced or none: the last frame of the prompt's delayed
                # codebooks is the model's own.
                at = step - delays
                forced = own[:, streams, at.clamp(min=0)][:, :, None]
                forced = torch.where((at < 0)[None, :, None], model.initial_token_id, forced)
            frame = generator.step(heard, depformer_replace_tokens=forced)
            after_step()
            assert generator.healthy is not None
            broken_at = torch.where(generator.healthy.all(), num_steps, step)
            torch.minimum(healthy_steps, broken_at, out=healthy_steps)
            if frame is not None:
                frames.append(frame)
    if healthy_steps < num_steps:
        raise UserError(
            f"the model computed NaN or infinity from {int(healthy_steps) / FRAME_RATE_HZ:.1f} s "
            "on; use an earlier checkpoint."
        )
    return torch.cat(frames, dim=2)[:, :, :num_frames]


@contextmanager
def _handing_over(
    frames: Sequence[Tensor],
    healthy_steps: Tensor,
    lag: int,
    on_stop: Callable[[Sequence[Tensor]], object],
) -> Iterator[None]:
    """Hand over what there is, as far as it is sound, if somebody stops what is made in here.

    Args:
        lag: steps from a frame's first prediction to its last, after which it is there.
    """
    try:
        yield
    except KeyboardInterrupt:
        on_stop(frames[: max(0, int(healthy_steps) - lag)])
        raise


@contextmanager
def _caches_of(model: TTTLMModel, num_steps: int) -> Iterator[None]:
    """Attention caches of no more steps than there are: those of a whole window take gigabytes."""
    attentions = [layer.self_attn for layer in model.transformer.layers]
    contexts = [attention.context for attention in attentions]
    for attention, context in zip(attentions, contexts, strict=True):
        attention.context = num_steps if context is None else min(context, num_steps)
    try:
        yield
    finally:
        for attention, context in zip(attentions, contexts, strict=True):
            attention.context = context
