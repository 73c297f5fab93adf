"""What `fedhl eval` is asked for beside the metrics, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fedhl.config import Config
from fedhl.errors import UserError
from fedhl.task.kind import Kind
from fedhl.task.texts import TextKind

SUFFIXES = (".jsonl", ".csv")
NEW_TOKENS = 64


@dataclass(frozen=True)
class Asked:
    """`predictions`: a file for the held-out rows with the model's predictions; `classes`: scores by class;
    `samples`: of how many rows the model completes the prompt, with at most `new_tokens` tokens; `rank`: all
    this of the update truncated to this rank, and not of the full-rank update."""

    predictions: Path | None = None
    classes: bool = False
    samples: int | None = None
    new_tokens: int | None = None
    rank: int | None = None

    @property
    def anything(self) -> bool:
        return bool(self.predictions or self.classes or self.samples)

    def check(self, config: Config, source: str | None) -> None:
        """Raises UserError for what a run of this config cannot answer, on its own held-out rows or on those
        of `source`, and for a file that cannot be written."""
        if self.rank is not None and not self.anything:
            raise UserError(
                f"--rank {self.rank} chooses the model of --predictions, --classes, --samples and --lm-eval; "
                "add one of these options (the table has all ranks of clients anyway)"
            )
        if self.new_tokens is not None and not self.samples:
            raise UserError(
                f"--new-tokens {self.new_tokens} is the length of --samples; add --samples N, too"
            )
        if self.classes and not has_classes(config.task):
            raise UserError(f"--classes: rows of a {config.task.kind} task have no classes")
        if self.samples and not writes_texts(config.task):
            raise UserError(f"--samples: a model of a {config.task.kind} task writes no texts")
        if self.anything and source is None and config.data.held_out is None:
            raise UserError(
                "the server of this run has no held-out rows of its own to look at; name a file of rows "
                "with --data"
            )
        if self.predictions is not None:
            check_new("--predictions", self.predictions, SUFFIXES)


METRICS = Asked()
"""Nothing beside the metrics."""


@dataclass(frozen=True)
class Harness:
    """What lm-eval is asked for in place of the metrics. `tasks`: the names of its tasks, of which `*` stands
    for several; `include_path`: a folder with more tasks; `json`: a file for all that it finds; `rank`: as in
    `Asked`; `limit`: only so many rows of each task; `chat`: prompts in the model's chat template."""

    tasks: Sequence[str]
    include_path: Path | None = None
    json: Path | None = None
    rank: int | None = None
    limit: int | None = None
    chat: bool = False

    def check(self, config: Config) -> None:
        """Raises UserError unless lm-eval is installed, the model of this run is one for it, and the files
        are right."""
        if config.task.auto != "AutoModelForCausalLM":
            raise UserError(
                f"--lm-eval: lm-eval is for causal language models, and this run has a {config.task.kind} "
                "task; leave --lm-eval out"
            )
        if find_spec("lm_eval") is None:
            raise UserError(
                "--lm-eval: lm-eval is not installed; install it with `pip install 'fedhl[lm-eval]'`"
            )
        if not all(self.tasks):
            raise UserError(
                "--lm-eval: expected names of tasks with commas between them, e.g. hellaswag,arc_easy"
            )
        if self.include_path is not None and not self.include_path.is_dir():
            raise UserError(f"--include-path {self.include_path}: there is no such folder")
        if self.json is not None:
            check_new("--json", self.json, (".json",))


def has_classes(task: Kind) -> bool:
    """Whether each row has one class of several."""
    return task.class_field is not None


def writes_texts(task: Kind) -> bool:
    """Whether the model continues a prompt."""
    return isinstance(task, TextKind) and task.pipeline == "text-generation"


def check_new(option: str, file: Path, suffixes: Sequence[str]) -> None:
    """Raises UserError unless a new file with one of these endings can be written at this place."""
    if file.suffix not in suffixes:
        raise UserError(f"{option} {file}: expected the name of a {' or '.join(suffixes)} file")
    if file.exists():
        raise UserError(f"{option} {file}: the file is there already; choose another name")
    if not file.parent.is_dir():
        raise UserError(f"{option} {file}: there is no folder {file.parent}")
