"""Pairs of speech and what only sounds a little like it, from dialogues of `moshi-ttt demo-data`.

    python benchmarks/noise_pairs.py data/long/eval.jsonl data/pairs --num_pairs 100

The good one is an utterance of Moshi's, mono, with its words beside it. The bad one, of the same
length and loudness and with the same words, is white noise, noise with the utterance's spectrum, or
the utterance reversed: `--num_pairs` of each, each of another utterance, in a new folder. For
`moshi-ttt evaluate --pairs data/pairs/pairs.jsonl`.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from finetune.kept import require_free_folder

GROUPS = ("white noise", "noise shaped like the speech", "reversed speech")
MAX_PAUSE_SEC = 0.3
UTTERANCE_SEC = (1.5, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dialogues", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num_pairs", type=int, default=100)
    args = parser.parse_args()
    require_free_folder(args.out, "out")
    args.out.mkdir(parents=True, exist_ok=True)
    found = [u for line in args.dialogues.open() for u in utterances(args.dialogues.parent, line)]
    random.Random(0).shuffle(found)
    generator = np.random.default_rng(0)
    lines = []
    for index, (path, words) in enumerate(found[: len(GROUPS) * args.num_pairs], start=1):
        group = GROUPS[(index - 1) // args.num_pairs]
        samples, rate_hz = read(path, words)
        bad = imitation(group, samples, generator).clip(-1, 1)
        line = {"good": f"g{index:03}.wav", "bad": f"b{index:03}.wav", "id": f"{index:03}"}
        for name, audio in ((line["good"], samples), (line["bad"], bad)):
            soundfile.write(args.out / name, audio, rate_hz)
            transcript = {"alignments": shifted(words)}
            (args.out / name).with_suffix(".json").write_text(json.dumps(transcript))
        lines.append(json.dumps({**line, "group": group}))
    (args.out / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    print(f"wrote {len(lines)} pairs of {len(found)} utterances to {args.out / 'pairs.jsonl'}")


def utterances(folder: Path, line: str) -> Iterator[tuple[Path, list]]:
    """Moshi's words between two pauses, of a length that suits."""
    path = folder / json.loads(line)["path"]
    words = json.loads(path.with_suffix(".json").read_text())["alignments"]
    utterance: list = []
    for word in [w for w in words if w[2] == "SPEAKER_MAIN"]:
        if utterance and word[1][0] - utterance[-1][1][1] > MAX_PAUSE_SEC:
            shortest, longest = UTTERANCE_SEC
            if shortest <= utterance[-1][1][1] - utterance[0][1][0] <= longest:
                yield path, utterance
            utterance = []
        utterance.append(word)


def read(path: Path, words: list) -> tuple[np.ndarray, int]:
    with soundfile.SoundFile(path) as file:
        start, stop = (round(sec * file.samplerate) for sec in (words[0][1][0], words[-1][1][1]))
        file.seek(start)
        return file.read(stop - start, always_2d=True)[:, 0], file.samplerate


def shifted(words: list) -> list:
    start_sec = words[0][1][0]
    return [[text, [a - start_sec, b - start_sec], who] for text, (a, b), who in words]


def imitation(group: str, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    if group == "reversed speech":
        return samples[::-1]
    if group == "white noise":
        noise = generator.standard_normal(len(samples))
    else:
        spectrum = np.abs(np.fft.rfft(samples))
        phases = np.exp(2j * np.pi * generator.random(len(spectrum)))
        noise = np.fft.irfft(spectrum * phases, len(samples))
    return noise * np.sqrt((samples**2).mean()) / noise.std()


if __name__ == "__main__":
    main()
