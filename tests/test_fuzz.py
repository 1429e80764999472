"""A short run of every target of `tests.fuzz`, and what the runner counts."""

from __future__ import annotations

import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")
from gimbal.core.errors import InputError
from tests.fuzz import policies
from tests.fuzz.run import Target, input_of, run, shares_of
from tests.fuzz.targets import TARGETS
from tests.fuzz.values import finite

SEED = 20
INPUTS = 2_000
FEW = {"recordings": 400, "YAML files": 300}
"""Targets whose inputs take milliseconds to write and read."""


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name.replace(" ", "-"))
def test_nothing_but_the_documented_error_is_raised(target: Target) -> None:
    outcome = run(target, FEW.get(target.name, INPUTS), SEED)
    said = [f"--seed {SEED} --target {target.name!r} --only {i}: {m}" for i, m in outcome.failures]
    assert outcome.failed == 0, "\n".join(said)
    assert outcome.taken > 0


@settings(max_examples=100, phases=(Phase.explicit, Phase.reuse, Phase.generate), print_blob=True)
@given(st.randoms(use_true_random=False))
def test_policies_hold_on_inputs_that_hypothesis_draws(rng: random.Random) -> None:
    """Not shrunk: that may take as long as a test may run, and shows no numbers of a `Random`."""
    policies.queue(rng)
    policies.step(rng)
    policies.dispatcher(rng)


def test_what_became_of_each_input_is_counted() -> None:
    def case(rng: random.Random) -> None:
        number = rng.randrange(3)
        if number == 0:
            raise InputError("refused")
        if number == 1:
            raise KeyError(f"number {number}")

    outcome = run(Target("t", 1.0, case), 300, seed=1)
    assert outcome.inputs == 300
    assert min(outcome.taken, outcome.refused, outcome.failed) > 60
    (index, message), *others = outcome.failures
    assert others == [], "one kind of failure, shown once"
    assert "KeyError: 'number 1'" in message
    assert input_of(1, "t", index).randrange(3) == 1


def test_shares_add_up() -> None:
    targets = [Target(n, share, lambda rng: None) for n, share in (("a", 3), ("b", 1), ("c", 1e-9))]
    counts = shares_of(targets, 1_000_000)
    assert sum(counts.values()) == 1_000_000
    assert counts["c"] == 1
    assert counts["a"] == pytest.approx(750_000, abs=2)


def test_finite_looks_into_everything() -> None:
    assert finite({"a": [1, 2.0, None, "x", {"b": ()}]})
    assert not finite({"a": [{"b": float("nan")}]})
