"""Manifest of a checkpoint: the record that commits it. This module imports no torch.

A checkpoint exists if and only if its manifest exists: it is written last and removed first. It lists every file with
size and digest, so that damage is detected before anything is parsed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from blake3 import blake3

from everstep.checked_json import mapping, parse, record, shown, text, whole
from everstep.errors import CheckpointError
from everstep.run_folder import CHECKPOINTS, MANIFEST, RunFolder
from everstep.run_id import run_id
from everstep.security.signing import is_on
from everstep.storage import Storage, read_limited
from everstep.storage.names import is_plain, leads_out
from everstep.trainer.checkpoint.manifest_fields import check_types
from everstep.trainer.checkpoint.signature import (
    UNBOUND,
    Binding,
    binding_fault,
    bound_part,
    sign,
    signature_fault,
)
from everstep.trainer.data.ordering.exclusion import Exclusion

SET_ASIDE = "manifest.set-aside.json"
TENSORS = "tensors.json"
MOST_FILES = 1 << 20
LARGEST_MANIFEST = 256 << 20
"""Bytes: room for MOST_FILES."""
FORMAT = 3
"""Format 1 had SHA-256, which took as long as the disk write; 2 had only numbers of the optimizer."""
READ_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and BLAKE3 (256 bits, as `b3sum` prints it) of one file of a checkpoint."""

    bytes: int
    blake3: str


Files = dict[str, FileRecord]
"""Files of a checkpoint by name."""


def record_of(data: bytes) -> FileRecord:
    return FileRecord(len(data), blake3(data).hexdigest())


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint other than its tensors."""

    step: int
    attempt: int
    samples: int
    world: int
    parallel: str
    time: float
    config_digest: str
    data_digest: str
    progress: dict[str, Any]
    values: dict[str, Any]
    """State that is no tensor: the model's extra state, the optimizer's counters, the state of plug-ins."""
    metric: float | None
    """The held-out metric as last measured, for `keep_best`."""
    files: Files = field(default_factory=dict)
    format: int = FORMAT
    signature: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.bytes for record in self.files.values())

    def to_json(self) -> bytes:
        """Return the JSON bytes, signed if there is a key; `signature` is then the binding before."""
        bound = bound_part(self.signature) or str(UNBOUND)
        return _lines({**asdict(self), "signature": sign(self._signed(bound), bound)})

    def _signed(self, bound: str) -> bytes:
        return _lines({**asdict(self), "signature": bound})

    def signature_fault(self, run: str | None) -> str:
        """Return the reason why this manifest may not be trusted in the run with this id; empty if it may."""
        fault = signature_fault(self._signed(bound_part(self.signature)), self.signature)
        return fault or binding_fault(self.signature, run)

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Parse a manifest.

        Raises:
            OtherFormatError: another version of everstep wrote it.
            ValueError: the bytes are not a manifest.
        """
        fields = mapping(parse(data), "it")
        if type(fields.get("format")) is not int:
            raise ValueError("not a manifest")
        if fields["format"] != FORMAT:
            raise OtherFormatError(fields["format"])
        unknown = set(fields) ^ {key.name for key in dataclasses.fields(Manifest)}
        if unknown:
            raise ValueError(f"it lacks fields, or has others: {shown(sorted(unknown)[0])}")
        check_types(fields)
        files = mapping(fields["files"], "its files", MOST_FILES)
        if TENSORS not in files:
            raise ValueError(f"it lists no {TENSORS}")
        return Manifest(**{**fields, "files": {name: _file(name, record) for name, record in files.items()}})


def _file(name: str, described: object) -> FileRecord:
    if not is_plain(name):
        raise ValueError(f"{shown(name)} lies outside the checkpoint, or is no name of a file")
    size, digest = record(described, f"its file {shown(name)}", "bytes", "blake3")
    whole(size, f"the size of {shown(name)}")
    return FileRecord(size, text(digest, f"the digest of {shown(name)}", 64))


@dataclass(frozen=True)
class ManifestFacts:
    """Facts that are the same in all manifests of one attempt.

    They are computed once, since the digest of a config takes 20 ms.
    """

    attempt: int
    global_batch: int
    parallel: str
    config_digest: str
    data_digest: str
    binding: Binding = UNBOUND
    excluded: Exclusion = field(default_factory=Exclusion)


