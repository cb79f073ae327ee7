"""The layouts that people have: each is checked, encoded and trained as the same stereo files."""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from data_tools import WORDS, speech_like, tiny_codec, write_jsonl
from recordings_tools import call, findings_of
from training_tools import logged, train

from finetune.config import DataArgs, load_config
from finetune.data import build_train_loader, open_source
from finetune.data.decoders import ForwardDecoder
from finetune.encode import encode_data
from finetune.errors import UserError

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


# --- the same dialogues in each layout ------------------------------------------------------------


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
    return _save(
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
    return _save(folder, columns, ["moshi", "user"])


def _save(folder: Path, columns: dict[str, Any], audio: list[str]) -> Path:
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


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda write: write.__name__)
def layout(
    request: pytest.FixtureRequest, stereo: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("layout")
    yield request.param.__name__, request.param(folder, stereo)


def test_it_is_what_the_stereo_files_are(layout: tuple[str, Path], stereo: Path) -> None:
    name, path = layout
    assert torch.equal(loaded(path), loaded(stereo))
    if name == "parquet_codes":
        return  # the text of one side alone
    both = loaded(path, swap_channels=True)
    assert torch.equal(both, loaded(stereo, swap_channels=True))


def test_main_channel(layout: tuple[str, Path], stereo: Path) -> None:
    """Where channels tell who is who, the right one may be Moshi; names of files and columns say it
    themselves."""
    name, path = layout
    right = loaded(path, main_channel="right")
    if name in ("mono_pairs", "saved_dataset_of_two"):
        assert torch.equal(right, loaded(stereo))
    elif name.startswith("lhotse"):
        assert torch.equal(right, loaded(stereo, swap_channels=True)[4:]), "and words go with them"
    else:
        assert torch.equal(right, loaded(stereo, main_channel="right"))


def test_it_is_checked_encoded_and_trained(
    layout: tuple[str, Path],
    stereo: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, path = layout
    for thoroughness in ([], ["--fast"]):
        status, found = findings_of(path, *thoroughness)
        assert status == 0 and set().union(*found.values()) == set() and len(found) > 1, found
    assert call("data", "stats", path, "--workers=1") == 0
    shown = call("data", "show", path, "--out", tmp_path / "a.png", "--duration_sec=1")
    if name.startswith("parquet"):
        assert shown == 1 and "has no audio, only codes" in capsys.readouterr().err
    else:
        samples = soundfile.read(tmp_path / "a.wav", dtype="int16")[0]
        assert shown == 0 and np.array_equal(samples[:24000], samples_of(stereo, 0)[:24000])
    options = {"data.train_data": path, "data.cache_dir": tmp_path / "cache"}
    num_segments = 0 if name.startswith("parquet") else 4
    for expected in (num_segments, 0):
        encode_data(load_config(config, options))
        assert f"{expected} of 4 segments are to be encoded" in capsys.readouterr().out
    evaluated: dict[str, Any] = {"do_eval": True, "eval_freq": 4, "health_sec": 0}
    options |= evaluated | {"data.eval_data": path, "data.num_workers": 1}
    train(config, tmp_path / "run", options)
    files = {"data.train_data": stereo, "data.eval_data": stereo}
    train(config, tmp_path / "same", evaluated | files)
    assert logged(tmp_path / "run") == logged(tmp_path / "same")
    assert logged(tmp_path / "run", kind="eval") == logged(tmp_path / "same", kind="eval")
    assert set(logged(tmp_path / "run", "encoded_segments")) == {0}


# --- mistakes -------------------------------------------------------------------------------------

PACKAGES = [
    (parquet_codes, "pyarrow", "parquet"),
    (saved_dataset, "pyarrow", "datasets"),
    (lhotse_cuts, "lhotse", "lhotse"),
]


@pytest.mark.parametrize(("write", "package", "extra"), PACKAGES)
def test_a_package_that_is_missing_is_one_message(
    tmp_path: Path,
    stereo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: Any,
    package: str,
    extra: str,
) -> None:
    path = write(tmp_path, stereo)
    monkeypatch.setitem(sys.modules, package, None)
    assert call("data", "check", path) == 1
    said = capsys.readouterr().err.split("error: ")
    assert said[1:] == [
        f"{path} needs {package}, which is not installed. Install it with: pip install "
        f"'moshi-ttt[{extra}]'\n"
    ]


def changed_cuts(change: Callable[[Any], Any]) -> Callable[[Path, Path], Path]:
    """Cuts whose first line is another one."""

    def write(folder: Path, stereo: Path) -> Path:
        lines = gzip.decompress(lhotse_parts(folder, stereo).read_bytes()).decode().splitlines()
        first = json.loads(lines[0])
        change(first)
        path = folder / "cuts.jsonl"
        path.write_text("\n".join([json.dumps(first), *lines[1:]]))
        return path

    return write


def from_the_start_of_the_cut(cut: Any) -> None:
    cut["start"] = 1.0
    for each in cut["supervisions"]:
        each["start"] = 0.55
        each["alignment"]["word"] = [["late", 0.6, 0.1, None]]


def pair_of(**lines: Any) -> Callable[[Path, Path], Path]:
    def write(folder: Path, stereo: Path) -> Path:
        path = mono_pairs(folder, stereo)
        first, *rest = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | lines), *rest]))
        return path

    return write


