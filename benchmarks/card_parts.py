"""What the parts of card.py do, each step written into the result file as soon as it is done.

    python benchmarks/card_parts.py PART FILE ...     # started by card.py, which says what is where

Of the project it uses what is public: `fedhl`, the server's functions, configs, and the command line.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter, sleep
from typing import Any

import torch
from card import GRACE, ROOT, read, write
from torch import Tensor

from fedhl import METHODS, WEIGHTINGS, LoRA, Update, get_method, get_weighting, server
from fedhl.lora import initial
from fedhl.method import Method, remembers
from fedhl.server import Client, Reply, ServerState
from fedhl.server.layers import Layers

Figures = dict[str, Any]
EPS = torch.finfo(torch.float32).eps
BF16 = 2.0**-8
"""What rounding to bfloat16 changes a number by, relatively, at most."""


class LeftOut(Exception):
    """This step cannot be done here."""


@dataclass(frozen=True)
class Job:
    """`device`: cuda, or cpu in a dry run; `toy`: small sizes; `work`: a folder for runs and models;
    `weights`: sources by model; `until`: when the time is over, on the clock `monotonic`."""

    device: str
    toy: bool
    work: Path
    weights: Mapping[str, str]
    data: Path | None
    until: float

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        self.wait()
        start = perf_counter()
        result = work()
        self.wait()
        return result, perf_counter() - start

    @property
    def card_gigabytes(self) -> float:
        """The largest memory that tensors took on the card since `forget`."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else 0.0

    def forget(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def host_gigabytes() -> float:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def check(what: str, difference: float, tolerance: float) -> Figures:
    """A difference to be judged: beyond its tolerance, the step has failed."""
    return {"what": what, "difference": difference, "tolerance": tolerance}


# --- a: against the CPU -------------------------------------------------------------------------
#
# float32: a sum of n products is rounded by about sqrt(n) eps of its length. A truncation knows its part
# of W to that over the relative gap between the singular values at the cut, which is some 1/10 here: on the
# CPU, float32 is up to 22 eps from float64. SUMS leaves room for a card that sums in another order.
# bfloat16 on the wire: the two factors of a product are rounded by 2^-8 each at most, and where the two
# machines round across a boundary they are apart by that.
SUMS = 10
STEPS = 1e4 * EPS
"""Of some steps of gradient descent, relative to what they came to: each goes through the whole model."""
STEPS_OF_ADAMW = 1e-2
"""It divides by the root of the squared gradient, which turns the rounding of gradients near 0 into steps."""


def sums(n: int) -> float:
    return SUMS * n**0.5 * EPS


def cast(value: Any, *to: Any) -> Any:
    """The same with its floating tensors of this type and on this device."""
    if isinstance(value, Tensor):
        moved = [x for x in to if not isinstance(x, torch.dtype) or value.is_floating_point()]
        for x in moved:
            value = value.to(x)
        return value
    if is_dataclass(value) and not isinstance(value, type):
        kept = {f.name: cast(getattr(value, f.name), *to) for f in fields(value)}
        return replace(value, **kept)
    if isinstance(value, Mapping):
        return {key: cast(x, *to) for key, x in value.items()}
    return [cast(x, *to) for x in value] if isinstance(value, list) else value


def matrices(state: Any, name: str = "") -> dict[str, Tensor]:
    """The matrices of a state by name, adapters as products: signs of singular vectors are the kernel's."""
    if isinstance(state, LoRA):
        return {name: state.scale * (state.B.double() @ state.A.double())}
    if isinstance(state, Tensor):
        return {name: state.double()}
    if isinstance(state, Mapping):
        parts = [matrices(x, f"{name}.{key}") for key, x in state.items()]
    elif is_dataclass(state):
        parts = [matrices(getattr(state, f.name), f"{name}.{f.name}") for f in fields(state)]
    else:
        return {}
    return {key: x for part in parts for key, x in part.items()}


def apart(there: Any, here: Any) -> float:
    """The largest distance of two matrices of the same name, relative to the longest of all: some are what
    others leave."""
    got, expected = matrices(there), matrices(here)
    longest = max((float(x.norm()) for x in expected.values()), default=0.0) or 1.0
    return max(
        (float((got[k].cpu() - x).norm()) / longest for k, x in expected.items()), default=0.0
    )


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def methods(job: Job) -> Figures:
    """Two rounds of one layer by every method, each round from one state: float32 there, from clients that
    return float32 or bfloat16, against float64 here."""
    shapes = [(48, 40, 4)] if job.toy else [(96, 80, 8), (1100, 900, 8)]
    rows, checks, errors = [], [], {}
    for m, n, top in shapes:
        for returned in (torch.float32, torch.bfloat16):
            found, own = {}, 0.0
            for name in METHODS:
                own = max(own, two_rounds("cpu", name, m, n, top, returned))
                try:
                    found[name] = two_rounds(job.device, name, m, n, top, returned)
                except Exception as error:  # the other methods are of interest all the same
                    found[name], errors[name] = math.inf, brief(error)
            worst = max(found, key=lambda name: found[name])
            kind = str(returned).removeprefix("torch.")
            checks.append(check(f"{m} x {n}, {kind}: {worst}", found[worst], sums(max(m, n))))
            row = {"shape": [m, n], "clients return": kind, "tolerance": sums(max(m, n))}
            rows.append(row | {"difference": found, "of the CPU's float32": own})
    return {"rows": rows, "checks": checks} | ({"errors": errors} if errors else {})


def two_rounds(device: str, name: str, m: int, n: int, top: int, returned: torch.dtype) -> float:
    """The largest difference of a state, or of what a client is sent."""
    method = get_method(name)
    ranks, scales, p = [top] * 3, [1.5] * 3, [0.5, 0.3, 0.2]
    if method.mixed_ranks:
        ranks, scales, p = [1, top, 2, 1], [2.0, 0.5, 3.0, 0.7], [0.4, 0.3, 0.2, 0.1]
    there = torch.float32, torch.device(device)
    start = LoRA(initial(m, n, top, 1.5, seed=0).A.double(), draw(0, m, top), 1.5)
    here = method.init(start, seed=0)
    worst = apart(method.init(cast(start, *there), seed=0), here)
    for round in range(2):
        state, updates, theirs = cast(here, *there), [], []
        for k, (rank, scale, weight) in enumerate(zip(ranks, scales, p, strict=True), round):
            sent = method.broadcast(here, rank, scale, key=k)
            worst = max(worst, apart(method.broadcast(state, rank, scale, key=k).lora, sent.lora))
            trained = LoRA(
                sent.lora.A + draw(k, rank, n), sent.lora.B + draw(k + 9, m, rank), scale
            )
            trained = cast(trained, returned)
            updates.append(Update(sent, cast(trained, torch.float64), weight))
            theirs.append(Update(cast(sent, *there), cast(trained, there[1]), weight))
        after, here = method.aggregate(state, theirs), method.aggregate(here, updates)
        worst = max(worst, apart(after, here))
    return worst


CLIENTS = [Client("ada", 2, 4.0, 30), Client("bob", 8, 1.0, 10), Client("cyd", 4, 2.0, 60)]


def whole_server(job: Job) -> Figures:
    """Two rounds of the server over several layers, float32 on both: every method with the weighting of its
    paper, fedhl with every weighting, and what crosses the wire as float32 or bfloat16."""
    small = {"q": (48, 40), "v": (24, 40)}
    shapes = small if job.toy else {"q": (576, 576), "v": (192, 576), "down": (576, 1536)}
    cases = [(name, getattr(get_method(name), "weighting", "examples")) for name in METHODS]
    cases += [("fedhl", name) for name in WEIGHTINGS]
    rows, checks, errors = [], [], {}
    for payload in ("float32", "bfloat16"):
        # both are rounded, and the products of two factors twice
        tolerance = 2 * sums(max(max(s) for s in shapes.values()))
        tolerance += 2 * 2 * BF16 if payload == "bfloat16" else 0.0
        found = {}
        for name, weighting in dict.fromkeys(cases):
            case = f"{name}, weighted by {weighting}"
            try:
                found[case] = two_aggregations(job.device, name, weighting, payload, shapes)
            except Exception as error:
                found[case], errors[case] = math.inf, brief(error)
        worst = max(found, key=lambda case: found[case])
        checks.append(check(f"{payload}: {worst}", found[worst], tolerance))
        rows.append({"payload": payload, "tolerance": tolerance, "difference": found})
    return {"rows": rows, "checks": checks} | ({"errors": errors} if errors else {})


def two_aggregations(
    device: str, name: str, weighting: str, payload: str, shapes: Mapping[str, tuple[int, int]]
) -> float:
    """The largest difference of a layer, of the head or of a client's weight."""
    method, weigh, seed = get_method(name), get_weighting(weighting), 3
    clients = [replace(c, payload=payload) for c in CLIENTS]
    if not method.mixed_ranks:
        clients = [replace(c, rank=8, scale=2.0) for c in clients]
    adapter = {n: initial(*shape, 8, 2.0, seed=0) for n, shape in shapes.items()}
    here = server.init(method, adapter, {"head": draw(9, 3, 5).float()}, seed)
    worst = 0.0
    for _ in range(2):
        replies = [reply(here, client, method, seed) for client in clients]
        there = cast(here, torch.device(device))
        theirs = versioned(method, there, cast(replies, torch.device(device)), seed)
        state, got = server.aggregate(method, weigh, there, theirs, seed)
        ours = versioned(method, here, replies, seed)
        here, expected = server.aggregate(method, weigh, here, ours, seed)
        if got.refused:
            raise AssertionError(f"refused there: {got.refused[0]['reason']}")
        layers = [(state.layers[n], here.layers[n]) for n in shapes]
        weights = [
            torch.tensor([c["weight"] for c in r.clients], dtype=torch.float64)
            for r in (got, expected)
        ]
        pairs = [*layers, (state.head, here.head), (weights[0], weights[1])]
        worst = max(worst, *(apart(x, y) for x, y in pairs))
    return worst


def versioned(
    method: Method[Any], state: ServerState, replies: Sequence[Reply], seed: int
) -> list[Reply]:
    """The replies with what their clients hold, if they remember; the last bits are those of the device."""
    if not remembers(method):
        return [*replies]
    versions = Layers(method, state, seed).versions([r.client for r in replies])
    return [replace(r, version=versions[r.client.id]) for r in replies]


def reply(state: ServerState, client: Client, method: Method[Any], seed: int) -> Reply:
    """What a client returns whose training moved everything that it trains at random."""
    k, adapter = sum(client.id.encode()) + 1000 * state.round, {}
    for name, sent in server.broadcast(method, state, client, seed).items():
        moved = {
            factor: getattr(sent.lora, factor)
            + 0.1 * draw(k, *getattr(sent.lora, factor).shape).float()
            for factor in sorted(sent.train - sent.keep)
        }
        adapter[name] = replace(sent.lora, **moved)
    head = {name: x + 0.1 * draw(k + 2, *x.shape).float() for name, x in state.head.items()}
    return Reply(client, state.round + 1, adapter, head, loss=0.5, steps=3)


def federation(job: Job) -> Figures:
    """The same run of a tiny model on both, from a config: all that a round does.

    By AdamW, and by plain gradient descent, which does not magnify what small gradients are rounded by. In
    bfloat16 the two may differ by twice what bfloat16 itself does, each of them being so far from float32,
    and half as much again.
    """
    kinds = ["bert"] if job.toy else ["bert", "llama"]  # a dry run has the other one in c
    return {"checks": [found for kind in kinds for found in federation_of(job, kind)]}


def federation_of(job: Job, kind: str) -> list[Figures]:
    config = tiny_run(job, kind)

    @cache
    def end(device: str, precision: str, optimizer: str) -> Tensor:
        settings = {"compute.device": device, "compute.precision": precision}
        rate = 1e-2 if optimizer == "adamw" else 1.0
        settings |= {"training.optimizer": optimizer, "training.learning_rate": rate}
        name = f"a-{kind}-{device}-{precision}-{optimizer}"
        return end_of(federate(job, name, config, settings))

    def off(precision: str, optimizer: str) -> float:
        here = end("cpu", precision, optimizer)
        return relative(end(job.device, precision, optimizer), here)

    cost = relative(end("cpu", "bfloat16", "sgd"), end("cpu", "float32", "sgd"))
    return [
        check(f"{kind}, float32, AdamW", off("float32", "adamw"), STEPS_OF_ADAMW),
        check(f"{kind}, float32, gradient descent", off("float32", "sgd"), STEPS),
        check(f"{kind}, bfloat16, gradient descent", off("bfloat16", "sgd"), 3 * cost),
        check(f"{kind}, bfloat16 against float32, both on the CPU", cost, 0.1),
    ]


def end_of(run: Path) -> Tensor:
    """What all rounds came to: every layer's W and the head, as one vector."""
    from safetensors.torch import load_file

    newest = max((run / "state").glob("round-*"), key=lambda p: int(p.name.removeprefix("round-")))
    tensors = load_file(newest / "state.safetensors")
    names = [n for n in sorted(tensors) if n.endswith("::W") or n.startswith("head")]
    return torch.cat([tensors[n].double().flatten() for n in names])


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


# --- runs ---------------------------------------------------------------------------------------

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("n", "r", "s", "th", "x")]


