"""The pool against servers that are only echo servers: start, reuse, make room, stop, fail."""

import json
import sys
from pathlib import Path

import pytest

from gimbal.bench.arms import ServerSpec
from gimbal.bench.servers import ServerPool

FAKE = """
import asyncio, json, sys
from gimbal.bench.echo import EchoOptions, serve
words = sys.argv[1:]
print("given", json.dumps(words), flush=True)
if "--broken" in words:
    sys.exit("no such model")
asyncio.run(serve(EchoOptions(), int(words[words.index("--port") + 1])))
"""


@pytest.fixture
def pool(tmp_path: Path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    pool = ServerPool(("--demo",), tmp_path, command=(sys.executable, str(script)))
    yield pool
    pool.close()


def spec(*flags: str) -> ServerSpec:
    return ServerSpec(flags, '{"levels": ["dispatch"]}')


def test_starts_once_with_flags_and_configuration(pool: ServerPool) -> None:
    server = pool.get(spec("--max-num-seqs", "4"))
    assert server.endpoint.healthy()
    assert pool.get(spec("--max-num-seqs", "4")) is server
    given = json.loads(server.log.read_text().splitlines()[0].removeprefix("given "))
    assert given[0] == "--demo"
    assert given[3:5] == ["--max-num-seqs", "4"]
    config = json.loads(given[given.index("--additional-config") + 1])
    assert config == {"gimbal": {"levels": ["dispatch"]}}


def test_one_resident_server_makes_room_for_the_next(pool: ServerPool) -> None:
    first = pool.get(spec())
    second = pool.get(spec("--x"))
    assert first.process.poll() is not None
    assert second.endpoint.healthy()
    assert not first.endpoint.healthy()


def test_two_resident_servers_and_close(pool: ServerPool) -> None:
    pool.resident = 2
    first, second = pool.get(spec()), pool.get(spec("--x"))
    assert first.endpoint.healthy()
    assert pool.get(spec()) is first
    third = pool.get(spec("--y"))
    assert second.process.poll() is not None, "the one unused longest goes"
    pool.close()
    assert first.process.poll() is not None
    assert third.process.poll() is not None


def test_a_dead_server_is_started_again(pool: ServerPool) -> None:
    first = pool.get(spec())
    first.process.kill()
    first.process.wait(10)
    assert pool.get(spec()).endpoint.healthy()


def test_a_server_that_does_not_start_shows_its_log(pool: ServerPool) -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        pool.get(spec("--broken"))
