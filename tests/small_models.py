"""Configurations of models too small to exist."""

MLA = {
    "model_type": "deepseek_v3",
    "hidden_size": 1024,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "intermediate_size": 2048,
    "vocab_size": 1000,
}