def rows_of_words(count: int, words: range, names: Sequence[str]) -> list[dict[str, Any]]:
    """Texts of so many words, of two kinds: most are from the first half of the words, or from the second.
    For times; of a model's quality they say nothing."""
    g, made, half = random.Random(0), [], len(WORDS) // 2
    for k in range(count):
        label = k % 2
        mine, other = (WORDS[:half], WORDS[half:]) if label else (WORDS[half:], WORDS[:half])
        text = " ".join(
            g.choice(mine if g.random() < 0.8 else other) for _ in range(g.choice(words))
        )
        row = {"text": text, "label": str(label), "package": names[k % len(names)]}
        made.append(row | {"prompt": text + " ", "completion": f"it is {mine[0]} and {other[0]}"})
    return made


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tokenizer(folder: Path) -> None:
    """Of whole words between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["[PAD]", "[UNK]", "[EOS]", "it", "is", "and", *WORDS]
    made = Tokenizer(models.WordLevel({w: k for k, w in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


def llama_shape(name: str) -> dict[str, Any]:
    """What a LlamaConfig is made from: of Llama-2-7B, of one of half a billion, or a toy's."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys = (*keys, "num_key_value_heads", "vocab_size", "max_position_embeddings")
    numbers = {
        "7b": (4096, 11008, 32, 32, 32, 32000, 2048),
        "half a billion": (2048, 5632, 8, 32, 4, 32000, 2048),
        "toy": (64, 96, 2, 4, 4, 256, 512),
    }
    return dict(zip(keys, numbers[name], strict=True))


