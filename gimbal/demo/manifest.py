"""``gimbal_demo.json``: what the demo model is made of, and prompts by domain from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.core.errors import InputError, nearest, one_line
from gimbal.core.json_text import read_json
from gimbal.demo.sizes import DemoSizes
from gimbal.demo.vocabulary import DemoVocabulary

MANIFEST = "gimbal_demo.json"


@dataclass(frozen=True, slots=True)
class DemoManifest:
    """The demo model's facts.

    Attributes:
        seed: what the model was made from.
        sizes: every `DemoSizes` field by name.
        domains: name -> (token ids, probabilities) of a word in that domain's prompts.
    """

    seed: int
    sizes: dict[str, Any]
    domains: dict[str, tuple[np.ndarray, np.ndarray]]

    def prompt(self, domain: str, tokens: int, rng: np.random.Generator) -> list[int]:
        """Token ids of a prompt of `tokens` words; raises InputError for an unknown domain."""
        if domain not in self.domains:
            raise InputError(f"unknown domain {domain!r}{nearest(domain, self.domains)}")
        ids, probabilities = self.domains[domain]
        return [int(i) for i in rng.choice(ids, size=tokens, p=probabilities)]


def manifest_values(sizes: DemoSizes, words: DemoVocabulary) -> dict[str, Any]:
    """What `load_manifest` reads back."""
    domains = {}
    for index, name in enumerate(sizes.domain_names):
        ids, probabilities = words.weights(index)
        domains[name] = {
            "token_ids": ids.tolist(),
            "weights": [round(float(p), 9) for p in probabilities],
        }
    return {"seed": sizes.seed, "sizes": dataclasses.asdict(sizes), "domains": domains}


def load_manifest(model: Path) -> DemoManifest:
    """Reads the manifest beside a demo model; raises InputError when there is none."""
    path = model / MANIFEST
    if not path.exists():
        raise InputError(
            f"{model}: no {MANIFEST}; make the model with `gimbal model demo --out {model}`"
        )
    values = read_json(path)
    try:
        domains = {}
        for name, entry in values["domains"].items():
            weights = np.asarray(entry["weights"], dtype=np.float64)
            ids = np.asarray(entry["token_ids"], dtype=np.int64)
            if ids.ndim != 1 or ids.shape != weights.shape or not 1e-9 < weights.sum() < np.inf:
                raise ValueError(f"token_ids and weights of {name} do not fit together")
            if weights.min() < 0.0:
                raise ValueError(f"a negative weight of {name}")
            domains[name] = (ids, weights / weights.sum())
        return DemoManifest(int(values["seed"]), dict(values["sizes"]), domains)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: malformed ({one_line(repr(error))})") from None
