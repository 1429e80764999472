"""Where things lie in a board file, in 8-byte words of the machine's own byte order.

Header (magic, number of the newest control message, seal), newest record's number per slot, two
control buffers, number of the control message that each engine holds, records.
"""

from __future__ import annotations

import struct
from enum import Enum

from gimbal.core.snapshot import MAX_ENGINES, ROW_WIDTH

RECORDS = 4
"""Ring length of a slot: a reader is lapped only if it sleeps through three whole snapshots."""
RETRIES = 4

WORD = struct.Struct("=Q")
_FAMILY = b"GIMBALB"
MAGIC = _FAMILY + b"3"
SEAL = WORD.pack(ROW_WIDTH) + b"sealed\0\1"
"""Behind the control version and without a zero at its end: a file that was cut short and written
to again has a hole of zeros there."""
CONTROL_VERSION_AT = 1
EMPTY_HEADER = MAGIC + WORD.pack(0) + SEAL
HEADER_WORDS = 16
CONTROL_BYTES = 4096
CONTROL_WORDS = 2 + CONTROL_BYTES // 8
"""Length in bytes, checksum, text."""
RECORD_WORDS = -(-(1 + ROW_WIDTH + 1) // 8) * 8
"""Number, row and checksum, padded to a multiple of a cache line."""

NEWEST_AT = HEADER_WORDS
CONTROL_AT = NEWEST_AT + MAX_ENGINES
HELD_AT = CONTROL_AT + 2 * CONTROL_WORDS
EVERY_CONTROL = (1 << 64) - 1
"""Held by an engine of the board's own host: it reads the newest before every step."""
RECORDS_AT = HELD_AT + MAX_ENGINES
BOARD_BYTES = 8 * (RECORDS_AT + MAX_ENGINES * RECORDS * RECORD_WORDS)


class Nature(Enum):
    """What a file is that has a board's name."""

    BOARD = "a board"
    REMAINS = "what is left of a board"
    OTHER_VERSION = "a board of another version"
    FOREIGN = "something else"


def is_header(data: bytes) -> bool:
    """Whether `data` begins with a whole header of this version."""
    return data.startswith(MAGIC) and data[16 : len(EMPTY_HEADER)] == SEAL


def control_version(header: bytes) -> int:
    """Number of the newest control message in a whole header."""
    version: int = WORD.unpack_from(header, 8 * CONTROL_VERSION_AT)[0]
    return version


def nature(header: bytes) -> Nature:
    """What a file is that begins with `header`, of `EMPTY_HEADER`'s length or shorter.

    What is left of a board may have zeros where it was cut short and written to again.
    """
    if is_header(header):
        return Nature.BOARD
    if not header.strip(b"\0"):
        return Nature.REMAINS
    if MAGIC.startswith(header[:8].rstrip(b"\0")):
        seal = header[16:].strip(b"\0")
        return Nature.REMAINS if SEAL.startswith(seal) else Nature.OTHER_VERSION
    return Nature.OTHER_VERSION if header.startswith(_FAMILY) else Nature.FOREIGN
