"""The tensors that DCP has written, read without running anything that is in their files."""

import pickle
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


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
            raise ValueError(f"it is no list of tensors ({error})") from error
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
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, as another version of PyTorch might, or somebody "
                "who wants code to be run"
            ) from None


def _require_plain(found: Any) -> None:
    if not isinstance(found, Metadata):
        raise ValueError(f"it is no list of tensors, but a {type(found).__name__}")
    # All else that DCP knows is unpickled when it is loaded, as any code.
    tensors = found.state_dict_metadata
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(entry, TensorStorageMetadata)
        for name, entry in tensors.items()
    ):
        raise ValueError("it names something that is no tensor")
    places = found.storage_data
    if not isinstance(places, dict) or not all(
        isinstance(place, filesystem._StorageInfo)
        and isinstance(place.relative_path, str)
        and PurePosixPath(place.relative_path).name == place.relative_path
        and not place.transform_descriptors
        for place in places.values()
    ):
        raise ValueError("it names a file elsewhere, or one that is stored in another way")
