"""Data of train_lm, as bytes: the source of the running Python's standard library, or of a directory."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sysconfig
import zlib

import numpy as np

VOCABULARY = 256
SEPARATOR = b"\0"  # before each file; never inside Python source

# Not installed everywhere (tests, installed packages), or tables of numbers rather than text
# (encodings).
_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}


class InputError(Exception):
    """What the user asked for cannot be done with the files there are; the message says why."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation text as uint8 arrays; `files` counts the files of both."""

    train: np.ndarray
    validation: np.ndarray
    files: tuple[int, int]

    @property
    def checksum(self) -> int:
        """CRC-32 of all text: a resumed run must read what the first one read."""
        return zlib.crc32(self.validation, zlib.crc32(self.train))


def standard_library() -> Corpus:
    """The corpus depends on the Python version alone.

    **Raises:** InputError if the interpreter has no library sources on disk.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])

    def is_text(name: pathlib.PurePath) -> bool:
        # _sysconfigdata* holds the paths of the machine that built the interpreter.
        return _EXCLUDED.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata")

    return _corpus(root, (".py",), is_text, "is the interpreter installed without its sources?")


def directory(root: pathlib.Path) -> Corpus:
    """All Python, Markdown, reStructuredText and plain text below `root`.

    **Raises:** InputError if that is less than 100,000 bytes to train on, or to validate on.
    """
    return _corpus(root, (".py", ".md", ".rst", ".txt"), lambda name: True, "is it a directory?")


def _corpus(root: pathlib.Path, suffixes, is_text, hint: str) -> Corpus:
    """Every file goes to one side by a hash of its path: one in ten is validation text.

    Files are joined in the order of their paths. One with a NUL byte is no text.
    """
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(p for p in root.rglob("*") if p.suffix in suffixes and p.is_file()):
        name = path.relative_to(root)
        if is_text(name) and SEPARATOR not in (text := path.read_bytes()):
            is_validation = zlib.crc32(name.as_posix().encode()) % 10 == 0
            sides[is_validation].append(SEPARATOR + text)
    train, validation = (np.frombuffer(b"".join(side), np.uint8) for side in sides)
    if min(train.size, validation.size) < 100_000:
        raise InputError(
            f"{root} has {train.size} bytes of text to train on and {validation.size} to validate "
            f"on; at least 100000 of each are needed ({hint})"
        )
    return Corpus(train, validation, (len(sides[0]), len(sides[1])))


def unigram_loss(corpus: Corpus) -> float:
    """Validation loss, in nats a byte, of byte frequencies: the best model without context."""
    counts = np.bincount(corpus.train, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[corpus.validation].mean())


class Windows:
    """Training batches: windows of `length + 1` bytes, inputs and the byte after each, shuffled.

    A batch is a function of the seed and the position (windows read so far) alone, so the position
    is all that a checkpoint needs. Every window is read once an epoch.
    """

    def __init__(self, text: np.ndarray, length: int, seed: int):
        self.text, self.length, self.seed = text, length, seed
        self.count = (text.size - 1) // length
        self._order = functools.lru_cache(2)(self._order_of_epoch)

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def batch(self, position: int, size: int) -> np.ndarray:
        """Windows `position` to `position + size`: int32 (size, length + 1)."""
        places = (divmod(p, self.count) for p in range(position, position + size))
        return _windows(
            self.text, [self._order(e)[i] * self.length for e, i in places], self.length
        )


def spread_windows(text: np.ndarray, length: int, count: int) -> np.ndarray:
    """`count` windows at equal distances over the whole text: int32 (count, length + 1)."""
    return _windows(text, np.linspace(0, text.size - length - 1, count).astype(int), length)


def _windows(text: np.ndarray, starts, length: int) -> np.ndarray:
    return np.stack([text[s : s + length + 1] for s in starts]).astype(np.int32)
