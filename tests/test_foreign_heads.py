"""Classifiers that are fine-tuned already: their labels keep their meaning, whatever the head is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny import BERT, LLAMA, save_tokenizer
from torch import Tensor

from fedhl.errors import UserError
from fedhl.model.loading import load_model

TASK = "sequence-classification"
NAMES = ["sad", "glad", "calm"]  # not in the order of the alphabet
DATA = sorted(NAMES)
TOKENS = torch.tensor([[5, 9, 7, 2], [6, 6, 12, 2]])

SMALL: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_layers": 1},
    **{"intermediate_size": 16, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "n_layers": 1, "n_heads": 2},
    **{"n_layer": 1, "n_head": 2, "n_embd": 16, "emb_dim": 16, "dim": 16, "hidden_dim": 16},
    **{"d_kv": 8, "d_ff": 16, "d_inner": 16, "num_heads": 2, "num_decoder_layers": 1},
    **{"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "embedding_size": 16, "pad_token_id": 0},
    **{"eos_token_id": 2, "bos_token_id": 1, "num_key_value_heads": 2},
    **{"cls_token_id": 1, "sep_token_id": 2, "max_position_embeddings": 32, "n_positions": 32},
}
HEADS = ["Bert", "Roberta", "DistilBert", "Electra", "DebertaV2", "ModernBert", "Albert"]
HEADS += ["Llama", "GPT2", "Bart", "T5", "XLNet", "XLM"]


def classifier(kind: str, folder: Path, names: list[str] | None = NAMES) -> Any:
    """A random classifier of an architecture, saved with a tokenizer."""
    known = vars(getattr(transformers, f"{kind}Config")())
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=BERT["vocab_size"], **{k: v for k, v in SMALL.items() if k in known}
    )
    if kind == "T5":
        config.decoder_start_token_id = 0
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    else:
        config.num_labels = 3
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.startswith(model.base_model_prefix + "."):
            torch.nn.init.normal_(parameter)  # a bias that is not zero
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", HEADS)
def test_each_label_keeps_its_logit(kind: str, tmp_path: Path) -> None:
    model = classifier(kind, tmp_path)
    loaded = load_model(str(tmp_path), TASK, labels=DATA)
    assert loaded.model.config.id2label == dict(enumerate(DATA))
    want = logits(model)[:, [NAMES.index(name) for name in DATA]]
    assert torch.equal(logits(loaded.model), want)
    assert logits(model).unique().numel() == 6  # no two labels alike, so that order shows
    encoder = loaded.model.base_model_prefix + "."
    trained = {name for name in loaded.head if not name.startswith(encoder)}
    assert trained and all(loaded.model.get_parameter(n).isfinite().all() for n in trained)
    same = load_model(str(tmp_path), TASK, labels=NAMES)
    assert torch.equal(logits(same.model), logits(model))


def test_names_that_say_nothing_stay_in_their_order(tmp_path: Path) -> None:
    model = classifier("Bert", tmp_path, names=None)
    loaded = load_model(str(tmp_path), TASK, labels=DATA)
    assert torch.equal(logits(loaded.model), logits(model))


def test_twelve_names_of_transformers_are_sorted_as_numbers(tmp_path: Path) -> None:
    names = [f"LABEL_{i}" for i in range(12)]
    model = classifier("Bert", tmp_path, names)
    loaded = load_model(str(tmp_path), TASK, labels=sorted(names))
    assert torch.equal(
        logits(loaded.model), logits(model)[:, [names.index(n) for n in sorted(names)]]
    )


@pytest.mark.parametrize("labels", [["calm", "glad"], ["calm", "glad", "wild"], ["0", "1", "2"]])
@pytest.mark.parametrize("kind", ["Bert", "Bart"])
def test_a_head_of_other_labels_is_refused_or_drawn_anew(
    kind: str, labels: list[str], tmp_path: Path
) -> None:
    model = classifier(kind, tmp_path)
    with pytest.raises(UserError, match=r"the labels sad, glad, calm.*data has .*fresh_head"):
        load_model(str(tmp_path), TASK, labels=labels)

    def fresh(seed: int) -> dict[str, Tensor]:
        loaded = load_model(str(tmp_path), TASK, labels=labels, fresh_head=True, seed=seed)
        assert logits(loaded.model).shape == (2, len(labels))
        old = dict(model.named_parameters())
        for name, parameter in loaded.model.named_parameters():
            if name in loaded.head:
                assert not torch.equal(parameter, old[name])
            else:
                assert torch.equal(parameter, old[name])
        return {name: loaded.model.get_parameter(name) for name in loaded.head}

    one, again, other = fresh(1), fresh(1), fresh(2)
    for name, parameter in one.items():
        assert torch.equal(parameter, again[name])
        if name.endswith("weight"):
            assert not torch.equal(parameter, other[name])
            assert 0.01 < parameter.std() < 0.04  # both architectures draw with deviation 0.02
        else:
            assert not parameter.any()


def test_a_name_without_a_head_asks_for_nothing(tmp_path: Path) -> None:
    """A config may name labels although the checkpoint holds no classifier."""
    config = transformers.LlamaConfig(**LLAMA)
    config.id2label = dict(enumerate(NAMES))
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"]["0"] == "sad"
    loaded = load_model(str(tmp_path), TASK, labels=["x", "y"])
    assert loaded.head == ("score.weight",)
