"""Trains the text tokenizer of the demonstration.

python research/train_tokenizer.py --out example/demo/model/tokenizer.model
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import sentencepiece

from finetune.spoken import texts

VOCAB_SIZE = 500
_NUM_TURNS = 4000


def train_tokenizer(out_path: Path) -> None:
    """Writes a sentencepiece unigram model of 500 pieces to `out_path`, always the same bytes.

    Special pieces as in Moshi's tokenizer: unknown 0, begin 1, end 2, padding 3. Letters that the
    dialogues never use are spelled in bytes.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts.corpus(_NUM_TURNS)),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB_SIZE,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        byte_fallback=True,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    out_path.parent.mkdir(parents=True, exist_ok=True)
    out_path.write_bytes(model.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demonstration's tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="the .model file to write")
    train_tokenizer(parser.parse_args().out)


if __name__ == "__main__":
    main()
