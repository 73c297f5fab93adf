"""Time whole rounds: what they consist of, a switch of clients, rounds per hour against the usual way.

    python benchmarks/federation.py [--model minilm smollm2] [--rounds 3] [--set KEY=VALUE] [--json FILE]

The usual way makes a model, a PEFT adapter and a Hugging Face Trainer anew for every client of a round.
Both run the same rounds of a committed config in turn, from the same server state, on the same batches, with
the same server step, and must end at the same adapters. Nothing is evaluated.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedhl import server
from fedhl.config import dump_config, load_config
from fedhl.federation import engine
from fedhl.federation.engine import run_round
from fedhl.federation.federation import Federation
from fedhl.federation.local import Local
from fedhl.federation.prepare import Prepared, prepare
from fedhl.lora import LoRA
from fedhl.model.training import batches, learning_rate
from fedhl.record import read_metrics
from fedhl.run.commit import commit
from fedhl.run.loop import keep
from fedhl.run.rounds import finish
from fedhl.seeds import derive
from fedhl.server import Client, Reply, ServerState, refusals
from fedhl.task import KINDS, texts
from fedhl.watch import SILENT

CONFIGS = {"minilm": "demo.yaml", "smollm2": "demo-llm.yaml"}
TOLERANCE = 1e-2
"""Of the distance trained: AdamW divides by the root of the squared gradient, which turns the rounding of
gradients near 0 into steps of full length."""


class Span(NamedTuple):
    what: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@contextmanager
def watched(prepared: Prepared) -> Iterator[list[Span]]:
    """Inside the block, what fedhl does is written down: clients, their parts, first and last steps."""
    spans: list[Span] = []

    def mark(what: str) -> None:
        now = perf_counter()
        spans.append(Span(what, now, now))

    def clock(owner: Any, name: str) -> Any:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            result = function(*args, **kwargs)
            spans.append(Span(name, start, perf_counter()))
            return result

        return patch.object(owner, name, timed)

    model = prepared.federation.slots.model
    forward = model.register_forward_pre_hook(lambda *_: mark("forward"))
    step = register_optimizer_step_post_hook(lambda *_: mark("step"))
    with (
        clock(engine, "train_client"),
        clock(texts, "collate"),
        clock(server, "broadcast"),
        clock(refusals, "refusals"),
    ):
        yield spans
    forward.remove()
    step.remove()


def within(spans: Sequence[Span], what: str, start: float, end: float) -> float:
    """The seconds of `what` between two moments."""
    return sum(s.seconds for s in spans if s.what == what and start <= s.start < end)


class Turn(NamedTuple):
    """When a client began, took its first forward and its last optimizer step, and was done."""

    start: float
    first: float
    last: float
    end: float


def turns(spans: Sequence[Span]) -> list[Turn]:
    found = []
    for client in (s for s in spans if s.what == "train_client"):
        inside = [s for s in spans if client.start <= s.start < client.end]
        first = min(s.start for s in inside if s.what == "forward")
        last = max(s.start for s in inside if s.what == "step")
        found.append(Turn(client.start, first, last, client.end))
    return found


def itemised(spans: Sequence[Span], noted: Mapping[str, float], wall: float) -> dict[str, float]:
    """The seconds of one round by what they went into; `noted`: what fedhl notes itself."""
    clients = turns(spans)
    items = {
        "forward, backward, optimizer": noted["compute"],
        "broadcast": noted["broadcast"],
        "switch in": sum(
            t.first - t.start - within(spans, "collate", t.start, t.first) for t in clients
        ),
        "switch out": sum(t.end - t.last for t in clients),
        "collate": sum(s.seconds for s in spans if s.what == "collate"),
        "validate": sum(s.seconds for s in spans if s.what == "refusals"),
        "diagnostics": noted["diagnostics"],
        "checkpoint": noted["checkpoint"],
    }
    items["aggregate"] = noted["aggregate"] - items["validate"]
    items["other"] = wall - sum(items.values())
    return items


def switches(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """Seconds from the last step of each client to the first forward of the next, collating apart; and
    how much of this is the server's broadcast."""
    return [
        (
            after.first - before.last - within(spans, "collate", before.last, after.first),
            within(spans, "broadcast", before.last, after.first),
        )
        for before, after in pairwise(turns(spans))
    ]