def saved(folder: Path, make: Callable[[], Any]) -> Path:
    """A folder with the model that `make` makes and a tokenizer, unless it is there already."""
    from transformers.utils.logging import disable_progress_bar

    if not folder.is_dir():
        disable_progress_bar()
        torch.manual_seed(0)
        partial = folder.with_suffix(".partial")
        tokenizer(partial)
        make().save_pretrained(partial)
        partial.rename(folder)
    return folder


def saved_llama(job: Job, name: str) -> Path:
    """A Llama of random bfloat16 weights."""
    return saved(job.work / f"llama-{name.replace(' ', '-')}", lambda: llama(job, name))


def llama(job: Job, name: str) -> Any:
    """It is made where it is wanted: on the CPU, seven billion random numbers take minutes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**llama_shape(name), bos_token_id=2, eos_token_id=2)
    with torch.device(job.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def saved_bert(job: Job) -> Path:
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 64}
    return saved(job.work / "bert-toy", lambda: BertModel(BertConfig(**sizes)))


def tiny_run(job: Job, kind: str) -> dict[str, Any]:
    """A config for three clients of ranks 2, 4 and 8."""
    rows = write_rows(job.work / "tiny.jsonl", rows_of_words(240, range(6, 12), "xyz"))
    bert = kind == "bert"
    return {
        "name": f"card-{kind}",
        "model": {
            "source": str(saved_bert(job) if bert else saved_llama(job, "toy")),
            "dropout": 0.0,
        },
        "task": {"kind": "sequence-classification" if bert else "causal-lm", "max_length": 32},
        "data": {"source": str(rows), "held_out": {"count": 40}},
        "partition": {"kind": "iid", "clients": 3},
        "lora": {
            "targets": ["query", "value"] if bert else ["q_proj", "v_proj"],
            "ranks": [2, 4, 8],
        },
        "rounds": 2,
        "training": {"steps": 4, "batch_size": 8},
        "evaluation": {"every": 2},
    }


def federate(
    job: Job, name: str, config: Path | Mapping[str, Any], settings: Mapping[str, Any]
) -> Path:
    """The folder of a new run, done in this process, so that the memory of the card can be asked for."""
    from fedhl.config import load_config
    from fedhl.run import start_run

    if not isinstance(config, Path):
        config = write_config(job, name, config)
    folder = job.work / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    start_run(load_config(config, as_overrides(settings)), folder)
    return folder


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The finished rounds of a run."""
    file = run / "metrics.jsonl"
    lines = file.read_text("utf-8").split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