def mixed_transcript(folder: Path, stereo: Path) -> Path:
    path = mono_pairs(folder, stereo)
    (folder / "0_moshi.json").write_text(json.dumps({"alignments": words_of(0)}))
    return path


def longer_user(folder: Path, stereo: Path) -> Path:
    path = mono_pairs(folder, stereo)
    soundfile.write(folder / "0_user.wav", np.zeros(60_000), 24000)
    return path


def table_of(**columns: Any) -> Callable[[Path, Path], Path]:
    def write(folder: Path, stereo: Path) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
        return folder / "a.parquet"

    return write


def data_set_of(audio: list[str], **columns: Any) -> Callable[[Path, Path], Path]:
    def write(folder: Path, stereo: Path) -> Path:
        wav = str(stereo.parent / "0.wav")
        return _save(folder, {name: [wav] for name in audio} | columns, audio)

    return write


def several_data_sets(folder: Path, stereo: Path) -> Path:
    import datasets

    data = datasets.Dataset.from_dict({"a": [1]})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(folder / "saved")
    return folder / "saved"


def damaged(write: Callable[[Path, Path], Path], pattern: str = "") -> Callable[[Path, Path], Path]:
    def write_and_damage(folder: Path, stereo: Path) -> Path:
        path = write(folder, stereo)
        file = next(path.glob(pattern)) if pattern else path
        file.write_bytes(file.read_bytes()[:300])
        return path

    return write_and_damage


