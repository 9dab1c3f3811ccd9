"""Configs of well-known models as their makers publish them, as far as sizes go, and small ones of the same families."""

LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}  # fmt: skip
MIXTRAL_8X7B = MISTRAL_7B | {"model_type": "mixtral", "sliding_window": None, "num_local_experts": 8}
QWEN2_7B = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072, "sliding_window": 131072,
    "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_8B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "sliding_window": None, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
    "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip

_SMALL = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 8,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SMALL_MLA = _SMALL | {
    "model_type": "deepseek_v3", "num_key_value_heads": 8, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}  # fmt: skip
SMALL = {
    "llama": _SMALL | {"model_type": "llama", "num_key_value_heads": 2},
    "llama-biased-tied": _SMALL
    | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24},
    "mistral-sliding": _SMALL | {"model_type": "mistral", "sliding_window": 12},
    "mistral-full": _SMALL | {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": None},
    "phi3": _SMALL | {"model_type": "phi3", "num_key_value_heads": 2},
    "qwen2": _SMALL | {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2-half-sliding": _SMALL
    | {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 3},
    "qwen3": _SMALL | {"model_type": "qwen3", "num_key_value_heads": 2},
    "qwen3-biased": _SMALL | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True},
    "mixtral": _SMALL | {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3-moe": _SMALL
    | {
        "model_type": "qwen3_moe", "num_key_value_heads": 2, "head_dim": 24, "moe_intermediate_size": 32, "num_experts": 6,
        "num_experts_per_tok": 2, "mlp_only_layers": [1], "decoder_sparse_step": 2,
    },
    "deepseek-v3": _SMALL_MLA | {"q_lora_rank": 24, "first_k_dense_replace": 2},
    "deepseek-v3-plain-query": _SMALL_MLA | {"q_lora_rank": None, "first_k_dense_replace": 1, "attention_bias": True},
}  # fmt: skip
