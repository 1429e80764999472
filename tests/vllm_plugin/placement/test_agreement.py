"""The group's decision from the ranks' votes."""

import pytest

from gimbal.vllm_plugin.placement.agreement import Verdict, map_hash, outcome

COMMIT, KEEP, REFUSE, VLLM = (
    Verdict.COMMIT,
    Verdict.KEEP,
    Verdict.REFUSE,
    Verdict.VLLM,
)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([(COMMIT, 7), (COMMIT, 7)], COMMIT),
        ([(COMMIT, 7), (COMMIT, 8)], Verdict.DISAGREE),
        ([(COMMIT, 7), (KEEP, 0)], Verdict.DISAGREE),
        ([(KEEP, 0), (KEEP, 0)], KEEP),
        ([(COMMIT, 7), (REFUSE, 0)], REFUSE),
        ([(COMMIT, 7), (VLLM, 0), (REFUSE, 0)], VLLM),
        ([(COMMIT, 7), (VLLM, 0), (Verdict.OFF, 0)], Verdict.OFF),
        ([(COMMIT, 7)], COMMIT),
        ([(COMMIT, 7), (Verdict.NOT_READY, 0), (REFUSE, 0)], Verdict.NOT_READY),
    ],
)
def test_outcome(votes, expected):
    assert outcome(votes) is expected


def test_a_hash_fits_a_signed_integer():
    assert map_hash("f" * 16) == 2**63 - 1
    assert map_hash("0" * 15 + "a") == 10
