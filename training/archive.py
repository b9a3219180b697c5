"""Whether an archive that `torch.save` wrote still holds what was written: those who load it do not ask."""

from __future__ import annotations

import pathlib
import stat
import struct
import zipfile
from typing import IO

LOCAL = struct.Struct("<4s5H3I2H")  # what stands before the data of a member
FIELD = struct.Struct("<2sH")  # name and length of a field after its name
ZIP64, PADDING = b"\1\0", b"FB"  # fields: sizes of 8 bytes, and Zs up to where the data are aligned
LARGE = 2**32 - 1  # a size that stands in the former


def check_archive(path: pathlib.Path) -> None:
    """Read an archive once, against its checksums. Raises ValueError that says what is wrong, or OSError.

    Every byte counts, those between the data as well. What is no file, such as a pipe, is not opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no file")
    with open(path, "rb") as file:
        start = file.read(4)
        if not start:
            raise ValueError("it is empty")
        if start != b"PK\3\4":
            raise ValueError("it is no checkpoint of this project")
        try:
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip() or _disorder(file, archive)
        except Exception:  # zipfile has dozens for what is no archive
            raise ValueError("it is damaged or was cut short") from None
        if bad:
            raise ValueError(f"it is damaged, at {bad!a}")


def _disorder(file: IO[bytes], archive: zipfile.ZipFile) -> str | None:
    """Return the name of a member around whose data something else stands than torch writes there, or None."""
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    ends = [*(member.header_offset for member in members[1:]), archive.start_dir]
    for member, end in zip(members, ends, strict=True):
        crc, sizes = member.CRC, (member.compress_size, member.file_size)
        file.seek(member.header_offset)
        _, _, *head, name, fields = LOCAL.unpack(file.read(LOCAL.size))
        plain = [member.flag_bits, member.compress_type, 0, 0]
        known = [[*plain, 0, 0, 0], [*plain, crc, *sizes], [*plain, 0, LARGE, LARGE]]  # or they follow the data
        file.seek(name, 1)
        aligned = _are_fields(file.read(fields))
        file.seek(sizes[0], 1)
        after = file.read(max(0, min(end - file.tell(), 64)))
        trailers = [
            struct.pack(f"<4sI2{kind}", b"PK\7\10", crc, *sizes) for kind in ("IQ" if max(sizes) < LARGE else "Q")
        ]
        if head not in known or not aligned or after not in (b"", *trailers):
            return member.filename
    file.seek(archive.start_dir)
    index = sum(46 + len(m.orig_filename.encode()) + len(m.extra) + len(m.comment) for m in members)
    file.seek(index, 1)
    return None if _is_end(file.read(1000), len(members), index, archive.start_dir) else "its end"


def _is_end(content: bytes, count: int, index: int, begin: int) -> bool:
    """True if an archive ends so: it has `count` members, and an index of `index` bytes that begins at `begin`."""
    small = [min(value, limit) for value, limit in ((count, 2**16 - 1), (index, LARGE), (begin, LARGE))]
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, small[0], *small, 0)
    large = struct.pack("<4sQ4x2I4Q", b"PK\6\6", 44, 0, 0, count, count, index, begin)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, begin + index, 1)
    return content[:12] + bytes(4) + content[16:] == large + locator + end or content == end  # but for two versions


def _are_fields(content: bytes) -> bool:
    """True if the fields after a member's name are sizes and padding."""
    while content:
        name, length = FIELD.unpack(content[:4].ljust(4, b"\0"))
        value, content = content[4 : 4 + length], content[4 + length :]
        if len(value) != length or name not in (ZIP64, PADDING) or (name == PADDING and value.strip(b"Z")):
            return False
    return True