# --- b: the server ------------------------------------------------------------------------------


def ceilings(job: Job) -> Figures:
    """`fedhl bench server`, which compares with float64 what it times."""
    file = job.work / "server.json"
    command = ["bench", "server", "--parts", "ceilings", "--device", job.device]
    command += ["--clients", "10", "--clients", "100"]
    command += ["--repeats", "1", "--side", "128"] if job.toy else ["--repeats", "5"]
    done = subprocess.run(fedhl(*command, "--json", str(file)), stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"fedhl {' '.join(command)}: {last_line(done.stderr)}")
    return {"rows": read(file)["ceilings"]["rows"]}


def fedhl(*arguments: str) -> list[str]:
    """The command line of this checkout, which nobody has installed."""
    return [sys.executable, "-c", "from fedhl.cli import main; main()", *arguments]


def last_line(text: str) -> str:
    return ([line for line in text.splitlines() if line.strip()] or ["no message"])[-1]


# --- c: clients ---------------------------------------------------------------------------------

WORTH = 1.3
"""Several clients in one batch are built in from this ratio on, at the settings of the demos."""
DEMOS = {"minilm": ("demo.yaml", 16), "smollm2": ("demo-llm.yaml", 4)}
"""The config, and its rows per client and step."""


def demo(job: Job, model: str, **more: Any) -> tuple[Path, dict[str, Any]]:
    """The config of a demo, and what to change in it: rows that need no package, and sizes of a toy."""
    source = job.weights.get(model)
    if source is None and not job.toy:
        raise LeftOut(f"no weights of {model} are here (--weights)")
    if source is None:
        source = str(saved_bert(job) if model == "minilm" else saved_llama(job, "toy"))
    file, _ = DEMOS[model]
    # as long as the reviews and the functions of the demos: about 25 tokens, and most of 160
    words = range(5, 12) if model == "minilm" else range(30, 70)
    rows = rows_of_words(60 if job.toy else 3000, words, [f"package-{k}" for k in range(11)])
    settings = {
        "model.source": source,
        "data.source": str(write_rows(job.work / f"{model}.jsonl", rows)),
        "data.where": {},
        "data.held_out": {"count": 8},
        "compute.device": job.device,
    }
    if model == "minilm" and job.toy:
        settings["partition.min_examples"] = 1
    return ROOT / "configs" / file, settings | more