def usual(prepared: Prepared, folder: Path) -> Callable[..., Local]:
    """`fedhl.federation.local.train_client` as it is usually written: everything anew."""
    config, loaded = prepared.config, prepared.loaded
    classify = loaded.task == "sequence-classification"
    auto: Any = (
        transformers.AutoModelForSequenceClassification
        if classify
        else transformers.AutoModelForCausalLM
    )
    settings: dict[str, Any] = {"num_labels": len(prepared.data.labels or ())} if classify else {}
    if config.model.dropout is not None:
        settings |= dict.fromkeys(
            ("hidden_dropout_prob", "attention_probs_dropout_prob"), config.model.dropout
        )
    prefix = "base_model.model."

    def train_client(
        federation: Federation,
        client: Client,
        sent: Mapping[str, Any],
        head: Mapping[str, torch.Tensor],
        round: int,
        *_: object,
        own: Mapping[str, torch.Tensor],
        version: str | None,
    ) -> Local:
        keeps = own or version
        assert not keeps, (
            f"{client.id} keeps something between rounds, which this way does not know"
        )
        model = auto.from_pretrained(loaded.source_for_adapter, dtype=torch.float32, **settings)
        model = get_peft_model(
            model,
            LoraConfig(
                task_type=KINDS[loaded.task].peft_type,
                r=client.rank,
                lora_alpha=config.lora.alpha_of(client.rank),  # pyright: ignore[reportArgumentType]
                use_rslora=config.lora.rslora,
                target_modules=list(sent),
            ),
        )
        received = {prefix + name: value for name, value in head.items()}
        for name, b in sent.items():
            received[f"{prefix}{name}.lora_A.weight"] = b.lora.A
            received[f"{prefix}{name}.lora_B.weight"] = b.lora.B
        missed = set_peft_model_state_dict(model, received)
        assert not missed.unexpected_keys, missed.unexpected_keys

        rows = federation.rows[client.id]
        t, steps = config.training, config.training.steps_for(len(rows))
        order = batches(len(rows), t.batch_size, derive(config.seed, "training", round, client.id))
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=t.weight_decay
        )
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda k: learning_rate(t, config.period, round - 1 + (k + 0.5) / steps),
        )
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=min(t.batch_size, len(rows)),
            max_grad_norm=t.max_grad_norm or 0.0,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=[rows[k] for batch in islice(order, steps) for k in batch],  # pyright: ignore
            data_collator=federation.objective.batch,
            optimizers=(optimizer, rate),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        loss = trainer.train().training_loss

        returned = get_peft_model_state_dict(model)
        adapter = {
            name: LoRA(
                returned[f"{prefix}{name}.lora_A.weight"].clone(),
                returned[f"{prefix}{name}.lora_B.weight"].clone(),
                b.lora.scale,
            )
            for name, b in sent.items()
        }
        theirs = {name: returned[prefix + name].clone() for name in head}
        return Local(Reply(client, round, adapter, theirs, loss, steps), {}, 0.0)

    return train_client


class Done(NamedTuple):
    state: ServerState
    replies: list[Reply]
    noted: dict[str, float]
    wall: float


def one_round(prepared: Prepared, state: ServerState, folder: Path) -> Done:
    """A round as `fedhl run` does it, checkpoint and metrics included."""
    replies: list[Reply] = []
    aggregate = server.aggregate

    def listening(*args: Any, **kwargs: Any) -> Any:
        replies.extend(args[3])
        return aggregate(*args, **kwargs)

    with patch.object(server, "aggregate", listening):
        start = perf_counter()
        following, outcome = run_round(prepared.federation, state)
        keep(
            prepared,
            finish(prepared.federation, following, state, outcome, (), None),
            read_metrics(folder),
            folder,
            SILENT,
        )
        wall = perf_counter() - start
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return Done(following, replies, last["seconds"], wall)


def difference(prepared: Prepared, state: ServerState, ours: Done, theirs: Done) -> float:
    """The largest difference of what a client's training came to, relative to what it moved."""
    method, seed = prepared.federation.method, prepared.config.seed
    worst = 0.0
    for a, b in zip(ours.replies, theirs.replies, strict=True):
        assert a.client == b.client
        sent = server.broadcast(method, state, a.client, seed)
        apart = moved = 0.0
        for name, start in sent.items():
            delta = a.adapter[name].delta()
            apart += float((delta - b.adapter[name].delta()).square().sum())
            moved += float((delta - start.lora.delta()).square().sum())
        for name, value in state.head.items():
            apart += float((a.head[name] - b.head[name]).square().sum())
            moved += float((a.head[name] - value).square().sum())
        worst = max(worst, (apart / moved) ** 0.5)
    return worst


