"""Tiny models of any architecture of transformers, by a config that is small in every number."""

import shutil
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from s2t2_dist.lm.architecture import on_meta

MOST = 3_000_000  # weights: more means that the config has numbers of other names
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "word_embed_proj_dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "d_ff")
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx")
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
SMALL = {
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(LAYERS, 2),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(INNER, 48),
    **dict.fromkeys(LENGTHS, 128),
    **dict.fromkeys(EXPERTS, 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "rotary_dim": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# What a family needs beside that.
MORE = {
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    },
    "falcon_h1": {
        **{"lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "mamba_d_state": 8},
        **{"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 16},
    },
    "minicpm3": {"num_key_value_heads": 4},
    "opt": {"word_embed_proj_dim": 16},
    "gemma3": {
        "text_config": {**dict.fromkeys(("hidden_size", "intermediate_size"), 32), "head_dim": 8},
        "vision_config": {
            **dict.fromkeys(("hidden_size", "intermediate_size"), 16),
            **{
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {
        **{"hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0},
        "vocab_size_per_layer_input": 400,
        **{"layer_types": ["sliding_attention", "full_attention"], "intermediate_size": [48, 48]},
        **{"activation_sparsity_pattern": [0.0, 0.0]},
    },
    "gemma4_text": {
        **{"hidden_size_per_layer_input": 8, "global_head_dim": 8, "num_kv_shared_layers": 0},
        "vocab_size_per_layer_input": 400,
        **{"layer_types": ["sliding_attention", "full_attention"]},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "deepseek_v2": {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "head_dim": 8},
    "granitemoehybrid": {
        **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16},
        "layer_types": ["mamba", "attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
}


def tiny_config(model_type: str, vocab_size: int, **changes) -> PretrainedConfig:
    """A config of two layers and width 32.

    Raises:
        Exception: of any kind: the family needs more than this knows.
    """
    kind = CONFIG_MAPPING[model_type]
    known = kind().to_dict()
    given = {key: value for key, value in SMALL.items() if key in known}
    more = {**MORE.get(model_type, {}), **changes}
    if "text_config" in more:
        text = {key: SMALL[key] for key in ("num_hidden_layers", "num_attention_heads")}
        text |= {"num_key_value_heads": 2, "vocab_size": vocab_size, **more["text_config"]}
        return kind(**{**given, **more, "text_config": text})
    return kind(**{**given, "vocab_size": vocab_size, **more})


def make_model(config: PretrainedConfig, tokenizer: Path, folder: Path) -> Path:
    """A model of this config with random weights, biases and scales included, as a folder."""
    weights = sum(parameter.numel() for parameter in on_meta(config).parameters())
    assert weights <= MOST, f"{config.model_type} has {weights:,} weights"
    torch.manual_seed(17)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in lm.named_buffers():  # such as e_score_correction_bias
            if name in lm.state_dict() and buffer.is_floating_point() and not buffer.any():
                buffer.add_(0.1 * torch.randn_like(buffer))
    lm.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder
