"""Trains the text tokenizer of the demonstration.

python research/train_tokenizer.py --out example/demo/model/tokenizer.model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.spoken import texts
from finetune.spoken.tokenizer import train_on

VOCAB_SIZE = 500
_NUM_TURNS = 4000


def train_tokenizer(out_path: Path) -> None:
    """Writes a sentencepiece unigram model of 500 pieces to `out_path`, always the same bytes.

    Special pieces as in Moshi's tokenizer: unknown 0, begin 1, end 2, padding 3. Letters that the
    dialogues never use are spelled in bytes.
    """
    out_path.parent.mkdir(parents=True, exist_ok=True)
    out_path.write_bytes(train_on(texts.corpus(_NUM_TURNS), VOCAB_SIZE))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demonstration's tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="the .model file to write")
    train_tokenizer(parser.parse_args().out)


if __name__ == "__main__":
    main()
