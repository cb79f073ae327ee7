"""Files that may come from somebody else: read without running anything, and without leaving the
folder that they belong to. docs/security.md says what is trusted."""

import json
import math
import pickle
from collections import OrderedDict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

MAX_JSON_BYTES = 2**28


def stays_inside(name: str) -> bool:
    """Whether a name in a file leads to something in the folder of that file, by its letters alone:
    links that the owner of the folder has put there are his own business."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and "\0" not in name
        and ".." not in parts
        and not PurePosixPath(name).is_absolute()
        and not PureWindowsPath(name).drive
    )


def is_recording_name(name: str) -> bool:
    """Whether a line of data may name a recording so: in the folder of the file, or, as an absolute
    path, anywhere. A recording is only ever read as audio."""
    if PurePosixPath(name).is_absolute():
        return "\0" not in name
    return stays_inside(name)


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, but all that can be wrong is a ValueError: it nests too deep, or has numbers
    of more digits than Python converts, for example."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


_NO_NUMBERS = ("NaN", "Infinity", "-Infinity")


def without_nan(value: Any, *, as_text: bool = False) -> Any:
    """The same for a JSON file, which has no NaN and no infinity: null, or their names as text."""
    if isinstance(value, dict):
        return {key: without_nan(each, as_text=as_text) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each, as_text=as_text) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return name if as_text else None
    return value


def with_nan(value: Any) -> Any:
    """Back from `without_nan(…, as_text=True)`."""
    if isinstance(value, dict):
        return {key: with_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [with_nan(each) for each in value]
    return float(value) if isinstance(value, str) and value in _NO_NUMBERS else value


def read_json(path: Path) -> Any:
    """
    Raises:
        OSError, ValueError: it cannot be read, is larger than any such file, or is no JSON.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES / 2**20:.0f} MiB")
    return parse_json(path.read_bytes())


def safetensors_problem(path: Path) -> str | None:
    """Why a file is no safetensors file; None: it is one. Other formats of weights are pickles,
    which can run any code."""
    try:
        with safe_open(path, "pt"):
            return None
    except (OSError, SafetensorError) as error:
        return f"it is no safetensors file, and weights are read from no other: {error}"


class TensorReader(dcp.FileSystemReader):
    """DCP's reader of a folder, which takes from its metadata what describes tensors alone.

    DCP unpickles the metadata, and lets them name other files, and values that it unpickles in
    turn. Here they can name nothing but dense tensors in the folder's own files.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """
        Raises:
            ValueError: the metadata hold something else.
        """
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                found = _MetadataUnpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"its metadata cannot be read: {error}") from error
        _require_plain(found)
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{
        ("torch", name): getattr(torch, name)
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
    },
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
        )
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in metadata") from None


def _require_plain(found: Any) -> None:
    if not isinstance(found, Metadata):
        raise ValueError(f"its metadata are a {type(found).__name__}")
    # All else that DCP knows is unpickled when it is loaded, as any code.
    tensors = found.state_dict_metadata
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(entry, TensorStorageMetadata)
        for name, entry in tensors.items()
    ):
        raise ValueError("its metadata name something that is no tensor")
    places = found.storage_data
    if not isinstance(places, dict) or not all(
        isinstance(place, filesystem._StorageInfo)
        and isinstance(place.relative_path, str)
        and PurePosixPath(place.relative_path).name == place.relative_path
        and not place.transform_descriptors
        for place in places.values()
    ):
        raise ValueError("its metadata name a file elsewhere, or one that is stored in another way")
