"""Model types whose published configurations are among those of `docs/models.md`.

Others are read by the same names of keys, and the reader says so: a family may mean something else
by one of them.
"""

FAMILIES = (
    "afmoe",
    "bailing_moe",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "gemma4_text",
    "glm4_moe",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoehybrid",
    "hunyuan_v1_moe",
    "jamba",
    "kimi_k2",
    "kimi_linear",
    "lfm2_moe",
    "llama4_text",
    "longcat_flash",
    "mimo_v2_flash",
    "minimax_m1",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe_text",
    "qwen3_vl_moe_text",
    "step3_text",
)
