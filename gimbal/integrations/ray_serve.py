"""A request router for Ray Serve that chooses the replica as Gimbal chooses the engine.

    from ray.serve.config import RequestRouterConfig
    @serve.deployment(request_router_config=RequestRouterConfig(
        request_router_class="gimbal.integrations.ray_serve:GimbalRouter"))
    class Model:
        def record_replica_metadata(self):
            return published_at(f"tcp://{ip}:{port}", name)  # what its engine's `publish_to` says

Each process that calls the deployment (a proxy, another deployment) has a router of its own, which
reads the rows of all replicas. Written for Ray 2.60's public interface, which Ray calls alpha:
``ray.serve.request_router`` and ``record_replica_metadata``.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import weakref
import zlib
from asyncio import Future
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, cast

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from gimbal.board.published import Source
from gimbal.core.compiled import compile_in_background
from gimbal.core.config import parse_config
from gimbal.core.endpoints import check_name, parse_called, read_secret
from gimbal.core.errors import InputError, one_line, with_type
from gimbal.core.snapshot import MAX_FRONT_ENDS, ROUTER
from gimbal.integrations.replicas import Prompt, Published, Replicas
from gimbal.integrations.rows import RowReader

logger = logging.getLogger("vllm.gimbal")

CHARACTERS_PER_TOKEN = 4
"""Of a prompt that comes as text."""
_KEY = "gimbal"
_FIELDS = ("prompt_token_ids", "prompt", "messages", "input")

Describe = Callable[[Sequence[Any], Mapping[str, Any]], Prompt | None]


def published_at(address: str, name: str, rank: int = 0) -> dict[str, Any]:
    """What a replica's ``record_replica_metadata`` returns, so that routers find its rows.

    Args:
        address: ``tcp://HOST:PORT`` where its engine listens, as other hosts reach it.
        name: its `publish_name`.
        rank: of its engine.

    Raises InputError for an address or a name that is none.
    """
    called = parse_called(address, "address").address
    return {_KEY: {"address": called, "name": check_name(name, "name"), "rank": rank}}


def described(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Prompt | None:
    """The prompt among a call's arguments; None where there is none, which is no model's call.

    It is looked for in mappings and objects, as ``prompt_token_ids``, ``prompt`` (token ids or
    text), ``messages`` or ``input``. Text counts a token per `CHARACTERS_PER_TOKEN`.
    """
    for value in (*args, *kwargs.values()):
        get = value.get if isinstance(value, Mapping) else partial(_attribute, value)
        for field in _FIELDS:
            content = get(field)
            if content and isinstance(content, str | list | tuple):
                session = get("session_id")
                session = session if isinstance(session, str) and session else None
                if isinstance(content, list | tuple) and isinstance(content[0], int):
                    return Prompt(len(content), content, session)
                tokens = _characters(content) // CHARACTERS_PER_TOKEN
                return Prompt(max(1, tokens), None, session)
    return None


def _attribute(value: Any, name: str) -> Any:
    return getattr(value, name, None)


def _characters(content: Any, depth: int = 4) -> int:
    """Of all text in `content`: chat messages are lists of mappings of lists."""
    if isinstance(content, str):
        return len(content)
    if depth and isinstance(content, Mapping):
        return sum(_characters(value, depth - 1) for value in content.values())
    if depth and isinstance(content, list | tuple):
        return sum(_characters(value, depth - 1) for value in content)
    return 0


class GimbalRouter(RequestRouter):  # type: ignore[misc]  # no types without Ray
    """Chooses by Gimbal's dispatch policy, fed by the rows that replicas publish.

    Ray's part stays Ray's: who is full, who is dead, and when to try again. A choice that fails
    leaves the request to two replicas at random, of which Ray takes the one with less to do; so
    goes a call without a prompt, too. Model multiplexing and locality are not looked at.
    """

    def initialize_state(
        self,
        dispatch: Mapping[str, Any] | None = None,
        publish_secret_file: str = "",
        listen: Sequence[str] = (),
        describe: str = "",
        marks: bool = False,
    ) -> None:
        """Called by Ray with ``request_router_kwargs``.

        Args:
            dispatch: section `dispatch` of Gimbal's configuration.
            publish_secret_file: as there, of the replicas.
            listen: addresses ``@tcp://HOST:PORT`` for replicas that call this router; those that
                name an address in their metadata are called.
            describe: ``module:function`` in place of `described`.
            marks: the mapping that holds the prompt gets a key `ROUTER` with this router's number,
                which the deployment passes on to its engine as an extra argument: the replicas'
                acknowledgements of several routers are told apart then.

        Raises InputError for what is none of these.
        """
        config = parse_config({"dispatch": dict(dispatch or {})}, "request_router_kwargs").dispatch
        self._describe: Describe = _function(describe) if describe else described
        self._reader = RowReader(listen, read_secret(publish_secret_file))
        self._number = router_number() if marks else 0
        self._choice = Replicas(self._reader, config, router=self._number)
        compile_in_background()
        self._prompts: dict[str, Prompt] = {}
        self._awaited: set[Future[RunningReplica]] = set()
        self._accepted: set[str] = set()
        self._said: set[str] = set()
        weakref.finalize(self, self._reader.close)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Ray says which replicas there are."""
        try:
            self._choice.update({_name(r.replica_id): self._published(r) for r in replicas})
        except Exception as error:
            self._warn(f"replicas: {with_type(error)}")
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Ray says that a replica is gone."""
        super().on_replica_actor_died(replica_id)
        self._choice.remove(_name(replica_id))

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """All candidates, the best first; of Ray's own, two at random where nothing is known."""
        if pending_request is None:
            return _two(candidate_replicas)
        # Without it Ray asks again at once, and again, while all replicas are full.
        pending_request.routing_context.should_backoff = True
        try:
            prompt = self._describe(pending_request.args, pending_request.kwargs)
            if prompt is None:
                return _two(candidate_replicas)
            request_id = pending_request.metadata.internal_request_id
            by_name = {_name(r.replica_id): r for r in candidate_replicas}
            if self._number:
                _mark(pending_request, self._number)
            ranked = self._choice.ranked(request_id, prompt, list(by_name))
            self._await(request_id, prompt, pending_request.future)
            return [[by_name[name]] for name in ranked]
        except Exception as error:
            self._warn(f"a request is left to Ray: {with_type(error)}")
            return _two(candidate_replicas)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """The replica has taken the request."""
        request_id = pending_request.metadata.internal_request_id
        if request_id in self._prompts:
            self._accepted.add(request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request is over, or its replica refused it and Ray tries another."""
        self._prompts.pop(internal_request_id, None)
        if internal_request_id in self._accepted:
            self._accepted.discard(internal_request_id)
            self._choice.finished(internal_request_id)
        else:
            self._choice.unsent(internal_request_id)

    def _await(self, request_id: str, prompt: Prompt, future: Future[RunningReplica]) -> None:
        """Has `_placed` called, once, when Ray has made up its mind or the caller has gone."""
        self._prompts[request_id] = prompt
        if future not in self._awaited:
            self._awaited.add(future)
            future.add_done_callback(partial(self._placed, request_id, prompt))

    def _placed(self, request_id: str, prompt: Prompt, future: Future[RunningReplica]) -> None:
        self._awaited.discard(future)
        if future.cancelled():
            self._prompts.pop(request_id, None)
            self._choice.unsent(request_id)
        else:
            self._choice.sent(request_id, prompt, _name(future.result().replica_id))

    def _published(self, replica: RunningReplica) -> Published | None:
        """Where the rows of `replica` come from, by its metadata; None where that does not say."""
        name = _name(replica.replica_id)
        said = replica.replica_metadata.get(_KEY)
        if said is None:
            self._warn(f"replica {name} publishes no rows: its metadata has no {_KEY!r}")
            return None
        try:
            known = published_at(said["address"], said["name"], said["rank"])[_KEY]
            return Published(known["address"], Source(known["name"], int(known["rank"])))
        except (InputError, KeyError, TypeError, ValueError) as error:
            self._warn(f"replica {name} publishes no rows: {with_type(error)}")
            return None

    def _warn(self, said: str) -> None:
        """Each trouble once, and a few at most: replicas and requests come and go."""
        if said not in self._said and len(self._said) < 64:
            self._said.add(said)
            logger.warning("Gimbal: %s", said)


def router_number() -> int:
    """This process's among routers, 1 to ``MAX_FRONT_ENDS - 1``: two may have the same, and then
    share their acknowledgements as routers without a number do."""
    return zlib.crc32(f"{socket.gethostname()}:{os.getpid()}".encode()) % (MAX_FRONT_ENDS - 1) + 1


def _mark(pending_request: PendingRequest, number: int) -> None:
    """Adds `number` to the mapping that holds the prompt, in a copy: the caller keeps its own."""
    for values in (pending_request.args, pending_request.kwargs):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            if isinstance(value, Mapping) and any(field in value for field in _FIELDS):
                values[key] = {**value, ROUTER: number}
                return


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.unique_id)


def _two(candidates: Sequence[RunningReplica]) -> list[list[RunningReplica]]:
    """Two at random, of which Ray takes the one with the shorter queue."""
    return [random.sample(candidates, min(2, len(candidates)))] if candidates else []


def _function(name: str) -> Describe:
    """What ``module:function`` names. Raises InputError."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"describe: {one_line(name)!r}: {with_type(error)}") from None
    return cast(Describe, found)
