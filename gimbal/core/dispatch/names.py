"""Names that clients choose, as tables keep them: never longer than 64 characters."""

from __future__ import annotations

from hashlib import blake2b

LONGEST = 64


def kept(name: str) -> str | bytes:
    """`name` itself up to `LONGEST` characters, else its 16-byte BLAKE2b digest.

    A digest is never equal to a name, since one is bytes and the other text.
    """
    return name if len(name) <= LONGEST else digest(name)


def digest(name: str) -> bytes:
    """16 bytes for `name`. Half an emoji (a lone surrogate) is a character like any other."""
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
