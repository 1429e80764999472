"""The layout of one engine's snapshot: a row of float64 that engines publish and everybody reads.

The board (`gimbal.board`) carries rows between processes; the simulator fills the same columns.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import numpy.typing as npt

MAX_FRONT_ENDS = 16
"""API server processes that one board can tell apart."""
MAX_ENGINES = 256
"""Engines that one board holds."""


class Field(IntEnum):
    """Columns of one engine's snapshot row. All are float64: integers below 2**53 stay exact."""

    SEQUENCE = 0  # snapshots published so far: one or two a step
    TIMESTAMP_US = 1  # CLOCK_MONOTONIC when the snapshot was taken
    EPOCH = 2  # changes when the engine process is a new one: its counters restarted
    WAITING_REQUESTS = 3
    WAITING_PREFILL_TOKENS = 4  # uncached prompt tokens of waiting requests
    RUNNING_REQUESTS = 5
    RUNNING_PREFILL_TOKENS = 6  # prompt tokens that running requests still have to prefill
    DECODING_REQUESTS = 7  # running requests whose prompt is done
    KV_BLOCKS_USED = 8
    KV_BLOCKS_TOTAL = 9
    KV_BLOCK_TOKENS = 10
    PREEMPTIONS = 11  # since the engine started
    STEP_TIME_US = 12  # recent time of one step, smoothed
    STEP_BASE_US = 13  # learned: a step's time without prefill at the present decode batch
    PREFILL_US_PER_TOKEN = 14  # learned: what one more prefill token adds to a step
    PREFILL_TOKENS_PER_S = 15  # recent throughput, smoothed
    STEP_TOKEN_BUDGET = 16  # max_num_batched_tokens
    EXPERT_PRESSURE_US = 17  # per step, what this engine's requests cost by where experts lie
    RUNNING_TOKENS = 18  # context tokens held by running requests
    PENDING_PREFIX_HIT_TOKENS = 19  # prompt tokens of waiting requests the prefix cache holds
    MAX_RUNNING_REQUESTS = 20  # max_num_active_seqs, or max_num_seqs without it
    DECODE_US_PER_REQUEST = 21  # learned: what one more decoding request adds to a step
    STEP_PREFILL_TOKENS = 22  # prefill tokens of the step that runs now
    QUEUE_OVERTAKES = 23  # requests admitted before one that was queued earlier
    QUEUE_PROMOTIONS = 24  # requests admitted because they had waited past the absolute limit
    QUEUE_KV_PASSES = 25  # times a request was offered ahead of a head without KV blocks
    QUEUE_YIELDS = 26  # steps in which a running prefill left budget to shorter newcomers
    QUEUE_OLDEST_WAIT_US = 27  # longest wait of a request that waits now
    QUEUE_OLDEST_BOUND_US = 28  # what the ordering's bound allowed it, when it came; 0: no bound
    QUEUE_FALLBACKS = 29  # times the queue level fell back to vLLM's behaviour
    PLACEMENT_FALLBACKS = 30  # the same of the placement level, in the worker that answers
    QUEUE_GRAPH_STEPS = 31  # steps whose prefill was cut to what a CUDA graph covers
    STEP_TOKENS = 32  # all tokens of the step that runs now
    SIGNAL_FALLBACKS = 33  # events that the engine's signals missed because they failed
    IDLE = 34  # 1: nothing to run, though requests may wait: while paused, or for a transfer
    # Of the placement level, said by the worker that answers. All ranks plan alike, so that these
    # are the same on every engine as soon as it has said them; the stall is the worker's own.
    PLACEMENT_PROPOSALS = 35  # rearrangements that were planned
    PLACEMENT_COMMITS = 36  # those that all ranks put in force
    PLACEMENT_RECEIVED_EXPERTS = 37  # experts of one layer that a commit brought to a new rank
    PLACEMENT_RECEIVED_BYTES = 38  # their weights
    PLACEMENT_STALL_US = 39  # serving time that commits have taken
    PLACEMENT_PREDICTED_GAIN_US = 40  # per step, of the last commit; a row holds no negative number
    PLACEMENT_PREDICTED_LOSS_US = 41  # the same where it is a loss
    PLACEMENT_REALIZED_GAIN_US = 42  # per step, of the last commit that was priced afterwards
    PLACEMENT_REALIZED_LOSS_US = 43  # the same where it is a loss
    PLACEMENT_BALANCE = 44  # mean over busiest rank, in the last window; 0 before the first plan
    PLACEMENT_LOCAL_SHARE = 45  # of pairs served on the source's own ranks; the same
    QUEUE_OFF = 46  # 1: the queue level has switched itself off
    PLACEMENT_OFF = 47  # 1: the same of the placement level, in the worker that answers
    # What KV connectors load (prefill and decode apart, KV stores) is no prefill.
    AWAITED_KV_TOKENS = 48  # to be loaded for waiting requests, which have no blocks for it yet
    LOADED_KV_TOKENS = 49  # in blocks that waiting requests hold: on their way, or there
    LOADING_REQUESTS = 50  # waiting requests with tokens of either kind
    STEP_PREFILL_DEPTH_TOKENS = 51  # mean context before a prefill token of the step that runs now