JSON_WORDS = json.dumps(words_of(0))
MISTAKES: dict[str, Callable[[Path, Path], Path]] = {
    "it is a MonoCut, and a dialogue is a MultiCut of two channels": changed_cuts(
        lambda cut: cut.update(type="MonoCut", channel=0)
    ),
    "malformed line, not a cut of lhotse": changed_cuts(lambda cut: cut.pop("id")),
    "the audio of the cut is of the type command: write it to files": changed_cuts(
        lambda cut: cut["recording"]["sources"][0].update(type="command", source="touch /tmp/x")
    ),
    "the audio of the cut is changed as it is loaded": changed_cuts(
        lambda cut: cut["recording"].update(
            transforms=[{"name": "Volume", "kwargs": {"factor": 2}}]
        )
    ),
    "their times seem to count from the start of the cut": changed_cuts(from_the_start_of_the_cut),
    "the line says 2.0 s, but": changed_cuts(lambda cut: cut.update(start=2.5, supervisions=[])),
    "nothing is left of the part that starts at 9 s": changed_cuts(
        lambda cut: cut.update(start=9.0, supervisions=[])
    ),
    "0_no.wav is missing": pair_of(user_path="0_no.wav"),
    "leads out of the folder of pairs.jsonl": pair_of(user_path="../stereo.wav"),
    "both channels of": pair_of(user_path="0_moshi.wav"),
    "both files of the dialogue have a transcript": mixed_transcript,
    "so that they may not start together": longer_user,
    "has no column codes": table_of(tokens=[[1, 2]]),
    "codes have shape [2] of int64": table_of(codes=[[1, 2]]),
    "codes have shape [2] of int64: expected": table_of(codes=[[[1, 2], [1]]]),
    "of double: expected whole numbers": table_of(codes=[[[0.5]] * 17]),
    "there is no column alignments": table_of(codes=[[[1] * 25] * 16]),
    "without start, end, speaker": table_of(codes=[[[1] * 25] * 16], alignments=[[{"word": "a"}]]),
    "cannot be read as Parquet": damaged(parquet_codes),
    "has 2 columns of audio (a, b): there must be one": data_set_of(
        ["a", "b"], alignments=[JSON_WORDS]
    ),
    "has no column alignments with the words": data_set_of(["audio"]),
    "is not valid JSON": data_set_of(["audio"], alignments=["["]),
    "is malformed: alignments[0] is 1": data_set_of(["audio"], alignments=[[1, 2]]),
    "is no list of words": data_set_of(["audio"], alignments=[7]),
    "is empty": data_set_of(["audio"], alignments=[None]),
    "the line says 5.0 s": data_set_of(["audio"], alignments=[JSON_WORDS], duration=[5.0]),
    "holds several data sets: test, train. Name one": several_data_sets,
    "cannot be read as Arrow": damaged(saved_dataset, "*.arrow"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_is_wrong_is_named(tmp_path: Path, stereo: Path, message: str) -> None:
    path = MISTAKES[message](tmp_path, stereo)
    with pytest.raises(UserError) as error:
        loaded(path)
    assert message in str(error.value), error.value
    assert str(tmp_path) in str(error.value)


def test_a_large_row_group_is_a_warning(
    tmp_path: Path,
    stereo: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = parquet_codes(tmp_path, stereo)
    loaded(path)
    assert "row group" not in caplog.text
    monkeypatch.setattr("finetune.data.layouts.parquet._MAX_GROUP_BYTES", 100)
    loaded(path)
    assert caplog.text.count("write smaller ones, with row_group_size=64") == 1


def test_a_stereo_file_as_one_of_two(tmp_path: Path, stereo: Path) -> None:
    path = pair_of(user_path=str(stereo.parent / "0.wav"))(tmp_path, stereo)
    with pytest.raises(UserError, match="is made of 2 channels, not mono: name files that hold"):
        loaded(path)


def test_a_manifest_of_lhotse_under_another_name(tmp_path: Path, stereo: Path) -> None:
    path = lhotse_cuts(tmp_path, stereo)
    path = path.rename(path.with_name("train.jsonl.gz"))
    with pytest.raises(UserError, match=r"give it a name such as cuts\.jsonl\.gz"):
        loaded(path)


def test_words_of_both_in_one_transcript(tmp_path: Path, stereo: Path) -> None:
    """Without a transcript beside the user's file, Moshi's holds the words of both."""
    path = mono_pairs(tmp_path, stereo)
    for index in range(3):
        (tmp_path / f"{index}_user.json").unlink()
        (tmp_path / f"{index}_moshi.json").write_text(json.dumps({"alignments": words_of(index)}))
    assert torch.equal(loaded(path, swap_channels=True), loaded(stereo, swap_channels=True))


def test_a_pair_may_have_two_rates_and_lengths(tmp_path: Path, stereo: Path) -> None:
    """Each file is resampled by itself, and the shorter one ends in silence."""
    path = mono_pairs(tmp_path, stereo)
    samples = samples_of(stereo, 0)[:, 1]
    soundfile.write(tmp_path / "0_user.wav", samples[:-960:2], 12000)
    assert findings_of(path)[1]["0_moshi"] == set()
    recording = open_source(path, "data").entries()[0].recording
    assert recording is not None
    audio = recording.read_audio(0, 10**6, 24000)
    assert audio.shape == (2, 48000) and not audio[1, -960:].any() and audio[1, -1200:].any()


def test_a_pair_that_is_decoded_from_its_start_is_decoded_once(
    tmp_path: Path, stereo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mono_pairs(tmp_path, stereo)
    for side in ("moshi", "user"):
        samples, rate_hz = soundfile.read(tmp_path / f"0_{side}.wav")
        soundfile.write(tmp_path / f"0_{side}.mp3", samples, rate_hz)
    path.write_text(path.read_text().replace('0_moshi.wav"', '0_moshi.mp3"')
                    .replace('0_user.wav"', '0_user.mp3"'))  # fmt: skip
    recording = open_source(path, "data").entries()[0].recording
    assert recording is not None
    restarts: list[Any] = []
    restart = ForwardDecoder._restart

    def noted(decoder: ForwardDecoder) -> None:
        restarts.append(decoder.path)
        restart(decoder)

    monkeypatch.setattr(ForwardDecoder, "_restart", noted)
    parts = [recording.read_audio(start, 4800, 24000) for start in range(0, 48000, 4800)]
    assert sorted(path.name for path in restarts) == ["0_moshi.mp3", "0_user.mp3"]
    assert torch.equal(torch.cat(parts, dim=1), recording.read_audio(0, 48000, 24000))
