"""What a model is made of, as its published configuration says: the one reader of ``config.json``.

`read_config` finds the configuration in a folder, `read_architecture` reads the whole of it,
`count_experts` and `count_top_k` one figure where the rest does not matter.
"""

from gimbal.core.model.architecture import Architecture, read_architecture
from gimbal.core.model.config import ModelConfig, language_model, read_config
from gimbal.core.model.experts import count_experts, count_top_k

__all__ = [
    "Architecture",
    "ModelConfig",
    "count_experts",
    "count_top_k",
    "language_model",
    "read_architecture",
    "read_config",
]
