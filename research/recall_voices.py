"""A recognizer listens to voices: how the four of spoken recall were chosen.

    python research/recall_voices.py [--voices en-us+m2 en-us+f2 ...] [--talks 12]

A recognizer (pocketsphinx) is given a grammar of what can be said, the twelve names and the twelve
values of a kind, and hears the facts of talks as they are told. Prints a line for each voice: the
share of names and of values that it hears right. What it mishears, a model may mishear as well.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torchaudio
from pocketsphinx import Decoder

from finetune.spoken import KINDS, NAMES, SAMPLE_RATE_HZ, TalkOptions, make_talk

VOICES = [
    "en-us",
    *(
        f"en-us+{kind}"
        for kind in ["m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5"]
    ),
]
RATE_HZ = 16_000


def recognizer(kind: str) -> Decoder:
    """Return a recognizer of the facts of one kind, which can hear nothing else."""
    before, after = KINDS[kind].statement.lower().split("{name}")
    names, values = ("|".join(words).lower() for words in (NAMES, KINDS[kind].values))
    decoder = Decoder(lm=None, loglevel="FATAL")
    rule = f"{before} ({names}) {after} ({values})"
    decoder.add_jsgf_string("facts", f"#JSGF V1.0; grammar facts; public <fact> = {rule};")
    decoder.activate_search("facts")
    return decoder


def hear(decoder: Decoder, samples: np.ndarray) -> list[str]:
    """Return the words that are heard in int16 samples at 24 kHz."""
    sound = torch.from_numpy(np.pad(samples, SAMPLE_RATE_HZ // 5) / 32768)
    sound = torchaudio.functional.resample(sound, SAMPLE_RATE_HZ, RATE_HZ)
    decoder.start_utt()
    decoder.process_raw((sound.numpy() * 32767).astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr.split() if found is not None else []


def measure(voice: str, num_talks: int) -> tuple[int, int, int]:
    """Return how many facts a voice tells, and of how many the name and the value are heard."""
    options = TalkOptions(distances_sec=(60.0,), num_facts=4, voices=(voice,))
    decoders = {kind: recognizer(kind) for kind in KINDS}
    count = names = values = 0
    for index in range(num_talks):
        talk = make_talk(options, index, seed=0)
        # Facts come first, in the order of `facts`.
        for told, said in zip(talk.facts, talk.utterances(), strict=False):
            words = hear(decoders[talk.kind], said.samples)
            count += 1
            names += told.fact.name.lower() in words
            values += words[-1:] == [told.fact.value.lower()]
    return count, names, values


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--voices", nargs="+", default=VOICES)
    parser.add_argument("--talks", type=int, default=12)
    args = parser.parse_args(argv)
    print("| voice | facts | names heard | values heard |\n| --- | --- | --- | --- |")
    for voice in args.voices:
        count, names, values = measure(voice, args.talks)
        print(f"| {voice} | {count} | {names / count:.2f} | {values / count:.2f} |", flush=True)


if __name__ == "__main__":
    main()
