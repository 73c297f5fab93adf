"""Tiny real things to run on: random models with a tokenizer, learnable rows, configs, processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple

import yaml

from fedhl.demo import ANIMALS, OTHERS, PLANTS, SIZE, sentences

CONTROL = ["[PAD]", "[UNK]", "[EOS]", "<|user|>", "<|assistant|>"]
WORDS = [*CONTROL, *ANIMALS, *PLANTS, *OTHERS, "animal", "plant"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} [EOS] {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
BERT: dict[str, Any] = {"vocab_size": len(WORDS), **SIZE}
LLAMA: dict[str, Any] = {
    **{"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
    **{"max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 2},
}


def save_tokenizer(folder: Path, *, pad: bool = True, eos: bool = True, chat: bool = False) -> None:
    """A tokenizer of whole words between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]"}
    special |= {"pad_token": "[PAD]"} if pad else {}
    special |= {"eos_token": "[EOS]"} if eos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def save_bert(folder: Path) -> Path:
    """A checkpoint as published encoders are: a masked language model, no pooler, no classifier."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForMaskedLM(BertConfig(**BERT)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_llama(folder: Path, *, chat: bool) -> Path:
    """A decoder with grouped-query attention, with or without a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    save_tokenizer(folder, chat=chat)
    return folder


# --- rows ---------------------------------------------------------------------------------------


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences with labels; `prompt` and `completion`, and `messages`, ask for the same; `site` is a natural
    client."""
    return [
        {
            **row,
            "site": f"site-{k % 3}",
            "prompt": row["text"] + " ",
            "completion": f"the {row['label']}",
            "messages": [
                {"role": "user", "content": row["text"]},
                {"role": "assistant", "content": f"the {row['label']}"},
            ],
        }
        for k, row in enumerate(sentences(count, seed))
    ]


def write_rows(path: Path, made: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


# --- configs ------------------------------------------------------------------------------------


def classification(**changes: Any) -> dict[str, Any]:
    """A run of a second: six clients of ranks 1 to 6, four of them in a round."""
    config: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": "bert"},
        "task": {"kind": "sequence-classification", "max_length": 16},
        "data": {"source": "rows.jsonl", "held_out": {"count": 60}},
        "partition": {"kind": "dirichlet", "clients": 6, "alpha": 2.0, "min_examples": 20},
        "lora": {"targets": ["query", "value", "dense"], "ranks": [1, 1, 2, 2, 4, 6]},
        "weighting": {"name": "truncation", "power": 2, "epsilon": 0.1},
        "rounds": 5,
        "participation": {"fraction": 0.67},
        "training": {"steps": 6, "learning_rate": 1e-2, "schedule": "linear"},
        "evaluation": {"client_fraction": 0.2},
        "compute": {"device": "cpu", "threads": 1},
    }
    return merged(config, changes)


def causal(**changes: Any) -> dict[str, Any]:
    """Three natural clients that learn to answer with the label."""
    config: dict[str, Any] = {
        "name": "tiny-lm",
        "model": {"source": "llama"},
        "task": {"kind": "causal-lm", "max_length": 32},
        "data": {"source": "rows.jsonl", "limit": 200, "held_out": {"fraction": 0.2}},
        "partition": {"kind": "by-column", "column": "site"},
        "lora": {"targets": "all-linear", "ranks": {"clients": {"site-0": 4}, "default": 2}},
        "rounds": 3,
        "training": {"epochs": 1.0, "learning_rate": 1e-2},
        "compute": {"device": "cpu", "threads": 1},
    }
    return merged(config, changes)


def chat(**changes: Any) -> dict[str, Any]:
    """The same from chats, narrower numbers, and clients that evaluate: the server has no rows."""
    config = causal(
        model={"source": "chat", "gradient_checkpointing": True},
        task={"messages": "messages"},
        data={"held_out": None},
        evaluation={"client_fraction": 0.2},
        compute={"precision": "bfloat16"},
    )
    return merged(config, changes)


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `config`; a mapping changes the keys that it names, unless one is "kind"."""
    result = dict(config)
    for key, value in changes.items():
        deep = isinstance(value, dict) and isinstance(result.get(key), dict) and "kind" not in value
        result[key] = merged(result[key], value) if deep else value
    return result


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def project(folder: Path) -> Path:
    """A folder with models, rows and configs, in which every command of a test is run."""
    folder.mkdir(parents=True, exist_ok=True)
    start(folder, "--version")  # so that the libraries are imported meanwhile
    save_bert(folder / "bert")
    save_llama(folder / "llama", chat=False)
    save_llama(folder / "chat", chat=True)
    write_rows(folder / "rows.jsonl", rows(400))
    write_config(folder / "tiny.yaml", classification())
    write_config(folder / "lm.yaml", causal())
    write_config(folder / "chat.yaml", chat())
    return folder


