"""Encoded dialogues on the disk, made once."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save

from finetune.config import ModelPaths
from finetune.data import Codec, TextEncoder
from finetune.errors import UserError
from finetune.kept import Kept, write_whole
from finetune.model import find_checkpoint
from finetune.spoken import texts
from finetune.spoken.bank import Bank, BankArgs
from finetune.spoken.codes import (
    NO_ANSWER,
    EncodedDialogues,
    answers_of,
    encode,
    text_of,
    value_tokens,
)
from finetune.spoken.dialogues import Dialogue, DialogueArgs, compose
from finetune.spoken.recombine import Pool, Silence, recombine
from finetune.spoken.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

NUM_CODEBOOKS = 8
CODEC_FOLDER = Path("example/demo/model")
_DIALOGUES_AT_ONCE = 32
_SETTLED_FRAMES = 25
"""So many frames from the beginning Mimi has heard less than later."""
DATA_VERSION = 5
"""Raise it when the same arguments give other data."""


@dataclass(frozen=True)
class DatasetArgs:
    """These options say what data to make."""

    bank: BankArgs = field(default_factory=BankArgs)
    dialogues: DialogueArgs = field(default_factory=DialogueArgs)
    num_spoken: int = 5000
    """Dialogues that are spoken and encoded for training."""
    num_train: int = 60_000
    """Recombined out of them."""
    num_long: int = 6000
    """Likewise, `long_times` as long, and with filler between the questions as well."""
    long_times: int = 4
    pauses: bool = False
    """Those for training have pauses now and then, talk that Moshi does not answer, and questions
    that interrupt it: for a model that people speak with, who keep to no script."""
    num_eval: int = 320
    lengths: dict[int, int] = field(default_factory=lambda: {4: 64, 16: 32, 32: 16, 64: 16})
    """For evaluation: how many times longer talks are, and how many of each."""


@dataclass(frozen=True)
class Dataset:
    """A folder with everything."""

    folder: Path
    args: DatasetArgs

    def load(self, name: str) -> EncodedDialogues:
        """Return a part: train, long (for training too), eval, or as often longer as `x4` says."""
        return EncodedDialogues(**load_file(self.folder / f"{name}.safetensors"))

    @property
    def text(self) -> TextEncoder:
        path = self.folder / "tokenizer.model"
        return TextEncoder(sentencepiece.SentencePieceProcessor(model_file=str(path)))

    @property
    def mark(self) -> Kept:
        """Return what says how the data were made; it is there while all parts are, and fit."""
        return Kept(self.folder / "dataset.json")


def build_dataset(
    folder: Path,
    args: DatasetArgs,
    device: torch.device,
    *,
    workers: int,
) -> Dataset:
    """Speak, encode and recombine dialogues, unless they are in the folder already.

    Raises:
        UserError: espeak-ng is not installed, the folder cannot be written, or the codec of the
            demonstration is not there.
    """
    dataset = Dataset(folder, args)
    described = json.loads(json.dumps({"version": DATA_VERSION, **dataclasses.asdict(args)}))
    if dataset.mark.read() == described:
        logger.info("the dialogues are in %s already", folder)
        return dataset
    started_at = time.monotonic()
    tokenizer = train_tokenizer(args.bank)
    codec = open_codec(device)
    bank = Bank(args.bank, workers=workers)
    # From here on parts of other data, if there are any, are replaced one by one.
    dataset.mark.remove()
    write_whole(folder / "tokenizer.model", tokenizer)
    logger.info("%d utterances spoken, %.0f s", len(bank.words), time.monotonic() - started_at)
    counts: dict[texts.Split, int] = {"eval": args.num_eval, "train": args.num_spoken}
    for split, count in counts.items():
        spoken, dialogues = _speak(bank, args, split, count, dataset.text, codec, workers)
        logger.info("%d dialogues for %s encoded, %.0f s", count, split, _since(started_at))
        silence = _silence(args, dataset.text, codec) if args.pauses and split == "train" else None
        pool = Pool(spoken, dialogues, value_tokens(dataset.text), silence)
        if split == "eval":
            _save(spoken, folder / "eval.safetensors")
            parts = {f"x{times}": (num, times) for times, num in args.lengths.items()}
        else:
            parts = {"train": (args.num_train, 1), "long": (args.num_long, args.long_times)}
        for name, (num, times) in parts.items():
            more = args.dialogues.num_frames * (times - 1)
            made = recombine(
                pool,
                args.dialogues,
                num,
                seed=times,
                filler_frames=more,
                spread=name == "long",
                workers=workers,
            )
            _save(made, folder / f"{name}.safetensors")
        logger.info("dialogues for %s recombined, %.0f s", split, _since(started_at))
    dataset.mark.write(described)
    return dataset


def _since(started_at: float) -> float:
    return time.monotonic() - started_at


def open_codec(device: torch.device) -> Codec:
    """Return the codec of the demonstration, which all dialogues are encoded with."""
    if not CODEC_FOLDER.is_dir():
        raise UserError(
            f"there is no {CODEC_FOLDER} here ({Path.cwd()}): dialogues are encoded by the "
            "demonstration's codec, in the folder of the project, where README.md is."
        )
    info = find_checkpoint(ModelPaths(hf_repo_id=str(CODEC_FOLDER), random_init=True))
    mimi = loaders.get_mimi(info.mimi_weights, info.mimi_config, num_codebooks=NUM_CODEBOOKS)
    return Codec(
        mimi,
        info.get_text_tokenizer(),
        moshi_codebooks=NUM_CODEBOOKS,
        user_codebooks=NUM_CODEBOOKS,
        device=device,
    )


def _silence(args: DatasetArgs, text: TextEncoder, codec: Codec) -> Silence:
    """Return what a side is when nothing is said on it."""
    num_samples = args.dialogues.num_frames * codec.mimi.frame_size
    codec.mimi.to(codec.device)
    with torch.no_grad(), codec.lock:
        codes = codec.mimi.encode(torch.zeros(1, 1, num_samples, device=codec.device))
    settled = codes[0, :, _SETTLED_FRAMES:]
    return Silence(text.text_padding_id, settled.to(torch.uint8).cpu().numpy())


def _speak(
    bank: Bank,
    args: DatasetArgs,
    split: texts.Split,
    count: int,
    text: TextEncoder,
    codec: Codec,
    workers: int,
) -> tuple[EncodedDialogues, list[Dialogue]]:
    global _composed
    _composed = (bank, args.dialogues, split, text)
    if workers == 1:
        made = [_compose(index) for index in range(count)]
    else:
        # Forked, so that the bank is not copied to each.
        with multiprocessing.get_context("fork").Pool(workers) as processes:
            made = processes.map(_compose, range(count), chunksize=_DIALOGUES_AT_ONCE)
    dialogues = [dialogue for dialogue, _, _ in made]
    streams = torch.from_numpy(np.stack([stream for _, stream, _ in made]))
    answers = torch.from_numpy(np.stack([answers for _, _, answers in made]))
    seed = 0 if split == "train" else 1
    codes = encode(bank, dialogues, args.dialogues, codec, seed=seed)
    return EncodedDialogues(streams, codes, answers), dialogues


_composed: tuple[Bank, DialogueArgs, texts.Split, TextEncoder]
"""What the processes of `_speak` share."""


def _compose(index: int) -> tuple[Dialogue, np.ndarray, np.ndarray]:
    """Return a dialogue, its text stream [T] and its answers [Q, len(Answer)]."""
    bank, args, split, text = _composed
    dialogue = compose(bank, args, split, random.Random(f"{split} {index}"))
    stream = text_of(bank, dialogue, args.num_frames, text)
    answers = np.full((args.num_facts, len(NO_ANSWER)), -1, np.int32)
    found = answers_of(dialogue, stream, value_tokens(text))
    answers[: len(found)] = np.array(found).reshape(-1, len(NO_ANSWER))
    return dialogue, stream, answers


def _save(spoken: EncodedDialogues, path: Path) -> None:
    tensors: dict[str, Any] = {
        field.name: getattr(spoken, field.name).contiguous() for field in dataclasses.fields(spoken)
    }
    write_whole(path, save(tensors))
