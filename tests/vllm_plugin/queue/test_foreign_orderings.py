"""Somebody else's ordering in vLLM's own scheduler: what it answers may be nonsense."""

import logging

import pytest

pytest.importorskip("vllm")

from tests.vllm_plugin import real_scheduler as real

pytestmark = pytest.mark.slow  # importing vLLM takes most of ten seconds

FOREIGN = '''
from gimbal.core.contracts import OrderingTraits


class Newest:
    """Right until its sixth request, then `answer`."""

    seen, answer = 0, 0.0

    def key(self, request, state):
        self.seen += 1
        return -request.arrival_s if self.seen < 6 else self.answer


class Nan(Newest):
    answer = float("nan")


class Words(Newest):
    answer = "first"


class Raises(Newest):
    @property
    def answer(self):
        raise RuntimeError("broken on purpose")


class Forgets(Newest):
    """Dynamic; one key too few as soon as two requests wait."""

    traits = OrderingTraits(dynamic=True)

    def keys(self, requests, state):
        return [0.0 for _ in requests][1:]
'''


@pytest.fixture
def build(schedulers, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm.gimbal"), "propagate", True)
    (tmp_path / "foreign_orderings.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name: schedulers(
        {"levels": ["queue"], "queue": {"ordering": f"foreign_orderings:{name}"}}
    )


def serve(scheduler, count=12, first=0):
    """Ids in the order in which requests were first scheduled; all must finish."""
    for index in range(first, first + count):
        scheduler.add_request(real.request(f"r{index:02}", 400, 2, arrival=float(index)))
    seen = []
    for _ in range(200):
        output = scheduler.schedule()
        seen += [name for name in output.num_scheduled_tokens if name not in seen]
        real.finish_step(scheduler, output)
        if not scheduler.has_requests():
            return seen
    raise AssertionError("requests are left")


def test_a_foreign_ordering_orders(build):
    scheduler = build("Newest")
    assert serve(scheduler, 5) == [f"r{index:02}" for index in reversed(range(5))]
    assert scheduler.gimbal_queue.guard.counts == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nan", "key of a request is nan"),
        ("Words", "TypeError"),
        ("Raises", "RuntimeError: broken on purpose"),
        ("Forgets", "11 keys for 12 requests"),
    ],
)
def test_vllms_queue_takes_over_from_one_that_answers_nonsense(build, caplog, name, message):
    scheduler = build(name)
    with caplog.at_level(logging.WARNING, "vllm.gimbal"):
        order = serve(scheduler)
    assert order == sorted(order), "first come, first served"
    level = scheduler.gimbal_queue
    assert set(level.guard.counts) == {"ordering"}, "asked again at every step, in vain"
    serve(scheduler, first=12, count=24)
    assert level.over
    assert level.guard.counts == {"ordering": level.guard.max_consecutive}
    assert scheduler.waiting is level.queue.fallback
    (said,) = (r.getMessage() for r in caplog.records if "fell back" in r.getMessage())
    assert f"queue ordering foreign_orderings:{name}: " in said
    assert message in said