def _lines(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()


class OtherFormatError(ValueError):
    """A manifest that another version of everstep wrote: not damaged, but not readable by this version."""

    def __init__(self, found: int) -> None:
        step = "start a new run" if found < FORMAT else "install a newer one"
        super().__init__(
            f"{MANIFEST} has format {found}, this everstep reads format {FORMAT}; "
            f"go on with the everstep that wrote it, or {step}"
        )


@dataclass(frozen=True)
class Committed:
    """A checkpoint with a manifest that can be read; its files are verified when they are read."""

    path: str
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def attempt(self) -> int:
        return self.manifest.attempt


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that cannot be restored, and the reason: its manifest or one of its files."""

    path: str
    step: int
    attempt: int
    why: str
    refused: bool = False
    """True if it is not known to be damaged but may not be read; it is neither skipped nor set aside."""


CheckpointRef = Committed | Damaged
"""A checkpoint with a manifest, as it was listed."""


def parse_name(name: str) -> tuple[int, int] | None:
    """Return (step, attempt) of a checkpoint folder's name."""
    parts = name.split("-")
    if len(parts) == 4 and parts[0] == "step" and parts[2] == "attempt" and parts[1].isdigit() and parts[3].isdigit():
        return int(parts[1]), int(parts[3])
    return None


def folders(run: RunFolder) -> list[tuple[int, int, str]]:
    """Return (step, attempt, path) of all checkpoint folders, with or without manifest, newest step first."""
    named = ((parse_name(name), name) for name in run.storage.names(CHECKPOINTS))
    return sorted(((*key, f"{CHECKPOINTS}/{name}") for key, name in named if key is not None), reverse=True)


def candidates(run: RunFolder) -> Iterator[CheckpointRef]:
    """Yield the committed checkpoints in the run's line, newest first."""
    lineage, expected = run.lineage(), signed_run(run)
    for step, attempt, path in folders(run):
        if not lineage.counts(step, attempt):
            continue
        try:
            data = read_manifest(run.storage, path)
        except FileNotFoundError:
            continue
        yield parse_checkpoint(path, step, attempt, data, expected)


def signed_run(run: RunFolder) -> str | None:
    """Return the id of the run that signatures must be for; None without a key."""
    return run_id(run) if is_on() else None


def read_manifest(storage: Storage, path: str) -> bytes:
    """Return a manifest's bytes; none if it is a link out of its folder, or larger than any manifest.

    Raises:
        FileNotFoundError: there is no manifest.
    """
    if leads_out(storage, path, MANIFEST):
        return b""
    try:
        return read_limited(storage, f"{path}/{MANIFEST}", LARGEST_MANIFEST)
    except ValueError:
        return b""


def parse_checkpoint(path: str, step: int, attempt: int, data: bytes, expected: str | None) -> CheckpointRef:
    """Return the checkpoint of a folder, from the bytes of its manifest.

    Args:
        expected: `signed_run` of its run.
    """
    try:
        if not data:
            raise ValueError(f"it is empty, a link out of its folder, or larger than {LARGEST_MANIFEST} bytes")
        manifest = Manifest.from_json(data)
        if (manifest.step, manifest.attempt) != (step, attempt):
            raise ValueError(f"it speaks of step {manifest.step}, attempt {manifest.attempt}")
    except OtherFormatError as error:
        return Damaged(path, step, attempt, str(error), refused=True)
    except ValueError as error:
        return Damaged(path, step, attempt, f"{MANIFEST} is damaged: {error}")
    if fault := manifest.signature_fault(expected):
        return Damaged(path, step, attempt, f"{MANIFEST}: {fault}", refused=True)
    return Committed(path, manifest)


def find_fault(storage: Storage, path: str, files: Iterable[tuple[str, FileRecord]]) -> str:
    """Return the first fault of these files of a checkpoint; an empty string if all are as written."""
    for name, expected in files:
        if leads_out(storage, path, name):
            return f"{name} is a link out of the checkpoint"
        try:
            size = storage.size(f"{path}/{name}")
            if size != expected.bytes:
                return f"{name} has {size} bytes, not {expected.bytes}"
            if file_digest(storage, f"{path}/{name}", size) != expected.blake3:
                return f"{name} does not match its BLAKE3"
        except FileNotFoundError:
            return f"{name} is missing"
    return ""


def file_digest(storage: Storage, path: str, size: int) -> str:
    digest = blake3()
    for start in range(0, size, READ_BYTES):
        digest.update(storage.read_range(path, start, min(size, start + READ_BYTES)))
    return digest.hexdigest()


def check_format(run: RunFolder, found: CheckpointRef) -> None:
    """Raise CheckpointError for a manifest of another version or another signer.

    Skipping such a checkpoint would lose what was trained since.
    """
    if isinstance(found, Damaged) and found.refused:
        raise CheckpointError(f"{run.url}/{found.path}: {found.why}")


def set_aside(run: RunFolder, path: str) -> None:
    """Rename a damaged checkpoint's manifest, so that it counts no more. Its files stay for inspection."""
    run.storage.move(f"{path}/{MANIFEST}", f"{path}/{SET_ASIDE}")


def was_set_aside(run: RunFolder) -> list[str]:
    return [path for _, _, path in folders(run) if run.storage.exists(f"{path}/{SET_ASIDE}")]
