"""The same dialogues as stereo files and in every other layout, written for tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from data_tools import WORDS, speech_like, tiny_codec, write_jsonl

from finetune.config import DataArgs
from finetune.data import build_train_loader

DURATIONS_SEC = [2.0, 2.4, 1.2]
MAIN, USER = "SPEAKER_MAIN", "SPEAKER_OTHER"


def words_of(index: int) -> list[list[Any]]:
    """What is said in a dialogue: Moshi first, the user in the end."""
    said = [WORDS[(index + i) % len(WORDS)] for i in range(3)]
    return [
        [said[0], [0.1, 0.3], MAIN],
        [said[1], [0.4, 0.6], MAIN],
        [said[2], [0.8, 1.0], USER],
    ]


@pytest.fixture(scope="module")
def stereo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dialogues in moshi-finetune's layout: what all others are compared with."""
    folder = tmp_path_factory.mktemp("stereo")
    lines: list[Any] = []
    for index, duration_sec in enumerate(DURATIONS_SEC):
        samples = speech_like(duration_sec, 24000, seed=index)
        samples[round(0.7 * 24000) :, 0] *= 0.1  # Moshi has said its words
        soundfile.write(folder / f"{index}.wav", samples, 24000)
        (folder / f"{index}.json").write_text(json.dumps({"alignments": words_of(index)}))
        lines.append({"path": f"{index}.wav", "duration": duration_sec})
    return write_jsonl(folder / "all.jsonl", lines)


def samples_of(stereo: Path, index: int) -> np.ndarray:
    samples: np.ndarray = soundfile.read(stereo.parent / f"{index}.wav", dtype="int16")[0]
    return samples


def loaded(path: Path, **options: Any) -> torch.Tensor:
    """All segments, in order: `[segments, 17, 25]`."""
    args = DataArgs(train_data=str(path), num_workers=0, **options)
    loader = build_train_loader(
        args, tiny_codec(), duration_sec=2.0, batch_size=1, seed=0, device="cpu", store=None
    )
    codes = torch.cat([next(loader).codes for _ in range(loader.num_segments)])
    loader.close()
    return codes


def mono_pairs(folder: Path, stereo: Path) -> Path:
    """A mono file each, and a transcript each: its words are those of its file, whatever it calls
    the speaker."""
    lines: list[Any] = []
    for index, duration_sec in enumerate(DURATIONS_SEC):
        for side, (name, speaker) in enumerate([("moshi", MAIN), ("user", USER)]):
            path = folder / f"{index}_{name}.wav"
            soundfile.write(path, samples_of(stereo, index)[:, side], 24000)
            words = [[w, t, "SPEAKER_00"] for w, t, who in words_of(index) if who == speaker]
            path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
        names = {"path": f"{index}_moshi.wav", "user_path": f"{index}_user.wav"}
        lines.append(names | {"duration": duration_sec})
    return write_jsonl(folder / "pairs.jsonl", lines)


def parquet_codes(folder: Path, stereo: Path, *, with_text: bool = True) -> Path:
    """Codes and, where the text is not one of the streams, words."""
    rows: list[list[list[int]]] = []
    for index in range(3):
        segments = [row for row in _by_recording(stereo)[index]]
        codes = np.concatenate([row[:, row[0] >= 0] for row in segments], axis=1)
        rows.append(codes[0 if with_text else 1 :].tolist())
    kind = pyarrow.list_(pyarrow.list_(pyarrow.int16()))
    columns: dict[str, Any] = {"id": ["a", "b", "c"], "codes": pyarrow.array(rows, kind)}
    if not with_text:
        columns["alignments"] = [json.dumps(words_of(index)) for index in range(3)]
    path = folder / "codes.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def parquet_without_text(folder: Path, stereo: Path) -> Path:
    return parquet_codes(folder, stereo, with_text=False)


def _by_recording(stereo: Path) -> list[list[np.ndarray]]:
    rows = [row.numpy() for row in loaded(stereo)]
    return [rows[:1], rows[1:3], rows[3:]]


