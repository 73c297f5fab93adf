"""How models read rows: alike alone and in any batch, wherever the architecture reads the class."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny import ANIMALS, PLANTS, WORDS, classification, save_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedhl.config import Config
from fedhl.errors import UserError
from fedhl.federation.prepare import load_federation
from fedhl.model.evaluation import evaluate
from fedhl.model.loading import Loaded, load_model
from fedhl.task import KINDS
from fedhl.task.examples import Example

LABELS = ["animal", "plant"]
SIZE: dict[str, Any] = {
    **{"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 40},
    **{"initializer_range": 0.3},
}
ENDS: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 2}
XLNET: dict[str, Any] = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}
XLM: dict[str, Any] = {"n_words": len(WORDS), "emb_dim": 16, "n_layers": 2, "n_heads": 2}
XLM |= {"max_position_embeddings": 40, "init_std": 0.3, "embed_init_std": 0.3}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def gemma3(**padding: Any) -> Any:
    """The config of the text model is nested in another."""
    text = {**SIZE, **ENDS, "num_key_value_heads": 1, "head_dim": 8, **padding}
    return transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)


CONFIGS: dict[str, Any] = {
    "BERT": lambda **pad: transformers.BertConfig(**SIZE | pad),
    "RoBERTa": lambda **pad: transformers.RobertaConfig(**SIZE | {"pad_token_id": 1} | pad),
    "Llama": lambda **pad: transformers.LlamaConfig(**SIZE, **ENDS, **pad),
    "GPT-2": lambda **pad: transformers.GPT2Config(
        **{"vocab_size": len(WORDS), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40},
        **{"initializer_range": 0.3, **ENDS, **pad},
    ),
    "Gemma 3": gemma3,
    "XLNet": lambda **pad: transformers.XLNetConfig(
        vocab_size=len(WORDS), initializer_range=0.3, **XLNET, **pad
    ),
    "XLM": lambda **pad: transformers.XLMConfig(**XLM, summary_type="last", **pad),
}


def save(folder: Path, config: Any, side: str = "right", pad: str = "[PAD]") -> str:
    """A classifier of random weights, and a tokenizer that pads with `pad` on `side`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    changed = json.loads(file.read_text()) | {"padding_side": side, "pad_token": pad}
    file.write_text(json.dumps(changed))
    return str(folder)


def losses_alone(folder: str, texts: list[str], labels: list[int]) -> Tensor:
    """By transformers: each text in a batch of its own, without any padding."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = None
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    batches = [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in texts]
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches])
    return F.cross_entropy(logits, torch.tensor(labels), reduction="none")


def losses_in_batches(loaded: Loaded, examples: list[Example], size: int) -> list[float]:
    """By our evaluation: the loss of each row in batches of `size`."""
    seen: list[float] = []

    def score(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = KINDS[loaded.task].score(logits, labels)
        seen.extend(found["loss"].tolist())
        return {"loss": found["loss"]}

    evaluate(
        loaded.model,
        examples,
        score=score,
        batch_size=size,
        pad_id=int(loaded.tokenizer.pad_token_id or 0),
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
    )
    return seen


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("name", "padding", "pad"),
    [
        ("BERT", {}, "[PAD]"),
        ("RoBERTa", {}, "[PAD]"),
        ("RoBERTa", {}, "[UNK]"),
        ("Llama", {"pad_token_id": None}, "[PAD]"),
        ("Llama", {"pad_token_id": -1}, "[PAD]"),
        ("Llama", {"pad_token_id": 7}, "[PAD]"),
        ("Llama", {"pad_token_id": 0}, "[EOS]"),
        ("GPT-2", {"pad_token_id": 7}, "[PAD]"),
        ("Gemma 3", {"pad_token_id": 7}, "[PAD]"),
        ("XLNet", {"pad_token_id": 7}, "[PAD]"),
        ("XLM", {"pad_token_id": 7}, "[PAD]"),
    ],
)
def test_the_loss_of_a_row_does_not_depend_on_its_batch(
    name: str, padding: dict[str, Any], pad: str, side: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, CONFIGS[name](**padding), side, pad)
    texts = [" ".join((ANIMALS + PLANTS)[k : 2 * k + 2]) for k in range(8)]  # of 2 to 9 words
    labels = [k % 2 for k in range(8)]
    expected = losses_alone(folder, texts, labels).tolist()
    loaded = load_model(folder, "sequence-classification", labels=LABELS)
    ids = [loaded.tokenizer(text)["input_ids"] for text in texts]
    examples: Any = [Example(row, label) for row, label in zip(ids, labels, strict=True)]
    assert {len(row) for row in ids} == set(range(2, 10)) and loaded.batches
    for size in (8, 3, 1):
        got = losses_in_batches(loaded, examples, size)
        assert got == pytest.approx(
            expected[::-1], rel=1e-4
        )  # the longest rows are evaluated first


def test_the_padding_id_of_the_model_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    loaded = load_model(save(tmp_path, gemma3(pad_token_id=7)), "sequence-classification")
    assert loaded.model.config.pad_token_id == 0
    assert loaded.model.config.get_text_config().pad_token_id == 0


def test_a_model_that_counts_positions_from_its_padding_id_keeps_the_id(tmp_path: Path) -> None:
    """A RoBERTa that is saved and loaded with another id would shift all its positions."""
    folder = save(tmp_path, CONFIGS["RoBERTa"](), pad="[UNK]")
    assert load_model(folder, "sequence-classification").model.config.pad_token_id == 1
    folder = save(tmp_path / "other", CONFIGS["RoBERTa"](), pad="[PAD]")
    assert load_model(folder, "sequence-classification").model.config.pad_token_id == 1


def test_a_model_that_mixes_all_positions_reads_one_row_at_a_time(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZE.items() if key != "num_attention_heads"}
    folder = save(tmp_path / "fnet", transformers.FNetConfig(**sizes))
    changes: dict[str, Any] = {"model": {"source": folder}, "lora": {"targets": "all-linear"}}
    config = Config.model_validate(classification(**changes))
    with pytest.raises(
        UserError, match=r"does not ignore padding.*evaluation.batch_size: 1, and trai"
    ):
        load_federation(config, LABELS, {"a": 2})
    changes |= {"evaluation": {"batch_size": 1}}
    changes |= {"training": {"batch_size": 8, "accumulation": 8}}
    load_federation(Config.model_validate(classification(**changes)), LABELS, {"a": 2})


def test_a_padding_token_that_the_model_does_not_know(tmp_path: Path) -> None:
    folder = save(tmp_path, CONFIGS["Llama"]())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)
    message = (
        rf"pads with '<new>', token {len(WORDS)}, but the model's embedding has {len(WORDS)} rows"
    )
    with pytest.raises(UserError, match=message):
        load_model(folder, "sequence-classification")
