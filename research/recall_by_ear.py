"""A recognizer listens to Moshi's answers in the spoken experiment.

    python research/recall_by_ear.py --runs runs/recall/gpu_spoken --arm delta_hidden --seed 0

Moshi spoke on its own (`RUNS/runs/ARM_seedN.said.safetensors`). Its audio after each question is
decoded, and pocketsphinx, which knows the sentences of that kind alone, hears a name and a
value in it. Beside it stands what it hears of the true recordings, coded and decoded likewise: more
cannot be expected of it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from recall_voices import hear, recognizer
from safetensors.torch import load_file
from torch import Tensor

from finetune.data import FRAME_RATE_HZ, Codec
from finetune.recall.spoken.measure import WINDOW_FRAMES
from finetune.recall.spoken.presets import preset
from finetune.spoken import KINDS, Answer, Dataset, EncodedDialogues
from finetune.spoken.dataset import open_codec


def speech(codec: Codec, codes: Tensor) -> Tensor:
    """Return the samples [S] of Moshi's codes [8, T], int16 at 24 kHz."""
    return (codec.decode(codes[None].to(torch.int64))[0].flatten() * 32767).short()


def heard(codec: Codec, codes: Tensor, data: EncodedDialogues) -> tuple[int, int]:
    """Return how many answers there are in codes [D, 8, T], and of how many the value is heard."""
    decoders = {kind: recognizer(kind) for kind in KINDS}
    count = values = 0
    for row, spoken in enumerate(codes):
        samples = speech(codec, spoken)
        for numbers in data.answers[row].tolist():
            answer = Answer(*numbers)
            if answer.frame < 0:
                continue
            kind = list(KINDS.values())[answer.kind]
            start, end = (
                round((answer.asked_frame + frames) / FRAME_RATE_HZ * codec.sample_rate_hz)
                for frames in (WINDOW_FRAMES[0] + 10, WINDOW_FRAMES[1] + 10)
            )
            words = hear(decoders[kind.name], samples[start:end].numpy())
            count += 1
            values += words[-1:] == [kind.values[answer.value].lower()]
    return count, values


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="the experiment's folder")
    parser.add_argument("--arm", default="delta_hidden")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    data = Dataset(args.runs / "data", preset("gpu").data).load("eval")
    said = load_file(args.runs / "runs" / f"{args.arm}_seed{args.seed}.said.safetensors")["said"]
    codec = open_codec(torch.device("cpu"))
    for what, codes in (("recordings", data.codes[: len(said), :8]), (args.arm, said[:, 1:])):
        count, values = heard(codec, codes, data)
        print(f"{what}: {count} answers, {values / count:.2f} of the values heard", flush=True)


if __name__ == "__main__":
    main()
