"""Turns what a reader finds into examples: captions are cleaned and filtered, and what is left out is counted."""

import concurrent.futures
import io
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from ..pictures import EMPTY
from .filters import Filters
from .index import WHOLE, Example, LeftOut

BROKEN = "broken"
MISSING = "whose file is missing"
_AT_ONCE = 4096


class Collector:
    """Takes pictures with their captions and gives examples.

    Args:
        filters: what is to be left out.
    """

    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        self.left_out = LeftOut()
        self.files: list[str] = []

    def add_file(self, path: str | Path) -> int:
        """Take one more file that examples lie in; gives its number."""
        self.files.append(os.path.abspath(path))
        return len(self.files) - 1

    def captions(self, name: str, captions: Sequence[str]) -> list[str]:
        """Give the captions of a picture that can be used, each on one line; without any, the picture is counted."""
        clean = [" ".join(caption.split()) for caption in captions]
        kept, against = self.filters.of_captions([caption for caption in clean if caption])
        if not kept:
            self.left_out.add(f"with a caption that is {against[0]}" if against else EMPTY, name)
        else:
            for why in against:
                self.left_out.add(f"captions beside better ones that are {why}", name)
        return kept

    def of_fitting_shape(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Leave out pictures of another shape than the filters allow; reads the head of every file if they say any."""
        if self.filters.aspect is None:
            yield from examples
            return
        remaining = iter(examples)
        with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            warnings.simplefilter("ignore")
            while several := list(itertools.islice(remaining, _AT_ONCE)):
                for example, size in zip(several, pool.map(self._size, several), strict=True):
                    if size is None:
                        self.left_out.add(BROKEN, example.name)
                    elif not self.filters.allow(*size):
                        self.left_out.add(f"more than {self.filters.aspect:g} times as long as wide", example.name)
                    else:
                        yield example

    def _size(self, example: Example) -> tuple[int, int] | None:
        try:
            with Image.open(io.BytesIO(read_bytes(self.files[example.file], example.offset, example.length))) as opened:
                return opened.size
        except Exception:  # Pillow's readers raise whatever they stumble over in a broken file
            return None


def read_bytes(path: str, offset: int, length: int) -> bytes:
    """Read a picture's bytes.

    Args:
        path: the file.
        offset: where the picture begins.
        length: how many bytes it has, or `index.WHOLE`.

    Raises:
        OSError: the file cannot be read, or ends too early.
    """
    with open(path, "rb", buffering=0) as file:
        if length == WHOLE:
            return file.readall()
        found = os.pread(file.fileno(), length, offset)
        if len(found) < length:
            raise OSError(f"{path} ends before byte {offset + length}")
        return found
