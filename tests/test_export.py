"""Exports load in PEFT and transformers without a word and compute the same; merging is exact."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from support.tiny import BERT, LLAMA, WORDS, save_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import logging as noise

from fedhl.errors import UserError
from fedhl.export import export_adapter, export_merged, merge_adapters, merge_folders, model_card
from fedhl.export.cards import base_licence
from fedhl.lora import LoRA, truncate
from fedhl.model import adapters, peft, targets
from fedhl.model.loading import Loaded, load_model

# PEFT asks transformers for a property that a newer transformers has renamed.
RENAMED = "`is_gradient_checkpointing` is deprecated"
pytestmark = pytest.mark.filterwarnings(f"ignore:{RENAMED}")

IDS = torch.arange(3, 9).reshape(1, 6)
LABELS = ["no", "yes", "maybe"]


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "bert":
        return BertForMaskedLM(BertConfig(**BERT))
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**LLAMA))
    shape: dict[str, Any] = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), **shape, bos_token_id=2, eos_token_id=2)
    )


def save(name: str, folder: Path) -> str:
    build(name).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def load(source: str) -> Loaded:
    if Path(source).name == "bert":
        return load_model(source, "sequence-classification", labels=LABELS, seed=5)
    return load_model(source, "causal-lm")


@pytest.fixture(params=["bert", "llama", "gpt2"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return save(request.param, tmp_path / request.param)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def random_head(loaded: Loaded) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(9)
    shapes = {name: loaded.model.get_parameter(name).shape for name in loaded.head}
    return {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()}


@contextmanager
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Any warning is an error, and so is any logged one."""
    noise.enable_propagation()
    caplog.clear()
    try:
        with caplog.at_level(logging.WARNING), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=RENAMED)
            yield
    finally:
        noise.disable_propagation()
    assert [r.getMessage() for r in caplog.records] == []


def auto(loaded: Loaded) -> Any:
    classify = loaded.task == "sequence-classification"
    return AutoModelForSequenceClassification if classify else AutoModelForCausalLM


def fresh_base(loaded: Loaded) -> PreTrainedModel:
    """The base as a stranger loads it: for a classifier with another random head."""
    kwargs: dict[str, Any] = {"num_labels": len(LABELS)} if loaded.head else {}
    return auto(loaded).from_pretrained(loaded.source_for_adapter, **kwargs)


def test_an_exported_adapter_computes_what_the_run_computed(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(source)
    slots = peft.attach(loaded.model, {4: 6}, "all-linear", rslora=True, head=loaded.head)
    draw = torch.Generator().manual_seed(1)
    adapter = {
        n: LoRA(
            torch.randn(4, k, generator=draw) / 4, torch.randn(m, 4, generator=draw) / 4, 6 / 4**0.5
        )
        for n, (m, k) in peft.layers(slots).items()
    }
    head = random_head(loaded)
    peft.write(slots, 4, adapter)
    peft.write_head(slots, head)
    peft.activate(slots, 4)
    expected = logits(loaded.model)

    export_adapter(tmp_path / "out", loaded, adapter, head, "card\n")
    # Ranks that differ between layers: every other layer at a lower rank and then padded apart.
    uneven = {
        n: truncate(lora, 2) if i % 2 else lora for i, (n, lora) in enumerate(adapter.items())
    }
    export_adapter(tmp_path / "uneven", loaded, uneven, head, "card\n")

    base = fresh_base(loaded)
    with silence(caplog):
        exported = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    torch.testing.assert_close(logits(exported), expected, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "out" / "README.md").read_text() == "card\n"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
        *(["config.json"] if loaded.head else []),
    }
    assert adapters.adapter_labels(tmp_path / "out") == (LABELS if loaded.head else None)
    names = sorted(uneven)
    with peft.offset(slots, {n: uneven[n].delta() for n in names}), peft.base_only(slots):
        expected = logits(loaded.model)
    base = fresh_base(loaded)
    with silence(caplog):
        exported = PeftModel.from_pretrained(base, str(tmp_path / "uneven"))
    torch.testing.assert_close(logits(exported), expected, atol=1e-5, rtol=1e-5)


