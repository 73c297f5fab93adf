"""How models read rows: alike alone and in any batch, wherever the architecture reads the class."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
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
from fedhl.model.reading import InRange, check_rows, padding_id
from fedhl.task import KINDS
from fedhl.task.examples import Encoded, Example
from fedhl.task.rows import located
from fedhl.task.texts import Texts

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
    "RoBERTa": lambda **pad: transformers.RobertaConfig(**SIZE, **{"pad_token_id": 1, **pad}),
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

    class Seen(Texts):
        def score(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            found = super().score(outputs, batch)
            seen.extend(found["loss"].tolist())
            return found

    evaluate(
        loaded.model,
        examples,
        objective=Seen(KINDS[loaded.task], padding_id(loaded.processor)),
        batch_size=size,
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
    ids = [loaded.processor(text)["input_ids"] for text in texts]
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


# --- rows that a model cannot read --------------------------------------------------------------


def refusal(loaded: Loaded, rows: list[list[int]], max_length: int = 128) -> str:
    """What is said of these rows; "" if they can be read."""
    encoded = Encoded([Example(ids, k % 2) for k, ids in enumerate(rows)], [*range(len(rows))], 0)
    try:
        with located([], "rows.jsonl"):
            check_rows(loaded.model, loaded.processor, encoded, max_length)
    except UserError as error:
        return str(error)
    return ""


T5: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
T5 |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
BART: dict[str, Any] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.3}
BART |= {f"{half}_attention_heads": 2 for half in ("encoder", "decoder")}
BART |= {"max_position_embeddings": 40, "pad_token_id": 0, "eos_token_id": 2}
GPTJ: dict[str, Any] = {"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (CONFIGS["BERT"](), 40),
        (CONFIGS["GPT-2"](), 40),
        (CONFIGS["RoBERTa"](), 40 - 1 - 1),  # counted from the padding id, 1, on
        (transformers.BartConfig(vocab_size=len(WORDS), **BART), 40),  # in a table of 42
        (transformers.GPTJConfig(vocab_size=len(WORDS), **GPTJ), 40),  # no embedding
        (CONFIGS["Llama"](), None),
        (transformers.T5Config(vocab_size=len(WORDS), **T5), None),
    ],
    ids=["BERT", "GPT-2", "RoBERTa", "BART", "GPT-J", "Llama", "T5"],
)
def test_a_row_beyond_the_positions_of_the_model(
    config: Any, most: int | None, tmp_path: Path
) -> None:
    loaded = load_model(save(tmp_path, config), "sequence-classification", labels=LABELS)

    def row(length: int) -> list[int]:
        return [*(5 + k % 8 for k in range(length - 1)), 2]

    assert refusal(loaded, [row(3), row(most or 90), row(5)]) == ""
    said = refusal(loaded, [row(3), row((most or 90) + 1), row(5)])
    if most is None:
        assert said == ""
    else:
        assert said.startswith(
            f"rows.jsonl: row 1 (counted from 0): it has {most + 1} tokens, but a "
        )
        assert f"at most {most}, " in said and said.endswith(f"now 128, to at most {most}")


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_a_token_beyond_the_embedding(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, CONFIGS[name]())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["yew", "gnu"])
    tokenizer.save_pretrained(folder)
    loaded = load_model(folder, "sequence-classification", labels=LABELS)
    rows = [loaded.processor(text)["input_ids"] for text in ("cat", "dog", "a gnu")]
    assert refusal(loaded, rows[:2]) == ""
    said = refusal(loaded, rows)
    last = len(WORDS)
    assert said.startswith(
        f"rows.jsonl: row 2 (counted from 0): it has the token 'gnu', whose id is {last + 1}"
    )
    assert f"embedding has {last} rows" in said


def test_a_table_of_any_kind_is_looked_up_within_it() -> None:
    """As a GPU does not: there the process is of no use after the first index beyond a table."""
    table, beyond = torch.zeros(4, 2), torch.tensor([[1, 4]])
    with InRange():
        for look_up in (
            lambda index: F.embedding(index, table),
            lambda index: table[index],
            lambda index: table.gather(0, index),
        ):
            look_up(beyond - 1)
            with pytest.raises(IndexError, match="index 4 is beyond a table of 4"):
                look_up(beyond)


def test_rows_without_a_known_token(tmp_path: Path) -> None:
    loaded = load_model(save(tmp_path, CONFIGS["BERT"]()), "sequence-classification", labels=LABELS)
    rows = [loaded.processor(text)["input_ids"] for text in ("gato", "perro y zorro", "cat")]
    assert refusal(loaded, rows) == ""
    assert "no token of any row is known to the model's tokenizer" in refusal(loaded, rows[:2])


@pytest.mark.parametrize(
    "config",
    [
        transformers.T5Config(vocab_size=len(WORDS), **T5),
        transformers.BartConfig(vocab_size=len(WORDS), **BART),
    ],
    ids=["T5", "BART"],
)
def test_an_end_token_inside_a_text(config: Any, tmp_path: Path) -> None:
    """Where the class is read at the end token, a second one in a row is a second class."""
    loaded = load_model(save(tmp_path, config), "sequence-classification", labels=LABELS)
    rows = [[5, 6, 2], [7, 2, 8, 2], [9, 2]]
    assert refusal(loaded, rows[::2]) == ""
    said = refusal(loaded, rows)
    assert (
        "row 1 (counted from 0): it has the end token '[EOS]' 2 times, and most rows have it 1 times"
        in said
    )
    llama = load_model(save(tmp_path / "llama", CONFIGS["Llama"]()), "sequence-classification")
    assert refusal(llama, rows) == ""


def test_a_model_that_cannot_read_any_row_says_why(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=len(WORDS), **T5)
    loaded = load_model(save(tmp_path, config), "sequence-classification", labels=LABELS)
    said = refusal(loaded, [[5, 6, 7]])  # without an end token there is no class
    assert said.startswith(
        "rows.jsonl: row 0 (counted from 0): it has 3 tokens, which a T5ForSequenceCl"
    )