def measure(model: str, rounds: int, overrides: Sequence[str]) -> dict[str, Any]:
    config = load_config(
        Path(__file__).parents[1] / "configs" / CONFIGS[model],
        # one round more than are run, or the last would be evaluated
        # clients that remember are not the usual way
        ["method=fedhl", f"rounds={rounds + 2}", f"evaluation.every={rounds + 2}", *overrides],
    )
    prepared = prepare(config)
    state = prepared.initial_state()
    walls: dict[str, list[float]] = {"fedhl": [], "usual": []}
    items: list[dict[str, float]] = []
    gaps: list[tuple[float, float]] = []
    apart = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for way in walls:
            (Path(folder) / way / "state").mkdir(parents=True)
            (Path(folder) / way / "config.yaml").write_text(dump_config(config))

        def ours() -> Done:
            with watched(prepared) as spans:
                done = one_round(prepared, state, Path(folder) / "fedhl")
            if state.round:  # the first round warms up
                items.append(itemised(spans, done.noted, done.wall))
                gaps.extend(switches(spans))
            return done

        def theirs() -> Done:
            with patch.object(engine, "train_client", usual(prepared, Path(folder))):
                return one_round(prepared, state, Path(folder) / "usual")

        for round in range(rounds + 1):
            ways = {"fedhl": ours, "usual": theirs}
            done = {way: ways[way]() for way in (ways if round % 2 else reversed(ways))}
            apart = max(apart, difference(prepared, state, done["fedhl"], done["usual"]))
            assert apart < TOLERANCE, apart
            if round:
                for way, result in done.items():
                    walls[way].append(result.wall)
            state = done["fedhl"].state
    seconds = {way: median(times) for way, times in walls.items()}
    shares = [round["forward, backward, optimizer"] / sum(round.values()) for round in items]
    return {
        "config": CONFIGS[model],
        "overrides": list(overrides),
        "rounds": rounds,
        "clients per round": config.participation.size(len(prepared.federation.clients)),
        "steps per client": config.training.steps,
        "share in forward, backward, optimizer": {"median": median(shares), "rounds": shares},
        "seconds of a round": {what: median(round[what] for round in items) for what in items[0]},
        "milliseconds from client to client": {
            "median": 1e3 * median(whole for whole, _ in gaps),
            "largest": 1e3 * max(whole for whole, _ in gaps),
            "of which broadcast": 1e3 * median(part for _, part in gaps),
        },
        "rounds per hour": {way: 3600 / s for way, s in seconds.items()},
        "ratio": median(u / f for f, u in zip(walls["fedhl"], walls["usual"], strict=True)),
        "round seconds": walls,
        "relative difference of the trained adapters": apart,
    }


def show(model: str, row: Mapping[str, Any]) -> None:
    share, gap, rate = (
        row["share in forward, backward, optimizer"],
        row["milliseconds from client to client"],
        row["rounds per hour"],
    )
    print(f"{model} ({row['config']}): {share['median']:.1%} in forward, backward, optimizer")
    for what, seconds in row["seconds of a round"].items():
        print(f"  {what:<30} {seconds:>9.4f} s")
    print(
        f"  from client to client {gap['median']:.1f} ms, {gap['of which broadcast']:.1f} of them "
        f"broadcast; largest {gap['largest']:.1f}"
    )
    print(
        f"  rounds per hour: fedhl {rate['fedhl']:.0f}, the usual way {rate['usual']:.0f}: "
        f"{row['ratio']:.2f}x; adapters differ by "
        f"{row['relative difference of the trained adapters']:.1e} of what was trained"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", nargs="+", choices=[*CONFIGS], default=[*CONFIGS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parent / "results" / "federation.json"
    )
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for model in arguments.model:
        row = measure(model, arguments.rounds, arguments.set)
        row["machine"] = {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
            "commit": commit(),
        }
        known[" ".join([model, *arguments.set])] = row
        show(model, row)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(known, indent=1) + "\n")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