SNAPSHOT_FIELDS = len(Field)
"""Columns of a row before the accepted counters."""
ACCEPTED_REQUESTS = SNAPSHOT_FIELDS
"""First of MAX_FRONT_ENDS columns: requests accepted from front end f since EPOCH."""
ACCEPTED_TOKENS = ACCEPTED_REQUESTS + MAX_FRONT_ENDS
"""First of MAX_FRONT_ENDS columns: prompt tokens accepted from front end f since EPOCH."""
ROUTER = "gimbal_router"
"""Name of a request's extra argument (``vllm_xargs``) with the number, 1 to MAX_FRONT_ENDS - 1, of
the router that sent it: where no front end counts acknowledgements, they are that router's."""
ROW_WIDTH = ACCEPTED_TOKENS + MAX_FRONT_ENDS

LARGEST = 2.0**53
"""No number of a row is larger: beyond it a float64 no longer counts by ones."""
_LARGEST_BITS = int(np.float64(LARGEST).view(np.uint64))

Row = npt.NDArray[np.float64]


class ImplausibleRow(ValueError):
    """A row that no engine can mean; the message names its first bad column."""


def column_name(column: int) -> str:
    """What column `column` of a row is called in messages."""
    if column < SNAPSHOT_FIELDS:
        return Field(column).name.lower()
    kind = "requests" if column < ACCEPTED_TOKENS else "tokens"
    return f"accepted_{kind}[{(column - ACCEPTED_REQUESTS) % MAX_FRONT_ENDS}]"


def row_problem(row: Row) -> str | None:
    """Why `row` [ROW_WIDTH] cannot be an engine's, naming the column, or None.

    All columns are counts, times and rates: finite, not negative, at most `LARGEST`; and no more
    KV blocks are used than there are.
    """
    used, total = row.item(Field.KV_BLOCKS_USED), row.item(Field.KV_BLOCKS_TOTAL)
    if used <= total and not _has_foreign(row):
        return None
    bad = np.flatnonzero(~((row >= 0.0) & (row <= LARGEST)))
    if bad.size:
        return f"{column_name(int(bad[0]))} is {row[bad[0]]:g}"
    if used > total:
        return f"kv_blocks_used is {used:g} of {total:g}"
    return None


def check_row(row: Row) -> None:
    """Raises ImplausibleRow for a number that no row holds, at the price of one comparison."""
    if _has_foreign(row):
        problem = row_problem(row)
        if problem is not None:
            raise ImplausibleRow(problem)


def _has_foreign(row: Row) -> bool:
    return words_have_foreign(row.view(np.uint64))


def words_have_foreign(words: npt.NDArray[np.uint64]) -> bool:
    """Whether a row, given as integers, may hold a number that no row does.

    Read so, the float64 from 0 to `LARGEST` come first; what is larger, infinite, NaN or has a sign
    (as -0 has, which is 0) comes after them.
    """
    return words.item(words.argmax()) > _LARGEST_BITS  # argmax: a third of what max takes


def mended(row: Row) -> int:
    """Sets numbers of `row` that no row holds to 0, in place; returns how many."""
    bad = ~((row >= 0.0) & (row <= LARGEST))
    row[bad] = 0.0
    if row[Field.KV_BLOCKS_USED] > row[Field.KV_BLOCKS_TOTAL]:
        row[Field.KV_BLOCKS_USED] = row[Field.KV_BLOCKS_TOTAL]
    return int(bad.sum())


def plausible(value: float) -> bool:
    """Whether a row may hold `value`."""
    return math.isfinite(value) and 0.0 <= value <= LARGEST
