"""Which spaces are texts, and how texts become token ids of a fixed length.

    ids     0 fills what is behind the end, and stands alone where there is no text; 1 is the end; words begin at 2
    words   bytes of UTF-8; or those of a tokenizer (--text.tokenizer); or whole sentences (--text.embeddings)

So an empty text is its end alone, and a text that is longer than the limit loses what is beyond it, its end as well.
Every alphabet is bytes; a limit does not cut through a character.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces

from specs import Observed, classes_of, named
from tools import UserError

KEYS = "text_keys"
PAD, END, FIRST = 0, 1, 2


class Tokens(spaces.MultiDiscrete):
    """The space of plain texts: int32 (length,), ids below the size of the vocabulary."""

    def __init__(self, length: int, size: int):
        super().__init__(np.full(length, size), np.int32)  # type: ignore[arg-type]


def accepts(space: spaces.Space, config: Any = None) -> bool:
    """True for texts, plain or Gymnasium's; bytes must be told to be one (--modalities.KEY text)."""
    return isinstance(space, (spaces.Text, Tokens))


# ---------------------------------------------------------------------------
# Vocabularies


class Vocabulary(Protocol):
    """Words and their ids.

    size: of the vocabulary, PAD and END included; unit: what a word is, for messages.
    vectors: None, or float32 (size - FIRST, n), what is known of each word.
    """

    size: int
    unit: str
    vectors: np.ndarray | None

    def ids(self, text: str, length: int) -> Sequence[int]:
        """Return the ids of a text, at most `length`, without its end."""

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids, none of which is PAD or END."""


class Bytes:
    """UTF-8."""

    size: int = FIRST + 256
    unit: str = "bytes"
    vectors: np.ndarray | None = None

    def ids(self, text: str, length: int) -> Sequence[int]:
        data = text.encode("utf-8", "replace")
        if len(data) > length:
            data = data[:length].decode("utf-8", "ignore").encode()  # no part of a character
        return [FIRST + byte for byte in data]

    def text(self, ids: Sequence[int]) -> str:
        return bytes(index - FIRST for index in ids).decode("utf-8", "replace")


class Words:
    """The words of a tokenizer.json, as the package tokenizers writes it."""

    unit: str = "tokens"
    vectors: np.ndarray | None = None

    def __init__(self, path: str):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("--text.tokenizer needs a package: pip install -r requirements/text.txt") from None
        if not os.path.isfile(path):
            raise UserError(f"--text.tokenizer {path}: there is no such file")
        try:
            self._tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # of a type of its own, for whatever is wrong with the file
            reason = " ".join(str(error).split())
            raise UserError(f"--text.tokenizer {path}: expected a tokenizer.json ({reason})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._path = path
        self.size = FIRST + 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # there may be gaps

    def ids(self, text: str, length: int) -> Sequence[int]:
        plain = text.encode("utf-8", "replace").decode()  # half a surrogate is no text to it
        try:
            found = self._tokenizer.encode(plain, add_special_tokens=False).ids
        except Exception as error:  # of no type of its own, where a word is unknown and no token stands for such
            raise UserError(f"--text.tokenizer {self._path}: it has no tokens for {text[:100]!a} ({error})") from None
        return [FIRST + index for index in found[:length]]

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([index - FIRST for index in ids])


class Sentences:
    """Whole sentences with their embeddings: an .npz of `sentences`, text (n,), and `vectors`, numbers (n, width)."""

    unit: str = "sentence"
    vectors: np.ndarray | None

    def __init__(self, path: str):
        try:
            with np.load(path, allow_pickle=False) as file:
                sentences, vectors = file["sentences"], file["vectors"].astype(np.float32)
            if sentences.ndim != 1 or sentences.dtype.kind != "U" or not len(sentences):
                raise ValueError("sentences are not text (n,)")
            if vectors.shape[:1] != sentences.shape or vectors.ndim != 2 or not vectors.size:
                raise ValueError(f"vectors are {vectors.shape} for {len(sentences)} sentences")
            if not np.isfinite(vectors).all():
                raise ValueError("vectors are not finite")
        except Exception as error:  # NumPy and zipfile raise many types for a foreign file
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(f"--text.embeddings {path}: expected an .npz of sentences and vectors ({reason})") from None
        self._path, self._sentences, self.vectors = path, sentences.tolist(), vectors
        self._index = {sentence: index for index, sentence in enumerate(self._sentences)}
        self.size = FIRST + len(self._sentences)

    def ids(self, text: str, length: int) -> Sequence[int]:
        if text not in self._index:
            raise UserError(f"--text.embeddings {self._path}: it has no sentence {text[:100]!a}, which was observed")
        return [FIRST + self._index[text]]

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(self._sentences[index - FIRST] for index in ids)


def vocabulary(config: Any) -> Vocabulary:
    """Return the vocabulary of a configuration's section `text`. Raises UserError for a file that holds none."""
    if config.tokenizer and config.embeddings:
        raise UserError("--text.embeddings takes whole sentences: leave --text.tokenizer out")
    return _vocabulary(config.tokenizer, config.embeddings)


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: str, embeddings: str) -> Vocabulary:
    return Words(tokenizer) if tokenizer else Sentences(embeddings) if embeddings else Bytes()


def read(ids: np.ndarray, words: Vocabulary) -> str:
    """Return the text of ids (length,), up to its end; "" where there is none."""
    known = ids.astype(int).tolist()
    ends = [place for place, index in enumerate(known) if index in (PAD, END)]
    return words.text(known[: ends[0] if ends else None])


# ---------------------------------------------------------------------------
# From an environment


class Texts:
    """Carries strings to ids.

    Args:
      words: Vocabulary; length: ids of a text.
    """

    def __init__(self, words: Vocabulary, length: int):
        self.space = named(Tokens(length, words.size), f"text up to {length} {words.unit}")
        self._words, self._length = words, length
        self._last: tuple[str | None, np.ndarray] = None, np.zeros(length, np.int32)

    def __call__(self, value: str, is_first: bool) -> np.ndarray:
        if value != self._last[0]:  # instructions stay for an episode
            found = [*self._words.ids(value, self._length), END][: self._length]
            ids = np.zeros(self._length, np.int32)
            ids[: len(found)] = found
            self._last = value, ids
        return self._last[1].copy()


class ByteVectors:
    """Carries vectors of bytes, all of which count, to ids."""

    def __init__(self, length: int):
        self.space = named(Tokens(length, Bytes.size), f"text of {length} bytes")

    def __call__(self, value: Any, is_first: bool) -> np.ndarray:
        return np.asarray(value).astype(np.int32) + FIRST


def converter(key: str, space: spaces.Space, config: Any) -> Texts | ByteVectors:
    """Return what makes texts plain. Raises UserError unless they are Text, or a vector of bytes."""
    if isinstance(space, spaces.Text):
        words = vocabulary(config.text)
        return Texts(words, 2 if words.vectors is not None else config.text.length)
    shape = space.shape or ()
    bytelike = isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(shape) == 1 and shape[0] > 1
    if bytelike and (config.text.tokenizer or config.text.embeddings):
        raise UserError(f"observation '{key}' is bytes, each a word: leave --text.tokenizer and --text.embeddings out")
    if bytelike:
        return ByteVectors(shape[0])
    raise UserError(f"observation '{key}' is {space}, and text is a Text space or bytes, Box(0, 255, (n,), np.uint8)")


def observed(space: spaces.Space) -> Observed:
    """Return what networks need to know: the length, and the size of the vocabulary for each id."""
    return Observed("text", tuple(space.shape or ()), classes_of(space))
