"""What tests of the plugin share: a disk that is full."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def full_disk() -> Iterator[Callable[[int | None], None]]:
    """Sets how many bytes a file of this process may have; a write beyond fails like a full disk.

    None takes the limit away.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    hard = before[1]
    yield lambda limit: resource.setrlimit(
        resource.RLIMIT_FSIZE, (hard if limit is None else limit, hard)
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