def rounds(job: Job, model: str, precision: str) -> Figures:
    """Rounds as `fedhl run` does them, without their evaluations; the first warms up."""
    count = 2 if job.toy else 6
    sizes = {"training.steps": 1, "participation.count": 2} if job.toy else {}
    config, settings = demo(
        job,
        model,
        **{"rounds": count, "evaluation.every": count, "compute.precision": precision, **sizes},
    )
    job.forget()
    run = federate(job, f"c-{model}-{precision}", config, settings)
    seconds = [line["seconds"] for line in metrics(run)][2:]
    walls = [s["total"] - s["evaluate"] for s in seconds]
    return {
        "config": config.name,
        "precision": precision,
        "rounds": len(walls),
        "rounds per hour": 3600 / median(walls),
        "share in forward, backward, optimizer": median(
            s["compute"] / wall for s, wall in zip(seconds, walls, strict=True)
        ),
        "seconds of a round": {phase: median(s[phase] for s in seconds) for phase in seconds[0]},
        "card, GB": job.card_gigabytes,
    }


def batched(job: Job, model: str) -> Figures:
    """The prototype of batched_clients.py, which must end at the adapters of sequential training."""
    from batched_clients import COHORTS, SETTINGS, TOLERANCE, measure, show

    _, settings = demo(job, model)
    sizes, cohorts, repeats = SETTINGS[model], COHORTS, 2
    if job.toy:
        sizes, cohorts, repeats = [(2, 1, 8)], [[8] * 2, [4, 8, 16, 32]], 1
    elif model == "smollm2":  # where there is memory for more
        sizes = [(4, 4, 8), (1, 4, 8)]
    rows = []
    for row in measure(model, repeats, as_overrides(settings), sizes, cohorts):
        show(row)
        rows.append(row)
    asked = sizes[0][0] if job.toy else DEMOS[model][1]
    ratio = min(
        r["ratio"] for r in rows if r["rows per client and step"] == asked and len(r["ranks"]) >= 4
    )
    worst = max(row["relative difference"] for row in rows)
    return {
        "rows": rows,
        "ratio": ratio,
        "verdict": f"{'build it in' if ratio >= WORTH else 'leave it out'}: {ratio:.2f}, asked for {WORTH}",
        "checks": [check("adapters, of the distance trained", worst, TOLERANCE)],
    }


# --- d: seven billion ---------------------------------------------------------------------------


