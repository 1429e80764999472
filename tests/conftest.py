"""What all tests share: a disk that is full; examples may take any time on a busy machine."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

settings.register_profile("gimbal", deadline=None)
settings.load_profile("gimbal")


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