# --- processes ----------------------------------------------------------------------------------
#
# Every command is a process of its own, which can be killed; it is forked from one that has already
# imported the libraries, because importing them takes longer than the whole run.

PRELOADED = [
    *("fedhl.cli", "fedhl.run.loop", "fedhl.run.delivery", "fedhl.run.overview", "fedhl.export"),
    *(
        "fedhl.report.run_page",
        "fedhl.report.compare",
        "fedhl.compare.study",
        "fedhl.methods.fedhl",
    ),
    *("matplotlib.pyplot", "matplotlib.backends.backend_svg", "torch._dynamo", "rich.progress"),
    *("transformers", "transformers.models.bert.modeling_bert"),
    "peft.utils.transformers_weight_conversion",
    *("transformers.models.llama.modeling_llama", "yaml"),
]


class Done(NamedTuple):
    """What a command left: its exit code (-9 if it was killed) and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Command:
    """A running `fedhl ARGUMENTS` in `folder`."""

    process: BaseProcess
    folder: Path
    output: Path

    def wait(self, timeout: float = 600) -> Done:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"no end after {timeout} s"
        out, err = (self.output.with_suffix(s).read_text("utf-8") for s in (".out", ".err"))
        return Done(self.process.exitcode, out, err)

    def said(self) -> str:
        """What it has printed so far."""
        file = self.output.with_suffix(".out")
        return file.read_text("utf-8") if file.exists() else ""

    def wait_until(self, happened: Callable[[], bool], timeout: float = 600) -> None:
        """Until `happened()`, or until the command ends."""
        end = monotonic() + timeout
        while self.process.is_alive() and not (
            self.output.with_suffix(".err").exists() and happened()
        ):
            assert monotonic() < end, f"nothing happened in {timeout} s"
            sleep(5e-4)  # to look more often takes a good part of a processor

    def kill_when(self, happened: Callable[[], bool], number: int = signal.SIGKILL) -> Done:
        """Send a signal as soon as `happened()`; or never, if the command ends before."""
        self.wait_until(happened)
        if self.process.is_alive():
            assert self.process.pid is not None
            os.kill(self.process.pid, number)
        return self.wait()


def _command(arguments: list[str], folder: str, output: str) -> None:
    """What the process does: the console script, with its output in files."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        descriptor = os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (
        open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    # as from a terminal, even where the tests run in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    sys.argv = ["fedhl", *arguments]
    from fedhl.cli import main

    main()


_numbers = iter(range(10**6))


def start(folder: Path, *arguments: str | Path) -> Command:
    """`fedhl ARGUMENTS` in `folder`, running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    (folder / ".output").mkdir(exist_ok=True)
    output = folder / ".output" / str(next(_numbers))
    process = context.Process(
        target=_command, args=([str(a) for a in arguments], str(folder), str(output)), daemon=True
    )  # a daemon: a test that fails leaves nothing behind
    process.start()
    return Command(process, folder, output)


def fedhl(folder: Path, *arguments: str | Path) -> Done:
    """`fedhl ARGUMENTS` in `folder`, to its end."""
    return start(folder, *arguments).wait()
