"""Archives of arrays (.npz), written for `np.load`, and read with care: a file may come from anywhere."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import stat
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those that never unpack to more than is asked for


class Head(NamedTuple):
    """The head of an array in a file: shape and type, before its data, which begin at `start`."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Npz:
    """The arrays of an open archive, of which nothing is read before it is asked for."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.members = {m.filename.removesuffix(".npy"): m for m in archive.infolist() if m.filename.endswith(".npy")}

    def head(self, key: str) -> Head:
        """Return the Head of an array. Raises ValueError if its size is not what this says."""
        member = self.members[key]
        if member.compress_type not in METHODS:
            raise ValueError(f"{key} is packed in a way that NumPy does not use")
        with self.archive.open(member) as file:
            head = _read_head(file, key)
            if member.file_size - head.start != head.nbytes and not head.dtype.hasobject:
                raise ValueError(f"{key} has not the size that its shape {head.shape} means")
        return head

    def array(self, key: str, head: Head) -> np.ndarray:
        """Read the array of a Head, against its checksum. Raises what zipfile and NumPy do for damaged ones."""
        with self.archive.open(self.members[key]) as file:
            file.read(head.start)
            data = file.read(head.nbytes)
            if len(data) != head.nbytes or file.read(1):  # which checks the sum, at the end of the member
                raise ValueError(f"{key} was cut short")
        array = np.frombuffer(data, head.dtype)
        return array.reshape(head.shape[::-1]).T if head.fortran else array.reshape(head.shape)


def _read_head(file: IO[bytes], key: str) -> Head:
    if np.lib.format.read_magic(file) != (1, 0):  # others may have headers of any length
        raise ValueError(f"{key} has no header of version 1")
    return Head(*np.lib.format.read_array_header_1_0(file), file.tell())


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Npz]:
    """Open an .npz. Raises ValueError for what is no file, such as a folder or a pipe, which is not opened."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no file")
    with zipfile.ZipFile(path) as archive:
        yield Npz(archive)


def write(file: IO[bytes], arrays: Mapping[str, Any]) -> None:
    """Write {key: array} compressed, whatever the keys are called: some mean something else to `np.savez`."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def steps_in(path: pathlib.Path) -> int:
    """Return the steps in an episode file, from the shape of its reward: 0 if it is none or cannot be read."""
    try:
        with opened(path) as file:
            shape = file.head("reward").shape
    except Exception:  # who reads it whole will say why
        return 0
    return shape[0] if shape else 0
