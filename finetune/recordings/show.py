"""A segment is shown, to look at and listen to: `moshi-ttt data show`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.config import TrainArgs, load_config
from finetune.data import (
    FRAME_RATE_HZ,
    FileProblem,
    Reading,
    Recording,
    Segment,
    Word,
    count_frames,
    list_entries,
)
from finetune.errors import UserError, counted
from finetune.kept import mark_of, require_not_read, write_wav
from finetune.model import build_codec, find_checkpoint, plan_model
from finetune.recordings.listing import options_of_list
from finetune.recordings.options import SHOW, ShowOptions
from finetune.recordings.picture import draw
from finetune.recordings.shown import SAMPLE_RATE_HZ, Shown, Streams
from finetune.step import LossWeights, target_weights


def show_segment(options: ShowOptions, overrides: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Draw a segment, and write its sound beside the picture.

    Returns:
        Lines to print, and whether the recording has no error.

    Raises:
        UserError: there is no such line, or it cannot be read, or nothing can be written.
    """
    args = load_config(options.config, overrides) if options.config is not None else None
    of_data = args.data if args else options_of_list(overrides, "--config, a run's YAML file")
    reading = Reading.of(of_data, training=True)
    recording = _entry(options.file, options.index, reading)
    require_not_read(options.outputs(), recording.files)
    shown = _read(recording, options, args)
    again = ", in the place of those of an earlier call" if options.out.exists() else ""
    draw(shown, options.out)
    write_wav(options.sound, shown.samples.T, SAMPLE_RATE_HZ, comment=mark_of(SHOW))
    lines = [f"{each.severity}: {each} [{each.code}]" for each in shown.findings]
    if args is not None and shown.streams is None:
        lines.append(
            f"tokens and codes are not shown: moshi_paths.hf_repo_id {args.moshi_paths.hf_repo_id} "
            f"is no folder on this machine (a path starts from the current folder, {Path.cwd()})"
        )
    lines += [
        f"wrote {options.out}",
        f"wrote {options.sound}   left Moshi, right the user{again}",
    ]
    return lines, all(each.severity != "error" for each in shown.findings)


def _entry(path: Path, index: int, reading: Reading) -> Recording:
    entries = list_entries(path, "--file", reading)
    if index >= len(entries):
        raise UserError(
            f"--index {index}: {path} has {counted(len(entries), 'recording')}, numbered from 0."
        )
    entry = entries[index]
    if entry.recording is None:
        raise UserError(f"{entry.origin}: {entry.problem}")
    return entry.recording


def _read(recording: Recording, options: ShowOptions, args: TrainArgs | None) -> Shown:
    found = recording.inspect(thorough=True)
    start_frame = math.floor(options.start_sec * FRAME_RATE_HZ + 1e-6)
    if found.duration_sec and start_frame >= found.duration_sec * FRAME_RATE_HZ:
        raise UserError(
            f"--start_sec {options.start_sec:g}: {recording.path} lasts {found.duration_sec:.2f} s."
        )
    start_sec = start_frame / FRAME_RATE_HZ
    num_frames = count_frames(options.duration_sec)
    start = round(start_sec * SAMPLE_RATE_HZ)
    num_samples = round(num_frames / FRAME_RATE_HZ * SAMPLE_RATE_HZ)
    try:
        samples = recording.read_audio(start, num_samples, SAMPLE_RATE_HZ).numpy()
    except FileProblem as problem:
        raise UserError(str(problem)) from None
    try:
        words = recording.read_words()
    except FileProblem:
        words = []  # the inspection has said so
    end_sec = start_sec + samples.shape[1] / SAMPLE_RATE_HZ
    inside = [word for word in words if word.end_sec > start_sec and word.start_sec < end_sec]
    segment = Segment(
        torch.from_numpy(samples), torch.zeros(0), num_frames, recording.path, start_sec
    )
    streams = _streams(args, segment, words) if args is not None else None
    return Shown(recording, start_sec, samples, inside, found.findings, streams)


def _streams(args: TrainArgs, segment: Segment, words: list[Word]) -> Streams | None:
    """Return what a run is fed; None if its tokenizer and Mimi would have to be downloaded."""
    repo = args.moshi_paths.hf_repo_id
    if repo and not Path(repo).is_dir():
        return None
    info = find_checkpoint(args.moshi_paths, with_weights=False)
    model = plan_model(args, info)
    codec = build_codec(info, model, "cpu", word_start=args.data.word_start)
    frame_samples = codec.sample_rate_hz / FRAME_RATE_HZ
    num_valid = math.ceil(segment.audio.shape[1] / frame_samples)
    start_frame = round(segment.start_sec * FRAME_RATE_HZ)
    segment.text_tokens = torch.tensor(codec.text.stream(words, start_frame, num_valid))
    codes = codec.encode([segment])
    weights = LossWeights(args.text_padding_weight, args.first_codebook_weight_multiplier)
    text_weights, audio_weights = target_weights(model, codes, weights)
    special = {codec.text.text_padding_id: "", codec.text.end_of_text_padding_id: "·", -1: ""}
    tokenizer = codec.text.tokenizer
    text = [
        special[token] if token in special else tokenizer.id_to_piece(token).replace("▁", " ")
        for token in codes[0, 0].tolist()
    ]
    return Streams(text, codes[0, 1:].numpy(), text_weights[0, 0].numpy(), audio_weights[0].numpy())
