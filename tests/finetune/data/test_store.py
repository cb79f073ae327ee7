"""The store under the cache of codes: what is kept in it, and entries that do not count."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_tools import REPOSITORY

from finetune.data.store import Store, make_key
from finetune.errors import UserError

KEYS = [make_key("key", number) for number in range(4)]


def filled(folder: Path, *numbers: Any) -> Store:
    store = Store(folder)
    for number in numbers:
        store.put(KEYS[number], bytes([number]) * 16)
        store.append(make_key("blob", number), b"blob" * number)
    return store


def blobs(store: Store) -> dict[int, bytes]:
    found = {n: store.find(make_key("blob", n)) for n in range(4)}
    return {n: blob.read() for n, blob in found.items() if blob is not None}


def test_what_is_kept_is_there_for_others_and_later(tmp_path: Path) -> None:
    first, second = filled(tmp_path, 1), filled(tmp_path, 2, 3)
    assert blobs(first) == {1: b"blob"}  # it has not looked since
    assert blobs(second) == {1: b"blob", 2: b"blobblob", 3: b"blobblobblob"}
    later = Store(tmp_path)
    assert blobs(later) == blobs(second)
    assert later.get(KEYS[3]) == b"\3" * 16 and later.get(KEYS[0]) is None


def test_others_are_seen_without_opening_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.data.store._REFRESH_SEC", 0.0)
    reader, writer = Store(tmp_path), Store(tmp_path)
    for number in (1, 2):
        writer.append(make_key("blob", number), b"blob" * number)
        reader.refresh()
        assert len(blobs(reader)) == number


@pytest.mark.parametrize("cut", range(1, 36, 5))
def test_an_entry_that_was_being_written_does_not_count(tmp_path: Path, cut: int) -> None:
    filled(tmp_path, 1, 2)
    (index,) = tmp_path.glob("*.index")
    index.write_bytes(index.read_bytes()[:-cut])
    assert blobs(Store(tmp_path)) == {1: b"blob"}


def test_a_damaged_entry_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, 1, 2)
    (index,) = tmp_path.glob("*.index")
    content = bytearray(index.read_bytes())
    content[1 * 36 + 20] ^= 1  # the place of the first blob
    index.write_bytes(content)
    assert blobs(Store(tmp_path)) == {2: b"blobblob"}
    assert "is damaged; what 1 of its entries held" in caplog.text


def test_an_end_that_looks_like_zeros_for_a_moment_is_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As what was just appended may on NFS."""
    filled(tmp_path, 1, 2, 3)
    (index,) = tmp_path.glob("*.index")
    whole = index.read_bytes()
    index.write_bytes(whole[: 3 * 36] + bytes(3 * 36))
    reader = Store(tmp_path)
    assert blobs(reader) == {1: b"blob"} and reader.get(KEYS[2]) == b"\2" * 16
    index.write_bytes(whole)
    reader.refresh(at_once=True)
    assert list(blobs(reader)) == [1, 2, 3]
    assert not caplog.text


KILLED_WHILE_WRITING = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
# The file alone: the package would import torch.
spec = spec_from_file_location("store", "finetune/data/store.py")
module = module_from_spec(spec)
sys.modules["store"] = module
spec.loader.exec_module(module)
Store, make_key = module.Store, module.make_key
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(10**9):
    store.append(make_key(number), number.to_bytes(8, "little") * 5000)
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": "."},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    while sum(path.stat().st_size for path in tmp_path.iterdir()) < 3_000_000:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = Store(tmp_path)
    number = 0
    while blob := store.find(make_key(number)):
        assert blob.read() == number.to_bytes(8, "little") * 5000
        number += 1
    assert number >= 70
    store.append(KEYS[0], b"goes on")
    last = Store(tmp_path).find(KEYS[0])
    assert last is not None and last.read() == b"goes on"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path, 1)
    assert store._own is not None
    store._own.blobs = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for number in (2, 3):
        store.append(make_key("blob", number), b"blob" * number)
        store.put(KEYS[number], b"\0" * 16)
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    assert blobs(store) == blobs(Store(tmp_path)) == {1: b"blob"}
    store._own.blobs.close()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*file/x cannot be used"):
        Store(tmp_path / "file/x")
