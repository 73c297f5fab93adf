"""Models whose layers are awkward for PEFT: m != n, grouped-query attention, Conv1D."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

TINY: dict[str, Any] = {"vocab_size": 16, "max_position_embeddings": 16}
IDS = torch.arange(3, 9).reshape(1, 6)


def llama() -> PreTrainedModel:
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**TINY, **size, **heads))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=16, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config)