def seven_billion(job: Job) -> Figures:
    """Two rounds of two clients on a Llama of Llama-2-7B's shape, q and v, ranks 4 to 64.

    `fedhl run` does not do this yet: it logs all singular values of every layer, which takes minutes for
    matrices of 4096 x 4096. So the clients are PEFT's adapters and a plain loop, and the server is fedhl's,
    on the host as in a run, and once more on the card.
    """
    from peft import LoraConfig, inject_adapter_in_model

    job.forget()
    size = "toy" if job.toy else "7b"
    shape = llama_shape(size)
    clients = [Client(f"rank-{r:02d}", r, 2.0, 100) for r in (4, 64, 16, 32)]
    steps, rows, length = (1, 2, 16) if job.toy else (4, 4, 256)
    seconds: dict[str, float] = {}

    def phase(name: str, work: Callable[[], Any]) -> Any:
        result, spent = job.timed(work)
        seconds[name] = seconds.get(name, 0.0) + spent
        print(f"{name} {spent:.2f} s", flush=True)
        return result

    def make() -> Any:
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # one for each rank
        model = llama(job, size)
        model.requires_grad_(False)
        model.config.use_cache = False
        for client in clients:
            lora = LoraConfig(
                r=client.rank, lora_alpha=2 * client.rank, target_modules=["q_proj", "v_proj"]
            )
            inject_adapter_in_model(lora, model, adapter_name=client.id)
        return model.train()

    model = phase("make the model", make)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    base = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    method, weigh, seed = get_method("fedhl"), get_weighting("truncation"), 0

    def begin() -> ServerState:
        shapes = {name: module.get_base_layer().weight.shape for name, module in layers.items()}
        top = max(client.rank for client in clients)
        adapter = {n: initial(s[0], s[1], top, 2.0, k) for k, (n, s) in enumerate(shapes.items())}
        return server.init(method, adapter, {}, seed)

    state = phase("the server's first state", begin)
    g = torch.Generator().manual_seed(0)
    losses: list[float] = []

    def factors(client: Client) -> Iterator[tuple[str, torch.nn.Parameter, torch.nn.Parameter]]:
        for name, module in layers.items():
            yield name, module.lora_A[client.id].weight, module.lora_B[client.id].weight

    def switch_in(client: Client, sent: Mapping[str, Any]) -> list[torch.nn.Parameter]:
        with torch.no_grad():
            for name, A, B in factors(client):
                A.copy_(sent[name].lora.A)
                B.copy_(sent[name].lora.B)
        for module in layers.values():
            module.set_adapter(client.id)
        return [p for _, A, B in factors(client) for p in (A, B)]

    def train(parameters: list[torch.nn.Parameter]) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        for _ in range(steps):
            tokens = torch.randint(shape["vocab_size"], (rows, length), generator=g).to(job.device)
            with torch.autocast(job.device, dtype=torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))

    def switch_out(client: Client) -> dict[str, LoRA]:
        return {n: LoRA(A.detach().cpu(), B.detach().cpu(), 2.0) for n, A, B in factors(client)}

    def play(state: ServerState, client: Client) -> Reply:
        sent = phase("broadcast", lambda: server.broadcast(method, state, client, seed))
        own = phase("switch in", lambda: switch_in(client, sent))
        phase("forward, backward, optimizer", lambda: train(own))
        adapter = phase("switch out", lambda: switch_out(client))
        return Reply(client, state.round + 1, adapter, {}, losses[-1], steps)

    def summed(state: ServerState, replies: list[Reply], where: str) -> ServerState:
        following, outcome = phase(
            f"aggregate on the {where}",
            lambda: server.aggregate(method, weigh, state, replies, seed, watch=False),
        )
        if outcome.refused:
            raise AssertionError(f"refused on the {where}: {outcome.refused[0]['reason']}")
        return following

    def to_card(state: ServerState, replies: list[Reply]) -> tuple[ServerState, list[Reply]]:
        card = torch.device(job.device)
        return cast(state, card), cast(replies, card)

    checks = []
    for cohort in (clients[:2], clients[2:]):
        replies = [play(state, client) for client in cohort]
        there = phase("state to the card", partial(to_card, state, replies))
        on_card, state = summed(*there, "card"), summed(state, replies, "host")
        off = max(apart(on_card.layers[n].W, state.layers[n].W) for n in (min(layers), max(layers)))
        tolerance = 2 * sums(shape["hidden_size"])
        checks.append(check(f"W of round {state.round}, card and host", off, tolerance))
        del there, on_card
    if not all(map(math.isfinite, losses)):
        raise AssertionError(f"losses are {losses}")
    tokens = len(losses) * rows * length
    return {
        "base parameters": base,
        "adapted matrices": len(layers),
        "ranks": [c.rank for c in clients],
        "steps of a client": steps,
        "tokens of a step": rows * length,
        "phases": seconds,
        "tokens per second": tokens / seconds["forward, backward, optimizer"],
        "card, GB": job.card_gigabytes,
        "host, GB": host_gigabytes(),
        "checks": checks,
    }


# --- e: a 4-bit base ----------------------------------------------------------------------------


