"""What a model is made of, as its published configuration says: the one reader of ``config.json``.

`find_model` and `read_config` find a configuration, `read_architecture` reads the whole of it,
`count_experts` and `count_top_k` one figure where the rest does not matter.
"""

from gimbal.core.model.architecture import Architecture, read_architecture
from gimbal.core.model.config import (
    ModelConfig,
    find_model,
    language_model,
    model_names,
    read_config,
)
from gimbal.core.model.experts import count_experts, count_top_k

__all__ = [
    "Architecture",
    "ModelConfig",
    "count_experts",
    "count_top_k",
    "find_model",
    "language_model",
    "model_names",
    "read_architecture",
    "read_config",
]