def test_an_export_is_the_same_to_the_byte(tmp_path: Path) -> None:
    loaded = load(save("llama", tmp_path / "llama"))
    names = targets.find_targets(loaded.model, ["q_proj", "v_proj"])
    adapter = {
        n: LoRA(torch.ones(2, 32), torch.ones(32 if "q" in n else 16, 2), 1.0) for n in names
    }
    for out in ("a", "b"):
        export_adapter(tmp_path / out, loaded, dict(reversed(adapter.items())), {}, "")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_merged_model_computes_what_the_run_computed(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(source)
    slots = peft.attach(loaded.model, {2: 2}, "all-linear", head=loaded.head)
    draw = torch.Generator().manual_seed(2)
    deltas = {n: torch.randn(s, generator=draw) / 16 for n, s in peft.layers(slots).items()}
    head = random_head(loaded)
    peft.write_head(slots, head)
    with peft.offset(slots, deltas), peft.base_only(slots):
        expected = logits(loaded.model)

    fresh = load(source)
    export_merged(tmp_path / "out", fresh, deltas, head, "card\n")
    with silence(caplog):
        merged = auto(loaded).from_pretrained(tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert merged.config.use_cache is True
    assert tokenizer("cat oak")["input_ids"] == [WORDS.index("cat"), WORDS.index("oak")]
    if loaded.head:
        assert merged.config.id2label == dict(enumerate(LABELS))

    name = next(iter(deltas))
    with pytest.raises(ValueError, match=f"layer {name}x: not in this"):
        export_merged(tmp_path / "other", fresh, {name + "x": deltas[name]}, head, "")
    with pytest.raises(ValueError, match="expected an update of shape"):
        export_merged(tmp_path / "other", fresh, {name: deltas[name][:1]}, head, "")
    with pytest.raises(ValueError, match="un-adapted linear layer"):
        export_merged(tmp_path / "other", loaded, deltas, head, "")
    assert not any("other" in p.name for p in tmp_path.iterdir()), "nothing half-written is left"


def test_an_adapted_output_embedding_is_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both ways; where it shares its weight with the input embedding it cannot be adapted at all."""
    loaded = load(save("llama", tmp_path / "llama"))
    slots = peft.attach(loaded.model, {2: 2}, ["lm_head", "q_proj"])
    adapter = {
        n: LoRA(torch.randn(2, k), torch.randn(m, 2) / 4, 1.0)
        for n, (m, k) in peft.layers(slots).items()
    }
    assert "lm_head" in adapter
    peft.write(slots, 2, adapter)
    peft.activate(slots, 2)
    expected = logits(loaded.model)
    export_adapter(tmp_path / "adapter", loaded, adapter, {}, "")
    deltas = {name: lora.delta() for name, lora in adapter.items()}
    export_merged(tmp_path / "merged", load(str(tmp_path / "llama")), deltas, {}, "")
    with silence(caplog):
        exported = PeftModel.from_pretrained(fresh_base(loaded), str(tmp_path / "adapter"))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(exported), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    loaded = load(save("llama", tmp_path / "llama"))
    name = targets.find_targets(loaded.model, ["0.self_attn.q_proj"])[0]
    adapter = {name: LoRA(torch.ones(1, 32), torch.ones(32, 1), 1.0)}
    (tmp_path / "empty").mkdir()
    export_adapter(tmp_path / "empty", loaded, adapter, {}, "card")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export_adapter(tmp_path / "empty", loaded, adapter, {}, "another")
    assert (tmp_path / "empty" / "README.md").read_text() == "card"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
        export_adapter(tmp_path / "file" / "out", loaded, adapter, {}, "card")


# --- merging ------------------------------------------------------------------------------------

CONFIGS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 8},
    {"r": 5, "lora_alpha": 5, "use_rslora": True},
    {"r": 3, "lora_alpha": 7, "rank_pattern": 6},  # 6 on the second target only
]
NAMES = ["one", "two", "three"]
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "value"]}


def trained(
    name: str, base: str, folder: Path, configs: list[dict[str, Any]] = CONFIGS
) -> PeftModel:
    """A PEFT model with one random adapter per config, each saved to its own folder by PEFT."""
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    model = None
    for adapter, config in zip(NAMES, configs, strict=True):
        common = {"target_modules": TARGETS[name], "task_type": task, **config}
        if "rank_pattern" in config:
            common["rank_pattern"] = {TARGETS[name][1]: config["rank_pattern"]}
        lora = LoraConfig(**common, fan_in_fan_out=name == "gpt2", base_model_name_or_path=base)
        if model is None:
            kwargs: dict[str, Any] = {"num_labels": 3} if name == "bert" else {}
            cls = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
            model = get_peft_model(cls.from_pretrained(base, **kwargs), lora, adapter_name=adapter)
        else:
            model.add_adapter(adapter, lora)
    assert isinstance(model, PeftModel)
    torch.manual_seed(4)
    for key, parameter in model.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_equals_peft_cat(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save(name, tmp_path / name)
    # PEFT's "cat" wants one rank for all layers of an adapter.
    configs = [{k: v for k, v in c.items() if k != "rank_pattern"} for c in CONFIGS]
    oracle = trained(name, base, tmp_path, configs)
    weights = [0.5, 0.2, 0.3]
    oracle.add_weighted_adapter(NAMES, weights, "cat", combination_type="cat")
    oracle.set_adapter("cat")

    folders = [str(tmp_path / name) for name in NAMES]
    merge = merge_folders(folders, weights, None, tmp_path / "out")
    assert set(merge.ranks.values()) == {10} and merge.error == 0
    with silence(caplog):
        merged = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out")
        )
    torch.testing.assert_close(logits(merged), logits(oracle), atol=1e-5, rtol=1e-5)


def test_merging_averages_heads_and_patterns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save("bert", tmp_path / "bert")
    oracle = trained("bert", base, tmp_path)
    folders = [str(tmp_path / name) for name in NAMES]
    merge = merge_folders(folders, [1, 1, 2], None, str(tmp_path / "out"))
    assert merge.weights == (0.25, 0.25, 0.5)
    assert set(merge.ranks.values()) == {10, 13}
    adapter, head, config, _ = adapters.load_adapter(tmp_path / "out")
    for layer, lora in adapter.items():
        module = oracle.get_submodule(f"base_model.model.{layer}")
        parts = [module.get_delta_weight(name) for name in NAMES]  # pyright: ignore
        expected = 0.25 * parts[0] + 0.25 * parts[1] + 0.5 * parts[2]
        torch.testing.assert_close(lora.delta(), expected)
    saved = oracle.base_model.model.classifier.modules_to_save  # pyright: ignore
    expected = sum(w * saved[n].weight for n, w in zip(NAMES, merge.weights, strict=True))  # pyright: ignore
    torch.testing.assert_close(head["classifier.weight"], expected)
    assert config.task_type == "SEQ_CLS"
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    with silence(caplog):
        PeftModel.from_pretrained(plain, str(tmp_path / "out"))


def test_merging_at_a_rank_is_the_best_approximation(tmp_path: Path) -> None:
    base = save("llama", tmp_path / "llama")
    trained("llama", base, tmp_path)
    folders = [str(tmp_path / name) for name in NAMES]
    exact = merge_adapters([adapters.load_adapter(Path(f)).adapter for f in folders], [1 / 3] * 3)
    merge = merge_folders(folders, None, 4, tmp_path / "out")
    got = adapters.load_adapter(tmp_path / "out").adapter
    lost, total = 0.0, 0.0
    for layer, lora in exact.items():
        sigma = torch.linalg.svdvals(lora.delta().double())
        error, energy = float(sigma[4:].square().sum()), float(sigma.square().sum())
        assert merge.errors[layer] == pytest.approx(error / energy, rel=1e-4)
        residual = (got[layer].delta() - lora.delta()).square().sum()
        assert float(residual) == pytest.approx(error, rel=1e-3)
        lost, total = lost + error, total + energy
    assert merge.error == pytest.approx(lost / total, rel=1e-4)
    assert set(merge.ranks.values()) == {4}
    # A rank that no layer exceeds changes nothing, and a layer never gets more than min(m, n).
    assert merge_folders(folders, None, 500, tmp_path / "large").error == 0
    six = folders * 2
    capped = merge_folders(six, None, None, tmp_path / "capped")
    assert {r for n, r in capped.ranks.items() if "v_proj" in n} == {16}
    assert capped.error < 1e-12


def test_unnormalised_weights_are_used_as_they_are(tmp_path: Path) -> None:
    base = save("bert", tmp_path / "bert")
    trained("bert", base, tmp_path)
    merge_folders([str(tmp_path / "one")], [3], None, tmp_path / "out", normalize=False)
    before, after = adapters.load_adapter(tmp_path / "one"), adapters.load_adapter(tmp_path / "out")
    for layer, lora in after.adapter.items():
        torch.testing.assert_close(lora.delta(), 3 * before.adapter[layer].delta())
    torch.testing.assert_close(after.head, before.head)


def test_heads_of_other_labels_are_not_averaged(tmp_path: Path) -> None:
    """Those that name no labels, as PEFT saves them, are averaged with a warning."""
    base = save("bert", tmp_path / "bert")
    trained("bert", base, tmp_path)
    folders = [str(tmp_path / name) for name in NAMES]

    def name(folder: str, labels: list[str]) -> None:
        config = BertConfig(**BERT, id2label=dict(enumerate(labels)))
        config.save_pretrained(tmp_path / folder)

    assert merge_folders(folders, None, None, tmp_path / "zero").unnamed == tuple(folders)
    name("one", ["LABEL_0", "LABEL_1", "LABEL_2"])  # what transformers calls labels without names
    assert adapters.adapter_labels(tmp_path / "one") is None
    name("one", LABELS)
    assert merge_folders(folders, None, None, tmp_path / "first").unnamed == tuple(folders[1:])
    assert adapters.adapter_labels(tmp_path / "first") == LABELS
    for other in (["a", "b", "c"], LABELS[::-1]):
        name("three", other)
        with pytest.raises(
            UserError, match=r"three and .*one are classifiers of other labels, 'a|'m"
        ):
            merge_folders(folders, None, None, tmp_path / "second")
    (tmp_path / "three" / "config.json").write_text('{"id2label": ["a"]}')
    with pytest.raises(UserError, match=r"cannot read the labels in .*three/config\.json"):
        merge_folders(folders, None, None, tmp_path / "second")
    name("two", LABELS)
    name("three", LABELS)
    assert merge_folders(folders, None, None, tmp_path / "third").unnamed == ()


def test_adapters_of_other_tokenizers_are_refused(tmp_path: Path) -> None:
    """They read other tokens in the same text; how a tokenizer cut and padded last is no difference."""
    base = save("llama", tmp_path / "llama")
    trained("llama", base, tmp_path)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    save_tokenizer(tmp_path / "one")
    merge_folders([two, one], None, None, tmp_path / "first")
    assert (tmp_path / "first" / "tokenizer.json").is_file()
    file = tmp_path / "two" / "tokenizer.json"
    known = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(known | {"truncation": cut}))
    merge_folders([one, two], None, None, tmp_path / "second")
    file.write_text(json.dumps(known | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(UserError, match=r"two and .*one were trained with different tokenizers"):
        merge_folders([one, two], None, None, tmp_path / "third")
    file.write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer in"):
        merge_folders([one, two], None, None, tmp_path / "third")


def test_adapters_that_do_not_fit_together(tmp_path: Path) -> None:
    base = save("llama", tmp_path / "llama")
    trained("llama", base, tmp_path)
    folders = [str(tmp_path / name) for name in NAMES]
    out = tmp_path / "out"
    with pytest.raises(UserError, match="one weight per adapter, got 2 for 3"):
        merge_folders(folders, [1, 2], None, out)
    with pytest.raises(UserError, match="must sum to more than 0"):
        merge_folders(folders, [0, 0, 0], None, out)
    with pytest.raises(UserError, match="to a finite number"):
        merge_folders(folders, [1e308, 1e308, 0], None, out)
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="finite numbers and not negative"):
            merge_folders(folders, [1, wrong, 3], None, out)
    with pytest.raises(UserError, match="rank must be at least 1, got 0"):
        merge_folders(folders, None, 0, out)
    with pytest.raises(UserError, match="no file or folder"):
        merge_folders([str(tmp_path / "nowhere")], None, None, out)

    config = tmp_path / "two" / "adapter_config.json"
    config.write_text(config.read_text().replace(base, "another/base"))
    with pytest.raises(UserError, match=r"base_model_name_or_path is 'another/base'.*--force"):
        merge_folders(folders, None, None, out)
    assert not out.exists()
    merge_folders(folders, None, None, out, force=True)

    a = {"x": LoRA(torch.ones(1, 4), torch.ones(3, 1), 1.0)}
    with pytest.raises(UserError, match=r"do not adapt the same layers.* y"):
        merge_adapters([a, a | {"y": a["x"]}], [1, 1])
    with pytest.raises(UserError, match=r"layer x is \(3, 4\) in adapter 1 and \(2, 4\)"):
        merge_adapters([a, {"x": LoRA(torch.ones(1, 4), torch.ones(2, 1), 1.0)}], [1, 1])
    with pytest.raises(UserError, match="finite"):
        merge_adapters([a], [float("nan")])


# --- cards --------------------------------------------------------------------------------------

SUMMARY: dict[str, Any] = {
    **{"name": "reviews", "status": "finished", "fedhl": "0.1.0", "commit": "abc1234"},
    "method": {"name": "fedhl"},
    "weighting": {"name": "truncation", "power": 2, "epsilon": 0.001},
    **{"task": "sequence-classification", "rounds": 10, "rounds_done": 10, "metric": "accuracy"},
    "final": {
        "full": {"loss": 0.5, "accuracy": 0.79, "examples": 500},
        "truncated": {"rank": 64, "loss": 0.5, "accuracy": 0.78, "examples": 500},
        "ranks": {"16": {"loss": 0.6, "accuracy": 0.75, "examples": 500}},
    },
    "clients": [
        {"id": f"client-{i}", "rank": r, "scale": 2.0, "examples": 100, "labels": None}
        for i, r in enumerate([4, 4, 64])
    ],
    "seeds": {"root": 0},
    "hashes": {"config": "c0ffee", "model": "feed", "data": "beef"},
}


def data_of(card: str) -> ModelCardData:
    data = ModelCard(card).data
    assert isinstance(data, ModelCardData)
    return data


ABOUT: dict[str, Any] = {"max_length": 33, "labels": LABELS}


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_card_says_how_it_was_made(kind: Any) -> None:
    rank = 16 if kind == "adapter" else None
    card = model_card(SUMMARY, kind, rank, base="some/base", licence="mit", **ABOUT)
    data = data_of(card)
    assert data.base_model == "some/base" and data.license == "mit"
    assert data.library_name == ("peft" if kind == "adapter" else "transformers")
    assert data.pipeline_tag == "text-classification" and "fedhl" in (data.tags or [])
    scores = {result.metric_type: result.metric_value for result in data.eval_results or []}
    assert scores == ({"accuracy": 0.75, "loss": 0.6} if rank else {"accuracy": 0.79, "loss": 0.5})
    for fact in (
        *("truncation (power=2, epsilon=0.001)", "3 (2 of rank 4, 1 of rank 64)", "10 of 10"),
        *("accuracy 0.7900, loss 0.5000", "`c0ffee`", "0.1.0 (commit abc1234)", '"2": "maybe"'),
        *("max_length=33", "Licence: mit"),
    ):
        assert fact in card
    assert ("this adapter, rank 16 | accuracy 0.7500, loss 0.6000" in card) is (kind == "adapter")
    assert "rank 8 | not measured" in model_card(SUMMARY, "adapter", 8, base="some/base", **ABOUT)


def test_a_card_names_no_folder_of_this_machine() -> None:
    card = model_card(SUMMARY, "adapter", 16, base="/home/me/.cache/model", **ABOUT)
    assert "/home" not in card and 'base = "path/to/the/base/model"  # replace this' in card
    assert data_of(card).base_model is None and "state it before you publish" in card


def test_names_from_data_do_nothing_in_a_card() -> None:
    evil = "a` <script>alert(1)</script> ```\n\n# A heading\x1b[2J"
    summary = SUMMARY | {"name": evil}
    card = model_card(summary, "adapter", 16, base="b/b", max_length=9, labels=[evil, "```"])
    assert "\x1b" not in card and "\n# A heading" not in card
    titled, code, listed = (
        card.split("---\n", 2)[2].split("```python\n")[0],
        *card.split("```json\n"),
    )
    assert "<script>" not in titled and "<script>" not in code
    names = listed.split("\n```\n")[0]  # a fence ends at a line of its own
    assert json.loads(names) == {"0": evil, "1": "```"}


def test_the_licence_is_that_of_the_base(tmp_path: Path) -> None:
    assert base_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert base_licence(str(tmp_path)) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert base_licence(str(tmp_path)) is None
    assert base_licence("nobody/nothing") is None


BASES = ["masked", "head of 3", "no padding", "language model"]
TEXTS = ["the cat", "the cat sees a dog near the oak"]


def base_of_a_stranger(name: str, folder: Path) -> Loaded:
    torch.manual_seed(0)
    two: dict[str, Any] = LLAMA | {"num_labels": 2}
    three: dict[str, Any] = BERT | {"num_labels": 3}
    if name == "language model":
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    elif name == "no padding":
        model = LlamaForSequenceClassification(LlamaConfig(**two))
    elif name == "head of 3":
        model = BertForSequenceClassification(BertConfig(**three))
    else:
        model = build("bert")
    model.save_pretrained(folder)
    save_tokenizer(folder, pad=name != "no padding", chat=name == "language model")
    if name == "language model":
        return load_model(str(folder), "causal-lm")
    return load_model(str(folder), "sequence-classification", labels=["no", "yes"])


@pytest.mark.slow
def test_the_code_of_a_card_runs_in_a_new_process(tmp_path: Path) -> None:
    """For several bases, both kinds of export and a merge of adapters, as it stands, with the folders filled
    in: the labels are named, and a batch of texts of two lengths has the logits of the merged model."""
    scripts, expected = [], {}
    for name in BASES:
        loaded = base_of_a_stranger(name, tmp_path / name)
        layers = targets.find_targets(
            loaded.model, ["query" if "bert" in str(type(loaded.model)) else "q_proj"]
        )
        adapter = {layer: LoRA(torch.randn(1, 32), torch.randn(32, 1) / 4, 1.0) for layer in layers}
        deltas = {layer: lora.delta() for layer, lora in adapter.items()}
        head, summary = random_head(loaded), SUMMARY | {"task": loaded.task}
        about: dict[str, Any] = ABOUT | {"labels": ["no", "yes"] if loaded.head else ()}
        base = loaded.source_for_adapter
        for kind, rank in (("adapter", 1), ("merged", None), ("sum", None)):
            out = tmp_path / f"{name} {kind}"
            if kind == "sum":
                part = tmp_path / f"{name} adapter"
                if name == "head of 3":  # as PEFT alone leaves it
                    part = shutil.copytree(part, tmp_path / "part")
                    (part / "config.json").unlink()
                merge_folders([str(part)] * 2, None, None, out)
                assert (out / "tokenizer.json").read_bytes() == (
                    part / "tokenizer.json"
                ).read_bytes()
            elif kind == "adapter":
                card = model_card(summary, kind, rank, base=base, **about)
                export_adapter(out, loaded, adapter, head, card)
            else:
                card = model_card(summary, "merged", rank, base=base, **about)
                fresh = base_of_a_stranger(name, tmp_path / name)
                export_merged(out, fresh, deltas, head, card)
                rows = fresh.processor(TEXTS, padding=True, return_tensors="pt")
                with torch.no_grad():
                    expected[name] = fresh.model.eval()(**rows).logits
            (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
            code = code.replace("path/to/this/folder", str(out)).replace(
                "path/to/the/base/model", base
            )
            if loaded.head and (name, kind) == ("head of 3", "sum"):
                code += "assert model.config.num_labels == 2\n"
            elif loaded.head:
                code += "assert model.config.id2label == {0: 'no', 1: 'yes'}\n"
            else:
                code += "assert tokenizer.chat_template\n"
            code += f"""
import torch
rows = tokenizer({TEXTS!r}, padding=True, return_tensors="pt")
with torch.no_grad():
    torch.save(model(**rows).logits, {str(out / "logits.pt")!r})
"""
            scripts.append(out / "use.py")
            scripts[-1].write_text(code)
    runner = "import runpy, sys; [runpy.run_path(file) for file in sys.argv[1:]]"
    command = [sys.executable, "-c", runner, *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if line in ("no", "yes")]
    assert len(said) == 3 * (len(BASES) - 1) - 1  # one merge of unnamed labels
    for script in scripts:
        got = torch.load(script.with_name("logits.pt"))
        name = script.parent.name.rpartition(" ")[0]
        torch.testing.assert_close(got, expected[name], atol=1e-4, rtol=1e-4)
