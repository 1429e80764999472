"""Names that clients choose, as tables keep them: never longer than 64 characters."""

from __future__ import annotations

from hashlib import blake2b

LONGEST = 64


def kept(name: str) -> str | bytes:
    """`name` itself up to `LONGEST` characters, else its 16-byte BLAKE2b digest.

    A digest is never equal to a name, since one is bytes and the other text. Half an emoji (a lone
    surrogate) is a character like any other.
    """
    if len(name) <= LONGEST:
        return name
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