def four_bit(job: Job) -> Figures:
    """The same two rounds on a base of random weights, in bfloat16 and in 4 bits."""
    source = saved_llama(job, "toy" if job.toy else "half a billion")
    rows = []
    for bits in (16, 4):
        config = tiny_run(job, "llama")
        config["model"] = {"source": str(source), "dtype": "bfloat16", "four_bit": bits == 4}
        config["compute"] = {"device": job.device, "precision": "bfloat16"}
        job.forget()
        lines = metrics(federate(job, f"e-{bits}", config, {}))
        loss = [line["evaluation"]["full"]["loss"] for line in lines if line["evaluation"]]
        if not all(map(math.isfinite, loss)):
            raise AssertionError(f"with {bits} bits the losses are {loss}")
        row = {"bits": bits, "card, GB": job.card_gigabytes, "losses": loss}
        rows.append(
            row | {"seconds of a round": median(li["seconds"]["total"] for li in lines[1:])}
        )
    wide, narrow = (row["losses"][0] for row in rows)
    # 4 bits move each weight by some 8% of the spread of its block; that the model is still the same one
    # shows in the loss before training
    off = abs(narrow - wide) / wide
    return {
        "rows": rows,
        "checks": [check("loss before training, of the one in bfloat16", off, 0.05)],
    }


# --- f: real tasks ------------------------------------------------------------------------------

CHECKPOINT = 15
"""Seconds before the end in which a run finishes what it is writing."""