def saved_dataset(folder: Path, stereo: Path) -> Path:
    """Stereo audio, and a transcript in JSON."""
    return save_columns(
        folder,
        {
            "id": ["a", "b", "c"],
            "audio": [str(stereo.parent / f"{index}.wav") for index in range(3)],
            "alignments": [json.dumps({"alignments": words_of(index)}) for index in range(3)],
            "language": ["en"] * 3,
        },
        ["audio"],
    )


def saved_dataset_of_two(folder: Path, stereo: Path) -> Path:
    """A column of mono audio each, words as mappings, and lengths."""
    pairs = mono_pairs(folder, stereo).parent
    words = [
        [{"word": w, "start": t[0], "end": t[1], "speaker": who} for w, t, who in words_of(index)]
        for index in range(3)
    ]
    columns: dict[str, Any] = {
        side: [str(pairs / f"{index}_{side}.wav") for index in range(3)]
        for side in ("user", "moshi")
    }
    columns |= {"alignments": words, "duration": DURATIONS_SEC}
    return save_columns(folder, columns, ["moshi", "user"])


def save_columns(folder: Path, columns: dict[str, Any], audio: list[str]) -> Path:
    import datasets  # slow to import, for whoever runs other tests

    data = datasets.Dataset.from_dict(columns)
    for name in audio:
        data = data.cast_column(name, datasets.Audio())
    data.save_to_disk(folder / "saved", num_shards=min(2, len(data)))
    return folder / "saved"


def lhotse_cuts(folder: Path, stereo: Path) -> Path:
    """Cuts of whole recordings, as lhotse makes them."""
    return _cuts(folder, stereo)


def lhotse_parts(folder: Path, stereo: Path) -> Path:
    """Cuts out of longer recordings, of two mono files each."""
    return _cuts(folder, stereo, before_sec=0.5)


def _cuts(folder: Path, stereo: Path, before_sec: float = 0.0) -> Path:
    import lhotse

    recordings, supervisions = [], []
    for index, duration_sec in enumerate(DURATIONS_SEC):
        samples = samples_of(stereo, index)
        if before_sec:
            noise = np.full((round(before_sec * 24000), 2), 9, np.int16)
            samples = np.concatenate([noise, samples, noise])
            for side in range(2):
                soundfile.write(folder / f"{index}_{side}.wav", samples[:, side], 24000)
            sources = [
                lhotse.AudioSource("file", [side], str(folder / f"{index}_{side}.wav"))
                for side in range(2)
            ]
        else:
            sources = [lhotse.AudioSource("file", [0, 1], str(stereo.parent / f"{index}.wav"))]
        name = f"r{index}"
        total_sec = len(samples) / 24000
        recordings.append(lhotse.Recording(name, sources, 24000, len(samples), total_sec))
        for side, speaker in enumerate((MAIN, USER)):
            items = [
                lhotse.supervision.AlignmentItem(w, before_sec + start, end - start)
                for w, (start, end), who in words_of(index)
                if who == speaker
            ]
            supervisions.append(
                lhotse.SupervisionSegment(
                    f"{name}-{side}", name, before_sec, duration_sec, channel=side,
                    text=" ".join(item.symbol for item in items), alignment={"word": items},
                )
            )  # fmt: skip
    cuts = lhotse.CutSet.from_manifests(
        lhotse.RecordingSet.from_recordings(recordings),
        lhotse.SupervisionSet.from_segments(supervisions),
    )
    if before_sec:
        parts = zip(cuts, DURATIONS_SEC, strict=True)
        cuts = lhotse.CutSet.from_cuts(
            cut.truncate(offset=before_sec, duration=sec, preserve_id=True) for cut, sec in parts
        )
    cuts.to_file(folder / "train_cuts.jsonl.gz")
    return folder / "train_cuts.jsonl.gz"


LAYOUTS: list[Callable[[Path, Path], Path]] = [
    mono_pairs,
    parquet_codes,
    parquet_without_text,
    saved_dataset,
    saved_dataset_of_two,
    lhotse_cuts,
    lhotse_parts,
]
