"""The folder of a run: which checkpoints there are, which of them are whole, how one comes and goes.

A checkpoint is a folder ``00007-step-1200``: the seventh that was saved, after step 1200. Order is that of saving, so
that a run that went back to an early step goes on from what it saved last. Names that begin with a dot are litter of a
save or a removal that did not come to its end.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distopt.checkpoint.files import Digest, check, read_bytes, sync_folder, write
from distopt.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows has none, and then nothing keeps two runs apart.
    fcntl = None

FORMAT = 1
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
_ENTRY = re.compile(r"(\d{5,})-step-(\d+)")
_FILE = re.compile(r"[A-Za-z_]\w*\.pt|rank-\d+\.pt", re.ASCII)
_LITTER = (".saving-", ".removing-")
_LIMIT = 1 << 26
"""Bytes of the largest manifest that is looked into."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Args:
        step: after which it was saved.
        world_size: number of ranks that saved it.
        files: what each of its files is to hold.
    """

    step: int
    world_size: int
    files: Mapping[str, Digest]


def entries(folder: Path) -> list[Path]:
    """All checkpoints of a folder, whole or not, the newest first."""
    found = [name for name in _names(folder) if _ENTRY.fullmatch(name)]
    return [folder / name for name in sorted(found, key=lambda name: (_serial(name), name), reverse=True)]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror or error}") from error


def step_of(entry: Path) -> int:
    """The step in the name of a checkpoint.

    Example:
        >>> step_of(Path("run/00007-step-1200"))
        1200
    """
    return int(entry.name.partition("-step-")[2])


def _serial(name: str) -> int:
    return int(name.partition("-")[0])


def examine(entry: Path) -> Manifest:
    """Read every byte of a checkpoint.

    Raises:
        CheckpointError: it is not what was saved; the message names the file.
    """
    manifest = read_manifest(entry)
    for name, digest in manifest.files.items():
        check(entry / name, digest)
    return manifest


def read_manifest(entry: Path) -> Manifest:
    """Read what a checkpoint is to hold, and see that it holds these files and no others.

    Raises:
        CheckpointError: the manifest is damaged, or the files are others.
    """
    content = read_bytes(entry / MANIFEST, _LIMIT)
    if read_bytes(entry / SEAL, _LIMIT) != _seal(content):
        raise CheckpointError(f"{entry / MANIFEST} is damaged: its SHA-256 is not that in {SEAL}")
    try:
        manifest = _parsed(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{entry / MANIFEST} is not a manifest of format {FORMAT}") from error
    if manifest.step != step_of(entry):
        raise CheckpointError(f"{entry} is damaged: its manifest is of step {manifest.step}")
    there, wanted = set(_names(entry)), {MANIFEST, SEAL, *manifest.files}
    for name in sorted(there ^ wanted):
        raise CheckpointError(f"{entry / name} is {'missing' if name in wanted else 'not part of the checkpoint'}")
    return manifest


def _parsed(body: Any) -> Manifest:
    if body["format"] != FORMAT or not all(_FILE.fullmatch(name) for name in body["files"]):
        raise ValueError
    digests = {name: Digest(int(d["bytes"]), str(d["sha256"])) for name, d in body["files"].items()}
    return Manifest(int(body["step"]), int(body["world_size"]), digests)


def _seal(content: bytes) -> bytes:
    """A line that ``sha256sum --check`` understands."""
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()


@contextlib.contextmanager
def begin(folder: Path) -> Generator[Path]:
    """Make an empty folder to write a checkpoint into, beside the others; it is gone afterwards unless published.

    What crashed saves and removals left behind is removed. For one process at a time.

    Raises:
        CheckpointError: the system refused, or another process saves here.
    """
    with contextlib.ExitStack() as stack:
        try:
            if not folder.is_dir():
                os.makedirs(folder, exist_ok=True)
                sync_folder(folder.parent)
            stack.enter_context(_locked(folder))
            for name in os.listdir(folder):
                if name.startswith(_LITTER):
                    shutil.rmtree(folder / name)
            serial = max((_serial(entry.name) for entry in entries(folder)), default=0) + 1
            draft = folder / f".saving-{serial:05}"
            os.mkdir(draft)
        except OSError as error:
            raise CheckpointError(f"{error.filename or folder}: {error.strerror or error}") from error
        stack.callback(shutil.rmtree, draft, ignore_errors=True)
        yield draft


@contextlib.contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Keep others from saving here; the system lets go if we die."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(f"{folder}: another process is saving a checkpoint here") from error
            except OSError:
                pass  # Some network file systems have no locks on folders.
        yield
    finally:
        with contextlib.suppress(OSError):  # Nothing was written through it.
            os.close(descriptor)


def publish(draft: Path, manifest: Manifest) -> Path:
    """Seal what was written and make it the current checkpoint, in one atomic step.

    Args:
        draft: from `begin`, with all files of the manifest.
        manifest: of the checkpoint.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: the system refused.
    """
    for name, digest in manifest.files.items():
        # Other ranks wrote some of them, which proves nothing if the folder is not the same one for all.
        if not (draft / name).is_file() or (draft / name).stat().st_size != digest.bytes:
            raise CheckpointError(f"{name} did not arrive in {draft.parent}: do all ranks share this folder?")
    body = {"format": FORMAT, "torch": torch.__version__, **asdict(manifest)}
    content = (json.dumps(body, indent=1) + "\n").encode()
    write(draft / MANIFEST, content)
    write(draft / SEAL, _seal(content))
    sync_folder(draft)
    entry = draft.parent / f"{draft.name.removeprefix('.saving-')}-step-{manifest.step}"
    try:
        os.rename(draft, entry)
    except OSError as error:
        raise CheckpointError(f"{entry}: {error.strerror or error}") from error
    sync_folder(entry.parent)
    return entry


def retain(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, never the newest that is whole.

    Args:
        folder: of the run.
        keep: how many to leave, at least 1.

    Raises:
        CheckpointError: one could not be removed.
    """
    everything = entries(folder)
    if len(everything) <= keep:
        return
    whole = next((entry for entry in everything if is_whole(entry)), None)
    for entry in everything[keep:]:
        # Without a whole one, the remains of each may be worth something to somebody.
        if whole is not None and entry != whole:
            gone = folder / f".removing-{entry.name}"
            try:
                os.rename(entry, gone)
                shutil.rmtree(gone)
            except OSError as error:
                raise CheckpointError(f"{entry}: {error.strerror or error}") from error


def is_whole(entry: Path) -> bool:
    """Whether every byte of a checkpoint is what was saved."""
    try:
        examine(entry)
    except CheckpointError:
        return False
    return True
