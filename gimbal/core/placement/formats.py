"""A placement in the forms other engines load."""

from __future__ import annotations

import json

import yaml

from gimbal.core.contracts import IntArray


def sglang(placement: IntArray, first_layer: int = 0) -> str:
    """JSON for SGLang's ``--init-expert-location``.

    SGLang indexes by model layer; `first_layer` dense layers in front get the first row's map,
    which nothing reads.
    """
    rows = placement.tolist()
    return json.dumps({"physical_to_logical_map": [rows[0]] * first_layer + rows})


def trtllm(placement: IntArray, first_layer: int = 0) -> str:
    """YAML for TensorRT-LLM's ``moe_config.load_balancer``: a static assignment per layer id."""
    rows = {first_layer + n: row for n, row in enumerate(placement.tolist())}
    config = {
        "num_slots": int(placement.shape[1]),
        "initial_global_assignments": rows,
        "layer_updates_per_iter": 0,
    }
    return yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=100)


FORMATS = {"sglang": sglang, "trtllm": trtllm}
