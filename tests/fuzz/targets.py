"""Everything that is fuzzed, with its share of a long run."""

from __future__ import annotations

from tests.fuzz import inputs, outside, policies
from tests.fuzz.run import Target

TARGETS = (
    Target("rows", 0.2, outside.rows),
    Target("published rows", 0.05, outside.published_rows),
    Target("board", 0.01, outside.board_words),
    Target("control", 0.12, outside.control),
    Target("control over HTTP", 0.01, outside.control_over_http),
    Target("configuration", 0.1, inputs.configuration),
    Target("YAML files", 0.005, inputs.yaml_files),
    Target("traces", 0.1, inputs.traces),
    Target("recordings", 0.01, inputs.recordings),
    Target("planner", 0.02, policies.planner),
    Target("queue", 0.08, policies.queue),
    Target("step decisions", 0.2, policies.step),
    Target("dispatcher", 0.05, policies.dispatcher),
    Target("online cost", 0.02, policies.online_cost),
)
