"""Text tokens: byte-pair encoding learned by the ``tokenizers`` library, with BPE dropout from a seeded generator.

Captions are lower-cased and cut at everything that is not a letter, so that merges stay inside words; a word carries
the space before it. The library learns the merges and encodes; its own dropout draws from a generator that cannot be
seeded, and a run could never be repeated. So dropout replays the learned merges here, with the generator of the batch.

Source: Provilkov, Emelianenko, Voita, "BPE-Dropout: Simple and Effective Subword Regularization", 2020, section 3;
Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, appendix B.2 (lower-cased captions, 10 % dropout).
"""

import heapq
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from distopt.errors import SettingError

PAD = -1
"""Marks the positions behind a caption's end; the transformer has a learned embedding for each of them."""

_UNKNOWN = "<unk>"
_SPACE = "▁"


class Tokenizer:
    """A lower-casing byte-pair tokenizer whose dropout repeats exactly under a seed.

    Args:
        serialized: the JSON text that ``to_json`` gave.

    Example:
        >>> tokenizer = Tokenizer.train(["a red circle", "a red square"], vocabulary=40)
        >>> tokenizer.encode(["A red square"], length=6).shape
        torch.Size([1, 6])
        >>> tokenizer.decode(tokenizer.encode(["A red square"], length=6)[0])
        'a red square'
    """

    def __init__(self, serialized: str) -> None:
        self._library = Library.from_str(serialized)
        model = json.loads(serialized)["model"]
        vocabulary: dict[str, int] = model["vocab"]
        self._symbols: dict[str, int] = vocabulary
        self._merges: dict[tuple[int, int], tuple[int, int]] = {}
        for order, (left, right) in enumerate(model["merges"]):
            self._merges[vocabulary[left], vocabulary[right]] = (order, vocabulary[left + right])
        self._encoded: dict[str, list[int]] = {}

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary: int) -> "Tokenizer":
        """Learn merges from captions.

        Args:
            captions: the training texts, in any order; the result depends only on how often each word occurs.
            vocabulary: the most tokens to have, single characters included.

        Returns:
            The tokenizer; its ``vocabulary`` is smaller than asked for when the captions have no more to merge.

        Raises:
            SettingError: if ``vocabulary`` is below 2.
        """
        if vocabulary < 2:
            raise SettingError("vocabulary", vocabulary, "at least 2")
        # A space as a character of its own, not the library's suffix of a word: suffixed characters are numbered in the
        # order of a hash map, and ranks that train alone would disagree about every token.
        library = Library(BPE(unk_token=_UNKNOWN))
        library.normalizer = normalizers.Sequence(
            [
                normalizers.NFKC(),
                normalizers.Lowercase(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Strip(),
            ]
        )
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"),
                pre_tokenizers.Split(Regex(rf"[^{_SPACE}\p{{L}}\p{{M}}]"), behavior="isolated"),
            ]
        )
        trainer = BpeTrainer(vocab_size=vocabulary, special_tokens=[_UNKNOWN], show_progress=False)
        library.train_from_iterator(captions, trainer)
        return cls(library.to_str())

    @property
    def vocabulary(self) -> int:
        """Number of tokens, the unknown token included."""
        return self._library.get_vocab_size()

    def encode(
        self, captions: Sequence[str], length: int, *, rng: np.random.Generator | None = None, dropout: float = 0.1
    ) -> Tensor:
        """Encode captions to a fixed length.

        Args:
            captions: B texts.
            length: positions per caption; longer captions are cut.
            rng: the generator of BPE dropout; ``None`` encodes without dropout.
            dropout: probability with which a merge is passed over, in [0, 1).

        Returns:
            ``(B, length)`` int64, ``PAD`` behind the end. A caption that fits without dropout always fits: where
            dropout would make it too long, it is encoded without.

        Raises:
            SettingError: if ``dropout`` is outside [0, 1).
        """
        if not 0.0 <= dropout < 1.0:
            raise SettingError("dropout", dropout, "at least 0 and below 1")
        rows = np.full((len(captions), length), PAD, dtype=np.int64)
        for row, caption in zip(rows, captions, strict=True):
            words = self._words(caption)
            tokens = [token for word in words for token in self._plain(word)]
            if rng is not None and dropout > 0.0:
                split = [token for word in words for token in self._drop(word, rng, dropout)]
                tokens = split if len(split) <= length else tokens
            row[: len(tokens)] = tokens[:length]
        return torch.from_numpy(rows)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Give the text of one row of tokens, lower-cased as it was read; pads are left out."""
        pieces = [self._library.id_to_token(int(token)) or _UNKNOWN for token in tokens if int(token) >= 0]
        return "".join(pieces).replace(_SPACE, " ").strip()

    def longest(self, captions: Iterable[str]) -> int:
        """Length in tokens, without dropout, of the longest of ``captions`` (0 if there are none)."""
        return max((sum(len(self._plain(w)) for w in self._words(caption)) for caption in captions), default=0)

    def to_json(self) -> str:
        """Give everything the tokenizer is as JSON text."""
        return self._library.to_str()

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer that ``save`` wrote."""
        return cls(Path(path).read_text(encoding="utf-8"))

    def _words(self, caption: str) -> list[str]:
        """Normalise a caption and cut it into the words that merges never leave."""
        assert self._library.normalizer is not None
        assert self._library.pre_tokenizer is not None
        normal = self._library.normalizer.normalize_str(caption)
        return [word for word, _ in self._library.pre_tokenizer.pre_tokenize_str(normal)]

    def _plain(self, word: str) -> list[int]:
        """Tokens of one word without dropout, by the library, each word once."""
        if word not in self._encoded:
            if len(self._encoded) >= 100_000:  # captions of real pictures have no end of words
                self._encoded.clear()
            self._encoded[word] = [token.id for token in self._library.model.tokenize(word)]
        return self._encoded[word]

    def _drop(self, word: str, rng: np.random.Generator, dropout: float) -> list[int]:
        """Tokens of one word under BPE dropout.

        The best merge at hand is passed over with probability ``dropout`` until another one has been applied. This is
        the library's queue, entries that are out of date included, so that both have the same distribution.
        """
        tokens = [self._symbols.get(char, self._symbols[_UNKNOWN]) for char in word]
        after = [*range(1, len(tokens)), -1]
        before = list(range(-1, len(tokens) - 1))
        queue: list[tuple[int, int, int]] = []  # (order of the merge, position of its left symbol, merged token)

        def offer(left: int) -> None:
            found = self._merges.get((tokens[left], tokens[after[left]])) if left >= 0 and after[left] >= 0 else None
            if found is not None:
                heapq.heappush(queue, (found[0], left, found[1]))

        for position in range(len(tokens)):
            offer(position)
        passed: list[tuple[int, int, int]] = []
        while queue:
            best = heapq.heappop(queue)
            if rng.random() < dropout:
                passed.append(best)
                continue
            for entry in passed:
                heapq.heappush(queue, entry)
            passed.clear()
            _, left, merged = best
            right = after[left]
            if tokens[left] < 0 or right < 0 or self._merges.get((tokens[left], tokens[right]), (0, PAD))[1] != merged:
                continue
            tokens[left], tokens[right] = merged, PAD
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            offer(before[left])
            offer(left)
        return [token for token in tokens if token >= 0]
