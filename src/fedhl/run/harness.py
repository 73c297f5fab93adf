"""The model of a run under EleutherAI's lm-eval, the evaluation harness; this module alone imports it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from fedhl.config import Config
from fedhl.errors import UserError
from fedhl.federation.federation import Federation, initial_state
from fedhl.federation.prepare import load_federation
from fedhl.federation.scores import changed, model_of_rank
from fedhl.files import json_text, write_text
from fedhl.names import unknown
from fedhl.record import read_summary
from fedhl.run.asked import Harness
from fedhl.run.delivery import Which, refuse_diverged
from fedhl.run.folder import load_checkpoint, load_run_config
from fedhl.run.summary import check_same, hash_once
from fedhl.run.tables import Said
from fedhl.watch import SILENT, Watcher

Json = dict[str, Any]


def evaluate_by_harness(
    run: Path, which: Which, asked: Harness, watcher: Watcher = SILENT, places: Sequence[str] = ()
) -> list[Said]:
    """What lm-eval finds of a checkpoint, as a table; the data of the run is not needed, and no weights are
    written. `places`: where the model is now, as in `load_run_config`. Writes `asked.json`, whole or not at
    all.

    Raises UserError, e.g. for a task that lm-eval does not know, or whose rows it cannot fetch.
    """
    config, summary = load_run_config(run, places, ["model.source"]), read_summary(run)
    asked.check(config)
    with calm():
        manager = manager_for(asked)
        tasks = find_tasks(manager, asked.tasks)
    ranks = {client["id"]: client["rank"] for client in summary["clients"]}
    loaded, federation = load_federation(config, summary["labels"], ranks)
    check_same(run, config, {"model": loaded.hash, "tokenizer": hash_once(loaded.processor)})
    if asked.chat and not loaded.processor.chat_template:
        raise UserError("--chat-template: the model's tokenizer has no chat template; leave it out")
    state, manifest = load_checkpoint(run, initial_state(federation), which, watcher)
    model, change = model_of_rank(federation, state, asked.rank)
    refuse_diverged(run, state, change, manifest["metrics"]["evaluation"])
    with changed(federation, state, change), calm():
        found = results(federation, config, loaded.processor, manager, tasks, asked)
    said: list[Said] = [table(found, f"lm-eval, {model}, after round {state.round}")]
    if asked.json:
        write_results(asked.json, found, {"run": run.name, "round": state.round, "model": model})
        said.append(f"all that lm-eval found: {asked.json}")
    return said


def manager_for(asked: Harness) -> Any:
    """lm-eval's manager of tasks, with its own thousands of tasks only where one of them may be asked for: to
    read their files takes seconds."""
    from lm_eval.tasks import TaskManager

    if asked.include_path is not None:
        alone = TaskManager(include_path=asked.include_path, include_defaults=False)
        if set(asked.tasks) <= set(alone.all_subtasks):
            return alone
    return TaskManager(include_path=asked.include_path)


@contextmanager
def calm() -> Iterator[None]:
    """Inside the block lm-eval logs errors only; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def find_tasks(manager: Any, patterns: Sequence[str]) -> list[Any]:
    """The tasks and groups that lm-eval's task manager knows by these names, with their rows. Raises
    UserError for one that is unknown, that cannot be read, or that runs code."""
    from datasets import config as offline

    names = [name for pattern in patterns for name in manager.match_tasks([pattern])]
    for pattern in patterns:
        if not manager.match_tasks([pattern]):
            raise UserError(f"--lm-eval: {unknown('task', pattern, manager.all_tasks)}")
    try:
        loaded: Mapping[str, Any] = manager.load(names)
    except Exception as error:  # the task's own code, and rows from anywhere: all may happen
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        hint = ", and HF_HUB_OFFLINE is set" if offline.HF_HUB_OFFLINE else ""
        raise UserError(
            f"--lm-eval {','.join(patterns)}: the tasks or their rows cannot be read: {why} (lm-eval "
            f"fetches rows from the Hugging Face hub, unless a task names files of yours{hint})"
        ) from error
    if unsafe := [
        name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)
    ]:
        raise UserError(
            f"--lm-eval: {unsafe[0]} runs code that the model writes, which is not done here; write the "
            "model with `fedhl export --merged`, and give that folder to lm_eval in a sandbox"
        )
    groups = loaded["groups"]
    inner = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    single = [task for name, task in loaded["tasks"].items() if name not in inner]
    return [*(group for name, group in groups.items() if name in names), *single]


def results(
    federation: Federation,
    config: Config,
    tokenizer: Any,
    manager: Any,
    tasks: Sequence[Any],
    asked: Harness,
) -> Json:
    """What lm-eval says of the current model, as its own library returns it; for a file also every row with
    its answers or log-likelihoods."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    half = torch.bfloat16 if config.compute.precision == "bfloat16" else None
    wrapper: Any = HFLM  # a decorator of lm-eval hides its arguments
    model = wrapper(
        pretrained=federation.slots.model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=config.evaluation.batch_size,
        mixed_precision_dtype=half,
    )
    found: Any = simple_evaluate(
        model,
        tasks=list(tasks),
        task_manager=manager,
        batch_size=config.evaluation.batch_size,
        log_samples=bool(asked.json),
        limit=asked.limit,
        apply_chat_template=asked.chat,
    )
    return found


def table(found: Json, title: str) -> Table:
    """A row for each metric of each task and group: its value, its standard error, the number of rows."""
    import lm_eval

    shown = Table(title=Text(title), title_justify="left")
    shown.caption = Text(f"±: the standard error; lm-eval {lm_eval.__version__}")
    shown.caption_justify = "left"
    for name in ("task", "metric"):
        shown.add_column(name, overflow="fold")
    for name in ("value", "±", "rows"):
        shown.add_column(name, justify="right")
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            error = values.get(f"{metric}_stderr,{filtered}")
            rows = values.get("sample_len", "")
            shown.add_row(Text(task), Text(name), decimals(value), decimals(error), str(rows))
    return shown


def decimals(value: Any) -> str:
    """Four decimals; nothing for what is no number, such as an error that lm-eval does not know."""
    return f"{value:.4f}" if isinstance(value, float | int) else ""


def write_results(file: Path, found: Json, about: Mapping[str, Any]) -> None:
    """Write all results of lm-eval as JSON, with `about` as `fedhl`. Raises UserError if that fails."""
    from lm_eval.utils import handle_non_serializable

    plain = json.loads(json.dumps(found, default=handle_non_serializable))
    try:
        write_text(file, json_text({"fedhl": about, **plain}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {file}: it cannot be written: {error.strerror}") from error
