"""Small frozen models of three families, and rows of random tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fedhl.seeds import generator
from fedhl.task.examples import IGNORED, Example

VOCABULARY, LONGEST, CLASSES = 48, 12, 3
SIZE: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST}


def bert(dropout: float) -> PreTrainedModel:
    labels: dict[str, Any] = {"num_labels": CLASSES}
    config = BertConfig(
        **SIZE,
        **labels,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)


def llama(dropout: float) -> PreTrainedModel:
    """Grouped-query attention: k_proj and v_proj are half as wide."""
    config = LlamaConfig(
        **SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
        initializer_range=0.2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def gpt2(dropout: float) -> PreTrainedModel:
    """Conv1D layers, whose weights are transposed."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LONGEST,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.2,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2}
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
HEADS = {"bert": ("classifier.weight", "classifier.bias"), "llama": (), "gpt2": ()}
both = pytest.mark.parametrize("kind", ["bert", "llama"])


def build(kind: str, dropout: float = 0.0) -> PreTrainedModel:
    """The same frozen base every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind](dropout)
    model.requires_grad_(False)
    return model.eval()


def rows(kind: str, count: int, seed: int = 0) -> list[Example]:
    """Rows of 2 to 12 random tokens: a class, or a completion of all but the first 1 to 4 tokens."""
    draw = generator(seed, "rows")
    examples = []
    for k in range(count):
        length = 2 + (5 * k + seed) % (LONGEST - 1)
        ids = torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()
        prompt = 1 + k % min(4, length - 1)
        completion = [IGNORED] * prompt + ids[prompt:]
        examples.append(Example(ids, ids[0] % CLASSES if kind == "bert" else completion))
    return examples
