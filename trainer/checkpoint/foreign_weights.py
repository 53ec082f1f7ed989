"""Weights of other programs: safetensors, Hugging Face folders, `torch.save` files, DCP folders.

No pickle is run: `torch.load` takes weights only, and the metadata of DCP may name only its own classes.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from everstep.checked_json import mapping, parse, shown
from everstep.errors import CheckpointError
from everstep.run_folder import CONFIG, MANIFEST
from everstep.storage.names import is_plain
from everstep.trainer.checkpoint.safetensors_file import read_header

INDEX, SINGLE, METADATA = "model.safetensors.index.json", "model.safetensors", ".metadata"
LARGEST_INDEX = 1 << 28
WRAPPERS = ("state_dict", "model")
"""Entries of a `torch.save` file that hold the weights, if its tensors are not its own entries."""
_DCP = "torch.distributed.checkpoint."
_CLASSES = {
    "Metadata": f"{_DCP}metadata",
    "BytesStorageMetadata": f"{_DCP}metadata",
    "StorageMeta": f"{_DCP}metadata",
    "TensorStorageMetadata": f"{_DCP}metadata",
    "MetadataIndex": f"{_DCP}metadata",
    "TensorProperties": f"{_DCP}metadata",
    "_MEM_FORMAT_ENCODING": f"{_DCP}metadata",
    "ChunkStorageMetadata": f"{_DCP}metadata",
    "_StorageInfo": f"{_DCP}filesystem",
    "_get_layout": "torch.serialization",
    "Size": "torch",
    "PosixPath": "pathlib",
    "OrderedDict": "collections",
}
"""Names that the metadata of a DCP folder may import, by name."""


@dataclass(frozen=True)
class ForeignTensor:
    """One tensor of a source, which is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class ForeignWeights:
    """All tensors of a source, by name."""

    kind: str
    tensors: Mapping[str, ForeignTensor]


def open_foreign(url: str) -> ForeignWeights | None:
    """Return the weights at a path, or None if it holds none of another program.

    Raises:
        CheckpointError: the files are damaged, or name code.
    """
    path = Path(url).expanduser()
    try:
        if path.is_file():
            return _safetensors([path], "safetensors") if path.suffix == ".safetensors" else _torch_file(path)
        if any((path / own).exists() for own in (MANIFEST, CONFIG)):
            return None  # Everstep's own: whatever lies beside it is not opened
        if (path / INDEX).is_file():
            return _indexed(path)
        if (path / SINGLE).is_file():
            return _safetensors([path / SINGLE], "Hugging Face")
        return _dcp_folder(path) if (path / METADATA).is_file() else None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"init_from={url}: {' '.join(str(error).split())}") from error


def _safetensors(files: list[Path], kind: str) -> ForeignWeights:
    found: dict[str, ForeignTensor] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in found:
                raise ValueError(f"{shown(name)} is in two files")
            found[name] = ForeignTensor(stored.shape, stored.dtype, stored.read)
    return ForeignWeights(kind, found)


def _indexed(folder: Path) -> ForeignWeights:
    if (size := (folder / INDEX).stat().st_size) > LARGEST_INDEX:
        raise ValueError(f"{INDEX} has {size} bytes (limit {LARGEST_INDEX})")
    index = mapping(parse((folder / INDEX).read_bytes()), INDEX)
    wanted = mapping(index.get("weight_map"), f"weight_map of {INDEX}")
    for file in wanted.values():
        if not is_plain(file) or not file.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {shown(file)}, which is no safetensors file of the folder")
        if not (folder / file).is_file():
            raise ValueError(f"{INDEX} names {file}, which is missing")
    found = _safetensors([folder / file for file in sorted(set(wanted.values()))], "Hugging Face")
    if missing := sorted(wanted.keys() - found.tensors.keys()):
        raise ValueError(f"{INDEX} names {missing[0]}, which no file has ({len(missing)} of that kind)")
    return found


def _torch_file(path: Path) -> ForeignWeights:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split()).partition(". ")[0][:200]
        raise ValueError(
            f"it is no file of weights that torch.load reads with weights_only=True ({said}); save model.state_dict()"
        ) from error
    for name in WRAPPERS:
        if isinstance(saved, dict) and isinstance(saved.get(name), dict):
            saved = saved[name]
            break
    if not isinstance(saved, dict):
        raise ValueError(f"it holds a {type(saved).__name__}, not a state_dict; save model.state_dict()")
    found = {
        str(name): ForeignTensor(tuple(value.shape), value.dtype, value.detach)
        for name, value in saved.items()
        if isinstance(value, Tensor)
    }
    if not found:
        raise ValueError(f"it has no tensors, but {shown(sorted(map(str, saved)))}; save model.state_dict()")
    return ForeignWeights("torch.save", found)


def _dcp_folder(folder: Path) -> ForeignWeights:
    reader = _Reader(folder)
    metadata = reader.read_metadata()

    def reading(name: str, entry: TensorStorageMetadata) -> Callable[[], Tensor]:
        def read() -> Tensor:
            target = torch.empty(entry.size, dtype=entry.properties.dtype)
            with warnings.catch_warnings():  # that it reads alone, on purpose
                warnings.simplefilter("ignore", UserWarning)
                load({name: target}, storage_reader=_Reader(folder), no_dist=True)
            return target

        return read

    found = {
        name: ForeignTensor(tuple(entry.size), entry.properties.dtype, reading(name, entry))
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return ForeignWeights("DCP", found)


class _Reader(FileSystemReader):
    """Reader of a DCP folder whose metadata can name neither code nor files elsewhere."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (self._folder / METADATA).open("rb") as file:
            try:
                metadata = _OwnClasses(file).load()
            except ValueError:
                raise
            except Exception as error:
                raise ValueError(f"{METADATA} is damaged: {type(error).__name__}: {error}") from error
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError(f"{METADATA} is not that of a DCP folder")
        for stored in metadata.storage_data.values():
            if not is_plain(stored.relative_path):
                raise ValueError(f"{METADATA} names {shown(stored.relative_path)}, which is no file of the folder")
        return metadata


class _OwnClasses(pickle.Unpickler):
    """Unpickler of the classes that DCP's metadata consists of, and of no others."""

    def find_class(self, module: str, name: str) -> Any:
        if _CLASSES.get(name) == module or (module == "torch" and isinstance(vars(torch).get(name), torch.dtype)):
            return super().find_class(module, name)
        raise ValueError(f"{METADATA} names {module}.{name}, which is no part of DCP's metadata; it was not run")
