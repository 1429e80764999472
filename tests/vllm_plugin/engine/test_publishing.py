"""An engine's rows reach subscribers, in any balancing mode, and what is wrong there is said."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
from gimbal.board.published import Source
from gimbal.core.errors import InputError
from gimbal.core.snapshot import Field
from gimbal.integrations.rows import RowReader
from gimbal.vllm_plugin.engine import publishing, remote
from gimbal.vllm_plugin.engine.identity import server_identity
from tests.vllm_plugin import real_scheduler
from tests.waiting import until

SECRET = "a secret of many bytes"


@pytest.fixture
def reader() -> Iterator[RowReader]:
    made = RowReader(["@tcp://127.0.0.1:0"], SECRET.encode())
    yield made
    made.close()


def _scheduler(folder: Path, reader: RowReader, **config: Any) -> Any:
    (folder / "secret").write_text(SECRET)
    known = {"publish_to": reader.listens[0], "publish_secret_file": str(folder / "secret")}
    return real_scheduler.build(folder, {"levels": [], **known, **config})


def test_rows_go_out_beside_the_board_even_without_a_level(
    tmp_path: Path, reader: RowReader
) -> None:
    scheduler = _scheduler(tmp_path, reader, publish_name="10.0.0.7:8000")
    source = [Source("10.0.0.7:8000", 0)]
    try:
        until(lambda: reader.sources() == tuple(source))
        sequence = reader.rows(source)[0, Field.SEQUENCE]
        request = real_scheduler.request("r", 100)
        scheduler.add_request(request)
        scheduler.schedule()
        until(lambda: reader.rows(source)[0, Field.SEQUENCE] > sequence)
        assert reader.rows(source)[0, Field.RUNNING_REQUESTS] == 1.0
        assert reader.rows(source)[0, Field.EPOCH] == scheduler.gimbal_signals.row[Field.EPOCH]
    finally:
        scheduler.shutdown()
    until(lambda: reader.heard_us(source)[0] > 1e6)


@pytest.mark.parametrize(
    ("levels", "parallel", "by_router"),
    [
        (["dispatch"], {}, True),
        (["dispatch"], {"data_parallel_size": 2}, False),
        (["dispatch"], {"data_parallel_size": 2, "data_parallel_external_lb": True}, True),
        (["queue"], {"data_parallel_size": 2}, True),
    ],
)
def test_a_router_may_count_where_no_front_end_does(
    tmp_path: Path, reader: RowReader, levels: list[str], parallel: Any, by_router: bool
) -> None:
    scheduler = _scheduler(tmp_path, reader, levels=levels)
    try:
        assert scheduler.gimbal_signals.by_router
        for name, value in parallel.items():
            setattr(scheduler.vllm_config.parallel_config, name, value)
        assert publishing._chosen_by_routers(scheduler) is by_router
    finally:
        scheduler.shutdown()


def test_a_server_without_a_name_is_its_host_and_start(tmp_path: Path, reader: RowReader) -> None:
    scheduler = _scheduler(tmp_path, reader)
    try:
        until(reader.sources)
        name = f"{socket.gethostname()}:{server_identity(scheduler.vllm_config)}"
        assert reader.sources() == (Source(name, 0),)
    finally:
        scheduler.shutdown()


def test_engines_away_from_their_front_end_publish_too(
    tmp_path: Path, reader: RowReader, monkeypatch: Any
) -> None:
    monkeypatch.setattr(remote, "front_end_is_elsewhere", lambda vllm_config: True)
    scheduler = _scheduler(tmp_path, reader, publish_name="web", board_port=1)
    try:
        until(lambda: reader.sources() == (Source("web", 0),))
    finally:
        scheduler.shutdown()


@pytest.mark.parametrize("wrong", ["in use", "no secret"])
def test_an_engine_that_cannot_publish_says_why_and_serves(
    tmp_path: Path, reader: RowReader, caplog: Any, monkeypatch: Any, wrong: str
) -> None:
    if wrong == "in use":
        scheduler = _scheduler(tmp_path, reader, publish_to=f"@{reader.listens[0]}")
        said = "Address already in use"
    else:

        def gone(file: str) -> bytes:
            raise InputError(f"{file}: no such file")

        monkeypatch.setattr(publishing, "read_secret", gone)
        scheduler = _scheduler(tmp_path, reader)
        said = "secret: no such file"
    try:
        lines = [r.message for r in caplog.records if "publishes to nobody" in r.message]
        assert len(lines) == 1
        assert said in lines[0]
        scheduler.add_request(real_scheduler.request("r", 100))
        assert scheduler.schedule().num_scheduled_tokens == {"r": 100}
        assert scheduler.gimbal_signals.row[Field.RUNNING_REQUESTS] == 1.0
    finally:
        scheduler.shutdown()
    assert reader.received == 0
