"""Is what the model says still speech? Measures of seeded continuations, and alarms for collapse.

Each measure is taken of the continuation and of the recording itself over the same seconds, so that
a limit need not know how much a good Moshi is silent or how often it repeats itself.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.data import Codec
from finetune.evaluation.codes import Silence
from finetune.inference import generate_codes
from ttt import TTTLMModel

logger = logging.getLogger(__name__)

SHARES = ("modal_share", "padding_share", "silence_share", "repeat_rate")
MEASURES = ("entropy", *SHARES)
REPEAT_FRAMES = 10
"""Length of a segment that may repeat: 0.8 s."""
REPEAT_MIN_CODES = 4
"""Different codes in such a segment: silence, which repeats lawfully, has fewer."""
SILENCE_MARGIN_DB = 6.0
SILENCE_FLOOR_DB = -60.0

MIN_ENTROPY_RATIO = 0.5
MAX_SHARE_EXCESS = 0.3
ALWAYS, NOT_ALWAYS = 0.98, 0.9
MIN_PADDING_DEFICIT = 0.4

MEANING = {
    "entropy": "entropy of the first codebook's codes, in nats",
    "modal_share": "share of its most frequent code",
    "padding_share": "share of padding in the text",
    "silence_share": "share of silent frames of 80 ms",
    "repeat_rate": f"share of segments of {REPEAT_FRAMES} frames that came before",
}


@dataclass(frozen=True)
class Alarm:
    """A measure beyond its limit, and what that looks like."""

    measure: str
    text: str


@torch.no_grad()
def check_health(
    model: TTTLMModel,
    codec: Codec,
    codes: Tensor,
    *,
    prompt_frames: int,
    seed: int,
    temperature: float = 0.8,
    text_temperature: float = 0.7,
    after_frame: Callable[[], object] = lambda: None,
) -> list[dict[str, dict[str, float]]]:
    """Let the model continue recordings, and measure what it says.

    The random state is left as it was.

    Args:
        model: in eval mode.
        codes: [B, 17, T], whole recordings without padding: prompt, and what the user says after.

    Returns:
        Of each recording, the measures of the continuation, `generated`, and of the same seconds
        of the recording, `recorded`.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        said = generate_codes(
            model,
            codes,
            prompt_frames=prompt_frames,
            temperature=temperature,
            text_temperature=text_temperature,
            after_step=after_frame,
            use_cuda_graphs=False,
        )
    recorded = codes[:, : 1 + model.dep_q]
    silent_db = silent_below_db(codec)
    results: list[dict[str, dict[str, float]]] = [{} for _ in codes]
    for name, own in (("generated", said), ("recorded", recorded)):
        own = own[:, :, prompt_frames:]
        for row, tokens in enumerate(own.split(1)):
            audio = codec.decode(tokens[:, 1:])[:, 0]
            levels_db = frame_levels_db(audio, codec.mimi.frame_size)[0].cpu()
            results[row][name] = measure(codec, tokens[0].cpu(), levels_db, silent_db)
    return results


def measure(codec: Codec, tokens: Tensor, levels_db: Tensor, silent_db: float) -> dict[str, float]:
    """The `MEASURES` of text and audio codes [1 + dep_q, n] that sound at `levels_db` [n]."""
    text, first = tokens[0].tolist(), tokens[1].tolist()
    counts = Counter(first)
    shares = [count / len(first) for count in counts.values()]
    paddings = {codec.text_padding_id, codec.end_of_text_padding_id}
    return {
        "entropy": sum(-share * math.log(share) for share in shares),
        "modal_share": max(shares),
        "padding_share": sum(token in paddings for token in text) / len(text),
        "silence_share": float((levels_db < silent_db).float().mean()),
        "repeat_rate": repeat_rate(first),
    }


def repeat_rate(codes: list[int]) -> float:
    """Share of the segments of `REPEAT_FRAMES` codes that have occurred before, those of fewer than
    `REPEAT_MIN_CODES` different codes left out."""
    seen: set[tuple[int, ...]] = set()
    repeated = total = 0
    for start in range(len(codes) - REPEAT_FRAMES + 1):
        segment = tuple(codes[start : start + REPEAT_FRAMES])
        if len(set(segment)) >= REPEAT_MIN_CODES:
            total += 1
            repeated += segment in seen
            seen.add(segment)
    return repeated / total if total else 0.0


def alarms(generated: Mapping[str, float], recorded: Mapping[str, float]) -> list[Alarm]:
    """Return what is wrong with the means of the measures, compared with those of the
    recordings."""
    own, usual = generated, recorded
    found = []
    if own["entropy"] < MIN_ENTROPY_RATIO * usual["entropy"]:
        found.append(Alarm("entropy", "it uses few codes: the voice has become monotonous"))
    if own["modal_share"] > usual["modal_share"] + MAX_SHARE_EXCESS:
        found.append(Alarm("modal_share", "one code prevails: the voice is stuck"))
    if own["padding_share"] >= ALWAYS and usual["padding_share"] <= NOT_ALWAYS:
        found.append(Alarm("padding_share", "it says no words"))
    if own["padding_share"] < usual["padding_share"] - MIN_PADDING_DEFICIT:
        found.append(Alarm("padding_share", "words come without pause"))
    if own["silence_share"] >= ALWAYS and usual["silence_share"] <= NOT_ALWAYS:
        found.append(Alarm("silence_share", "it is silent"))
    if own["repeat_rate"] > usual["repeat_rate"] + MAX_SHARE_EXCESS:
        found.append(Alarm("repeat_rate", "it says the same thing again and again"))
    return found


def limits(recorded: Mapping[str, float]) -> dict[str, str]:
    """The limits of `alarms` for these recordings, for people."""
    usual = recorded
    always = f"≥ {ALWAYS:g}"
    least_padding = usual["padding_share"] - MIN_PADDING_DEFICIT
    padding = [f"< {least_padding:.2f}"] if least_padding > 0 else []
    padding += [always] if usual["padding_share"] <= NOT_ALWAYS else []
    return {
        "entropy": f"< {MIN_ENTROPY_RATIO * usual['entropy']:.2f}",
        "modal_share": f"> {usual['modal_share'] + MAX_SHARE_EXCESS:.2f}",
        "padding_share": " or ".join(padding),
        "silence_share": always if usual["silence_share"] <= NOT_ALWAYS else "none",
        "repeat_rate": f"> {usual['repeat_rate'] + MAX_SHARE_EXCESS:.2f}",
    }


def means(results: list[dict[str, dict[str, float]]], kind: str) -> dict[str, float]:
    return {name: sum(r[kind][name] for r in results) / len(results) for name in MEASURES}


def frame_levels_db(audio: Tensor, frame_samples: int) -> Tensor:
    """RMS of each frame of audio [B, num_samples] in dB of full scale, [B, n]."""
    frames = audio.float().unflatten(1, (-1, frame_samples))
    return 10 * frames.square().mean(-1).clamp(min=1e-12).log10()


def silent_below_db(codec: Codec) -> float:
    """Return the level below which a frame is silent: somewhat above Mimi's rendering of encoded
    silence, for no codec is perfectly quiet."""
    codes = Silence(codec).codes(25)[None, : codec.moshi_codebooks]
    level = float(frame_levels_db(codec.decode(codes)[:, 0], codec.mimi.frame_size).max())
    return max(SILENCE_FLOOR_DB, level + SILENCE_MARGIN_DB)
