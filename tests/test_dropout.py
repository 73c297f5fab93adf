"""`model.dropout` where dropout is in modules, in numbers of modules or configs, or in whole layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny import WORDS, save_tokenizer
from tokenizers import processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from fedhl.errors import UserError
from fedhl.model.dropout import set_dropout
from fedhl.model.loading import load_model

BASIC: dict[str, Any] = {"vocab_size": len(WORDS), "bos_token_id": 2, "eos_token_id": 2}
SIZE: dict[str, Any] = BASIC | {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 40, "initializer_range": 0.3},
}
HALF: dict[str, Any] = {"hidden_dropout": 0.5, "attention_dropout": 0.5}
OPT: dict[str, Any] = {"ffn_dim": 16, "word_embed_proj_dim": 16, "init_std": 0.3, "dropout": 0.0}
BART: dict[str, Any] = BASIC | {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16},
    **{"max_position_embeddings": 40, "init_std": 0.3, "pad_token_id": 0},
    **{
        "dropout": 0.0,
        "activation_dropout": 0.5,
        "attention_dropout": 0.5,
        "classifier_dropout": 0.5,
    },
    **{"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
}
XLNET: dict[str, Any] = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16, "dropout": 0.5}
MODELS: dict[str, Any] = {
    "modules": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZE, hidden_dropout_prob=0.5)
    ),
    "numbers of modules": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(**BASIC, hidden_size=16, n_layer=2, n_head=2, **HALF)
    ),
    "numbers of configs": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(
            **BASIC,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            parallel_attn=False,
            **HALF,
        )
    ),
    "attention alone": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZE, attention_dropout=0.5)
    ),
    "whole layers": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZE | OPT, layerdrop=0.5)
    ),
    "encoder and decoder": lambda: transformers.BartForSequenceClassification(
        transformers.BartConfig(**BART)
    ),
    "read from the left": lambda: transformers.XLNetForSequenceClassification(
        transformers.XLNetConfig(**BASIC, **XLNET)
    ),
}
KINDS = {"ForCausalLM": "causal-lm", "ForSequenceClassification": "sequence-classification"}


def save(folder: Path, make: Any) -> tuple[str, str]:
    """A model of random weights in a folder, and the kind of its task."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = make()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ends = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    tokenizer.backend_tokenizer.post_processor = ends
    tokenizer.save_pretrained(folder)
    return str(folder), next(KINDS[end] for end in KINDS if type(model).__name__.endswith(end))


@torch.no_grad()
def forward(model: PreTrainedModel, seed: int) -> Tensor:
    ids = torch.arange(5, 17)[None]
    ids[0, -1] = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("name", MODELS)
def test_without_dropout_training_draws_nothing(name: str, tmp_path: Path) -> None:
    source, task = save(tmp_path, MODELS[name])
    random = load_model(source, task).model.train()
    assert any(not torch.equal(forward(random, 0), forward(random, seed)) for seed in range(1, 9))
    model = load_model(source, task, dropout=0.0).model
    still = forward(model, 0)
    model.train()
    for seed in range(8):
        torch.testing.assert_close(forward(model, seed), still, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["modules", "numbers of modules", "numbers of configs"])
def test_another_probability_is_that_of_every_dropout(name: str, tmp_path: Path) -> None:
    """Where all are 0 in the checkpoint, and none but that of layers is put in."""
    source, task = save(tmp_path, MODELS[name])
    model = load_model(source, task, dropout=0.0).model
    set_dropout(model, 0.3)
    model.train()
    assert not torch.equal(forward(model, 0), forward(model, 1))
    layered = MODELS["whole layers"]()
    set_dropout(layered, 0.3)
    assert layered.model.decoder.layerdrop == 0.5 and layered.model.decoder.dropout == 0.3


def test_other_random_numbers_are_refused(tmp_path: Path) -> None:
    experts: dict[str, Any] = {"num_key_value_heads": 1, "num_local_experts": 4}
    config = transformers.MixtralConfig(**SIZE, **experts, router_jitter_noise=0.1)
    source, task = save(tmp_path, lambda: transformers.MixtralForCausalLM(config))
    with pytest.raises(UserError, match=r"model.dropout: a MixtralForCausalLM .* draws random"):
        load_model(source, task, dropout=0.0)
    before = torch.random.get_rng_state()
    assert not load_model(source, task).model.training
    assert torch.equal(torch.random.get_rng_state(), before)