def arithmetic(data: Path, job: Job, held: int) -> dict[str, Any]:
    rows = job.work / "gsm8k"
    for split in ("train", "test"):
        lines = (data / "gsm8k" / f"{split}.jsonl").read_text("utf-8").splitlines()
        made = [json.loads(line) for line in lines if line]
        write_rows(
            rows / f"{split}.jsonl",
            [{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in made],
        )
    held_out = {"source": str(rows / "test.jsonl"), "count": held}
    partition = {"kind": "iid", "clients": 8}
    return {
        "data": {"source": str(rows / "train.jsonl"), "held_out": held_out},
        "partition": partition,
    }


def instructions(data: Path, job: Job, held: int) -> dict[str, Any]:
    """Dolly, a client for each category."""
    made = asked(json.loads((data / "dolly3k/dolly_3k.json").read_text("utf-8")))
    rows = write_rows(job.work / "dolly3k.jsonl", made)
    held_out = {"count": held}
    partition = {"kind": "by-column", "column": "category"}
    return {"data": {"source": str(rows), "held_out": held_out}, "partition": partition}


def programs(data: Path, job: Job, held: int) -> dict[str, Any]:
    made = asked(json.loads((data / "codealpaca/new_codealpaca.json").read_text("utf-8")))
    rows = write_rows(job.work / "codealpaca.jsonl", made)
    held_out, partition = {"count": held}, {"kind": "iid", "clients": 8}
    return {"data": {"source": str(rows), "held_out": held_out}, "partition": partition}


def asked(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        parts = (row["input"].strip(), row["instruction"].strip())
        made = {"prompt": "\n\n".join(p for p in parts if p) + "\n\n", "completion": row["output"]}
        yield made | {"category": row.get("category", "")}


TASKS = {"gsm8k": arithmetic, "dolly3k": instructions, "codealpaca": programs}


def toy_data(job: Job) -> Path:
    """A few rows in the forms of the data sets."""
    rows = rows_of_words(60, range(4, 8), ["open", "closed"])
    qa = [{"question": r["text"], "answer": r["completion"]} for r in rows]
    asked = [
        {"instruction": r["text"], "input": "", "output": r["completion"], "category": r["package"]}
        for r in rows
    ]
    for split in ("train", "test"):
        write_rows(job.work / f"data/gsm8k/{split}.jsonl", qa)
    for file in ("dolly3k/dolly_3k.json", "codealpaca/new_codealpaca.json"):
        (job.work / "data" / file).parent.mkdir(exist_ok=True)
        (job.work / "data" / file).write_text(json.dumps(asked), encoding="utf-8")
    return job.work / "data"


def task_config(job: Job, name: str) -> dict[str, Any]:
    """SmolLM2 on a task, by clients of ranks 4 to 64; in a dry run, a toy on rows of the same form."""
    source = str(saved_llama(job, "toy")) if job.toy else job.weights.get("smollm2")
    data = toy_data(job) if job.toy else job.data
    if source is None or data is None or not (data / name).is_dir():
        raise LeftOut("SmolLM2 or the data are not here")
    held, length, steps = (8, 64, 1) if job.toy else (256, 320, 20)
    return {
        "name": f"card-{name}",
        "model": {"source": source},
        "task": {"kind": "causal-lm", "max_length": length},
        "lora": {"targets": "all-linear", "ranks": {"shares": {4: 0.5, 16: 0.25, 64: 0.25}}},
        "rounds": 3 if job.toy else 12,
        "training": {"steps": steps, "batch_size": 8, "learning_rate": 1e-3, "schedule": "linear"},
        "evaluation": {"every": 1 if job.toy else 3, "batch_size": 32},
        "compute": {"device": job.device, "precision": "bfloat16"},
        **TASKS[name](data, job, held),
    }


def real_task(job: Job, name: str) -> Figures:
    """`fedhl run`, told to stop when the time is over, and `fedhl resume` when there is time again."""
    folder = job.work / "runs" / f"f-{name}"

    def over() -> bool:
        return monotonic() > job.until - CHECKPOINT

    if over():
        raise LeftOut("no time was left for it")
    config = task_config(job, name)
    file = write_config(job, f"f-{name}", config)
    if (
        job.toy and name != "gsm8k"
    ):  # that one shows how a run goes on; of the others, the config is read
        from fedhl.config import load_config

        return {"rounds": 0, "planned": load_config(file).rounds}
    command = ["run", str(file), "--out", str(folder)]
    if (folder / "config.yaml").exists():
        command = ["resume", str(folder)]
    if job.toy:
        go(fedhl(*command), until=lambda: len(metrics(folder)) >= 2)
        command = ["resume", str(folder)]
    finished = go(fedhl(*command), until=over)
    lines = metrics(folder)
    figures: Figures = {
        "rounds": lines[-1]["round"] if lines else 0,
        "planned": config["rounds"],
        "losses": {
            li["round"]: li["evaluation"]["full"]["loss"] for li in lines if li["evaluation"]
        },
        "seconds of all rounds": sum(line["seconds"]["total"] for line in lines),
        "bytes": sum(sum(line["bytes"].values()) for line in lines),
    }
    if not all(map(math.isfinite, figures["losses"].values())):
        raise AssertionError(f"losses are {figures['losses']}")
    if not finished:
        figures["status"] = f"stopped: after round {figures['rounds']} of {figures['planned']}"
    return figures


def write_config(job: Job, name: str, config: Mapping[str, Any]) -> Path:
    file = job.work / f"{name}.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # which is YAML, too
    return file


def go(command: list[str], until: Callable[[], bool]) -> bool:
    """Whether the command came to its end before `until()`, when it is told to stop, as by Ctrl-C."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    stopped = False
    try:
        while process.poll() is None:
            if until() and not stopped:
                process.terminate()
                stopped = True
            sleep(0.1)
    except KeyboardInterrupt:
        process.terminate()
        process.wait(GRACE)
        raise
    if process.returncode and not stopped:
        error = process.stderr.read() if process.stderr else ""
        raise RuntimeError(f"fedhl {' '.join(command[3:])}: {last_line(error)}")
    return not process.returncode


# --- all ----------------------------------------------------------------------------------------

Step = Callable[[Job], Figures]


def steps() -> dict[str, dict[str, Step]]:
    return {
        "a": {"methods": methods, "server": whole_server, "federation": federation},
        "b": {"ceilings": ceilings},
        "c": {
            name: work
            for model in DEMOS
            for name, work in {
                f"{model}, float32": lambda job, m=model: rounds(job, m, "float32"),
                f"{model}, bfloat16": lambda job, m=model: rounds(job, m, "bfloat16"),
                f"{model}, batched": lambda job, m=model: batched(job, m),
            }.items()
        },
        "d": {"7B": seven_billion},
        "e": {"4-bit": four_bit},
        "f": {name: lambda job, n=name: real_task(job, n) for name in TASKS},
    }


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def judged(figures: Figures) -> str:
    """The status of a step, by its differences."""
    wrong = [
        f"{c['what']}: {c['difference']:.2g}, tolerance {c['tolerance']:.2g}"
        for c in figures.get("checks", [])
        if not c["difference"] <= c["tolerance"]  # also when it is NaN
    ]
    return f"failed: {'; '.join(wrong)}" if wrong else figures.get("status", "passed")


def do(name: str, work: Step, job: Job, file: Path) -> None:
    """One step, into the file."""
    start, stopped, figures = monotonic(), False, {}
    try:
        figures = work(job)
        status = judged(figures)
    except LeftOut as reason:
        status = f"left out: {reason}"
    except KeyboardInterrupt:
        status, stopped = "stopped: before its end", True
    except Exception as error:
        traceback.print_exc()
        status = f"failed: {brief(error)}"
    result = read(file)
    taken = {"seconds": monotonic() - start}
    result["steps"][name] = {**figures, "status": status, **taken}
    write(file, result)
    print(f"{name}: {status}, {taken['seconds']:.1f} s", flush=True)
    if stopped:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=steps())
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weights", type=json.loads, default={})
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    a = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    a.work.mkdir(parents=True, exist_ok=True)
    job = Job(a.device, a.toy, a.work, a.weights, a.data, monotonic() + a.seconds)
    for name, work in steps()[a.part].items():
        if read(a.file)["steps"].get(name, {}).get("status") != "passed":
            do(name, work, job, a.file)


if __name__ == "__main__":
    main()
