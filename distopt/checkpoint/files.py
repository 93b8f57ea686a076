"""One file of a checkpoint: written through to the disk, and read only if it holds what was written.

Everything goes through the functions of ``os`` that can fail, so that a test can make each of them fail.
"""

import contextlib
import hashlib
import os
import pickle
import stat
from collections.abc import Generator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from distopt.errors import CheckpointError


@dataclass(frozen=True)
class Digest:
    """What a file is to hold.

    Args:
        bytes: its length.
        sha256: of its content, in hexadecimal.
    """

    bytes: int
    sha256: str


class Sink:
    """What ``torch.save`` writes to: an open file, and the digest of what went there.

    A failure is kept until `digest` is asked for: torch would hide it behind an error of its own.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._problem: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, bytes or the like."""
        view = memoryview(data).cast("B")
        rest = view
        try:
            while rest and self._problem is None:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self._problem = error
        self._hash.update(view)
        self._bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def digest(self) -> Digest:
        """What was written, if all of it was.

        Raises:
            OSError: something could not be written.
        """
        if self._problem is not None:
            raise self._problem
        return Digest(self._bytes, self._hash.hexdigest())


def write(path: Path, content: Any) -> Digest:
    """Write a new file, and wait until it is on the disk.

    Args:
        path: does not exist yet.
        content: bytes, or what ``torch.load(..., weights_only=True)`` can read back.

    Returns:
        What the file holds, computed from what was written rather than read back.

    Raises:
        CheckpointError: the system refused; the message names the file.
    """
    with _named(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            sink = Sink(descriptor)
            if isinstance(content, bytes):
                sink.write(content)
            else:
                torch.save(content, sink)  # pyright: ignore[reportArgumentType]
            digest = sink.digest()
            os.fsync(descriptor)
            return digest
        finally:
            os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk.

    Raises:
        CheckpointError: the system refused.
    """
    with _named(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check(path: Path, wanted: Digest) -> None:
    """See whether a file holds what was written.

    Raises:
        CheckpointError: it does not; the message names the file.
    """
    with _opened(path, wanted):
        pass


def read(path: Path, wanted: Digest) -> Any:
    """Give what `write` was given; tensors come to the CPU. Nothing is executed, and nothing damaged is looked into.

    Raises:
        CheckpointError: the file does not hold what was written, or more than plain values and tensors.
    """
    with _opened(path, wanted) as file:
        try:
            with torch.serialization.safe_globals([bytes]):  # b"" is written as a call of it
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's message tells how to read it all the same, which is the last thing to do.
            raise CheckpointError(f"{path} holds something else than tensors and plain values") from error
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {str(error).strip().partition(chr(10))[0]}") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """Give the content of a small file.

    Raises:
        CheckpointError: there is none, or it is longer than ``limit`` bytes.
    """
    with _named(path), _regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{path} is damaged: it has more than {limit} bytes")
    return content


@contextlib.contextmanager
def _opened(path: Path, wanted: Digest) -> Generator[BufferedReader]:
    """A file that holds what was written; what is read from it is what was checked."""
    with _named(path), _regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != wanted.bytes:
            raise CheckpointError(f"{path} is damaged: it has {size} bytes, but must have {wanted.bytes}")
        if hashlib.file_digest(file, "sha256").hexdigest() != wanted.sha256:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one that was written")
        file.seek(0)
        yield file


@contextlib.contextmanager
def _regular(path: Path) -> Generator[BufferedReader]:
    """A file, opened to be read: no link, and no pipe that would never end."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CheckpointError(f"{path} is damaged: it is not a file")
        yield file


@contextlib.contextmanager
def _named(path: Path) -> Generator[None]:
    """Tell what the system refused, and for which file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
