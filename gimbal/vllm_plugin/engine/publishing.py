"""An engine's signals on their way: onto the board of its host, or to the front end's host, and to
subscribers where the configuration names any.

Control comes the same way back from the front end, and from nobody else.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import zmq

from gimbal.board.layout import EVERY_CONTROL
from gimbal.board.published import RowPublisher, Source
from gimbal.board.slots import BoardReader, SlotWriter
from gimbal.core.contracts import FloatArray
from gimbal.core.endpoints import check_name, parse_endpoints, read_secret
from gimbal.core.errors import one_line
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.engine import remote
from gimbal.vllm_plugin.engine.identity import (
    close_at_exit,
    server_board,
    server_identity,
)
from gimbal.vllm_plugin.engine.remote_control import RemoteControl
from gimbal.vllm_plugin.engine.signals import RowSink, SchedulerSignals
from gimbal.vllm_plugin.engine.state import EngineState
from gimbal.vllm_plugin.engine.step_log import StepLog

logger = logging.getLogger("vllm.gimbal")


class BoardSlot(SlotWriter):
    """A slot whose board goes with it, and whose engine follows the control on that board."""

    def _bind(self) -> None:
        super()._bind()
        self.board.hold(self.slot, EVERY_CONTROL)

    def close(self) -> None:
        self.board.close()


class Subscribed:
    """A sink whose rows go to subscribers as well, once they are where they belong."""

    def __init__(self, sink: RowSink, publisher: RowPublisher) -> None:
        self._sink = sink
        self._publisher = publisher

    def publish(self, row: FloatArray, now_s: float | None = None) -> None:
        self._sink.publish(row, now_s)
        self._publisher.publish(row, float(row[Field.TIMESTAMP_US]))

    def close(self) -> None:
        self._publisher.close()
        if close := getattr(self._sink, "close", None):
            close()


def open_signals(scheduler: Any) -> SchedulerSignals:
    """Signals of the engine that `scheduler` belongs to, with the step log if one is asked for.

    Their `EngineState` is what the engine's queue reads.
    """
    signals = _publisher(scheduler)
    signals.by_router = _chosen_by_routers(scheduler)
    directory = scheduler.gimbal_config.step_records
    if directory:
        rank = scheduler.vllm_config.parallel_config.data_parallel_index
        signals.log = StepLog(Path(directory), rank)
    return signals


def _publisher(scheduler: Any) -> SchedulerSignals:
    """Signals on the board of the scheduler's server, wherever that board is."""
    vllm_config = scheduler.vllm_config
    parallel = vllm_config.parallel_config
    rank = parallel.data_parallel_index
    if remote.front_end_is_elsewhere(vllm_config):
        port = remote.board_port(vllm_config, scheduler.gimbal_config.board_port)
        address = f"tcp://{parallel.data_parallel_master_ip}:{port}"
        logger.info("Gimbal: engine %d publishes to %s", rank, address)
        control = _remote_control(scheduler, address, rank)
        state = EngineState(scheduler, control)
        sender = _subscribed(remote.RowSender(address, rank), scheduler)
        return SchedulerSignals(scheduler, sender, state)
    board = server_board(vllm_config)
    close_at_exit(board)
    logger.info("Gimbal: engine %d (process %d) publishes on %s", rank, os.getpid(), board.path)
    # Engines of a dense model run on their own: vLLM has set their data-parallel size to 1.
    lock_step = parallel.data_parallel_size > 1
    group = BoardReader(board, parallel.data_parallel_size) if lock_step else None
    slot = _subscribed(BoardSlot(board, rank), scheduler)
    return SchedulerSignals(scheduler, slot, EngineState(scheduler, board, group))


def _subscribed(sink: RowSink, scheduler: Any) -> RowSink:
    """`sink`, and the subscribers that the configuration names; `sink` alone without any, and
    where the engine cannot publish, which costs no request and is said in one line."""
    config, vllm_config = scheduler.gimbal_config, scheduler.vllm_config
    endpoints = parse_endpoints(config.publish_to, "publish_to")
    if not endpoints:
        return sink
    rank = vllm_config.parallel_config.data_parallel_index
    try:
        name = config.publish_name or f"{socket.gethostname()}:{server_identity(vllm_config)}"
        source = Source(check_name(name, "publish_name"), rank)
        secret = read_secret(config.publish_secret_file)
        publisher = RowPublisher(endpoints, source, secret)
    except (OSError, ValueError, zmq.ZMQError) as error:
        logger.error("Gimbal: engine %d publishes to nobody: %s", rank, one_line(error))
        return sink
    close_at_exit(publisher)
    signed = "unsigned" if secret is None else "signed"
    logger.info("Gimbal: %s publishes to %s, %s", source, config.publish_to, signed)
    return Subscribed(sink, publisher)


def _chosen_by_routers(scheduler: Any) -> bool:
    """Whether only a router chooses this engine, so that no front end waits for acknowledgements.

    Engines of a dense model have a data-parallel size of one, however many there are.
    """
    config, vllm_config = scheduler.gimbal_config, scheduler.vllm_config
    parallel = vllm_config.parallel_config
    alone = parallel.data_parallel_size == 1 and vllm_config.model_config.is_moe
    external = parallel.data_parallel_external_lb
    return bool(config.publish_to) and (alone or external or "dispatch" not in config.levels)


def _remote_control(scheduler: Any, address: str, rank: int) -> RemoteControl | None:
    """What the queue of an engine away from its front end follows; None where nobody may switch
    it, or there is nothing to switch."""
    config = scheduler.gimbal_config
    if not config.admin or "queue" not in config.levels:
        return None
    control = RemoteControl(address, rank, config)
    close_at_exit(control)
    return control
