"""Time steps of training in bfloat16 on a CPU, with torch's fused attention and with plain products.

    python benchmarks/attention.py [--repeats 9] [--json FILE]

An encoder of MiniLM's size with adapters of rank 16 on its queries and values takes steps on rows of several
lengths, in turn with each kernel and from the same adapters. Prints seconds a step and their ratio, and how
far the two end apart, relative to how far they have moved.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from fedhl.config.conduct import TrainingConfig
from fedhl.model import peft, training
from fedhl.run.commit import commit
from fedhl.task import ClassificationTask
from fedhl.task.examples import Example
from fedhl.task.texts import Texts

RANK, STEPS = 16, 3
CASES = ((64, 16), (64, 32), (16, 40), (16, 64), (16, 96), (8, 128))
"""(rows of a step, tokens of a row)."""
SIZE: dict[str, Any] = {
    **{"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
    **{"intermediate_size": 1536, "vocab_size": 1000, "num_labels": 2},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def steps(slots: peft.Slots, rows: int, tokens: int, fused: bool) -> tuple[float, torch.Tensor]:
    """The seconds of a step, and how the adapter has moved."""
    parameters = peft.activate(slots, RANK, frozenset("AB"))
    before = [p.detach().clone() for p in parameters]
    draw = torch.Generator().manual_seed(0)
    examples = [
        Example(torch.randint(5, 1000, (tokens,), generator=draw).tolist(), k % 2)
        for k in range(rows)
    ]
    training.SHORT = 0 if fused else tokens
    trained = training.train(
        *(slots.model, parameters, examples),
        TrainingConfig(batch_size=rows, max_grad_norm=None),
        **{"steps": STEPS, "rate": lambda k: 1e-3, "seed": 0},
        objective=Texts(ClassificationTask, pad_id=0),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    )
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)])
    with torch.no_grad():
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b)
    return trained.seconds / STEPS, moved


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZE))
    targets = [
        name for name, _ in model.named_modules() if name.endswith(("self.query", "self.value"))
    ]
    slots = peft.attach(model, {RANK: 32}, targets)
    found = []
    for rows, tokens in CASES:
        steps(slots, rows, tokens, fused=True)
        times: dict[bool, list[float]] = {True: [], False: []}
        ends: dict[bool, torch.Tensor] = {}
        for _ in range(given.repeats):
            for fused in (True, False):
                seconds, ends[fused] = steps(slots, rows, tokens, fused)
                times[fused].append(seconds)
        ratio = median(a / b for a, b in zip(times[True], times[False], strict=True))
        apart = float((ends[True] - ends[False]).norm() / ends[True].norm())
        found.append(
            {
                **{"rows": rows, "tokens": tokens, "fused": median(times[True])},
                **{"products": median(times[False]), "ratio": ratio, "apart": apart},
            }
        )
        print(
            f"{rows} rows of {tokens} tokens: {median(times[True]):.3f} s fused, "
            f"{median(times[False]):.3f} s by products, ratio {ratio:.2f}, {apart:.1e} apart",
            flush=True,
        )
    told = {
        **{"torch": torch.__version__, "commit": commit(), "threads": 1, "repeats": given.repeats},
        "cases": found,
    }
    if given.json:
        given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
