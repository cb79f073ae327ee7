"""Fingerprints tell whether files are still those that a result is of."""

import hashlib
from pathlib import Path

_HASHED_BYTES = 2**20


def file_versions(*paths: Path) -> str:
    """Sizes and times of files, which tell whether they are still those that were read."""
    return " ".join(_version(path) for path in paths)


def _version(path: Path) -> str:
    status = path.stat() if path.is_file() else None
    return f"{status.st_size}@{status.st_mtime_ns}" if status else "none"


def checkpoint_fingerprint(checkpoint: Path) -> str:
    """Identifies a checkpoint, wherever it lies: by its configuration, and the names, sizes, first
    and last MiB of its files of weights."""
    inside = checkpoint / "consolidated"
    folder = inside if inside.is_dir() else checkpoint
    files = [*folder.glob("*.safetensors"), *folder.glob("*.json"), *checkpoint.glob("args.yaml")]
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HASHED_BYTES))
            file.seek(max(0, size - _HASHED_BYTES))
            digest.update(file.read(_HASHED_BYTES))
    return digest.hexdigest()[:16]
