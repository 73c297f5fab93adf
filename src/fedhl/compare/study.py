"""Methods side by side: one config, the same seeds for each, one run folder per variant and seed.

A seed decides the clients, their cohorts and batches, and the initial adapter, whatever the method is
(see `seeds.py`), so the runs of one seed differ by what their variants name and by nothing else.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from fedhl.compare.alone import finished, run_alone
from fedhl.compare.variants import Variant, parse_variant
from fedhl.config import Config, load_config
from fedhl.errors import UserError
from fedhl.federation.examine import examine
from fedhl.federation.first_look import check_config
from fedhl.files import private_folder, write_text
from fedhl.names import listed
from fedhl.report.compare import Comparison, Trial, read_comparison, write_comparison
from fedhl.run import resume_run, start_run
from fedhl.run.folder import anchored, load_run_config, trackers_of
from fedhl.watch import SILENT, Watcher

# --- what is to be run --------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run, or one run of every client `alone`: its label, its settings, its folder."""

    label: str
    config: Config
    folder: Path
    alone: bool


@dataclass(frozen=True)
class Study:
    """The variants and seeds of a comparison, and its folder; with `rates`, a learning rate is chosen for
    each variant first."""

    config: Config
    variants: Sequence[Variant]
    seeds: Sequence[int]
    rates: Sequence[float]
    folder: Path

    def job(self, label: str, variant: Variant, seed: int, rate: float | None, folder: str) -> Job:
        """One run, which trackers name by its label, in a group of the name of the comparison's folder,
        unless the config has names of its own."""
        config = variant.config(self.config, seed, *rate_change(rate))
        names = {"run": label, "group": self.folder.name}
        named = []
        for tracker in config.report_to:
            unnamed = {
                key: name for key, name in names.items() if getattr(tracker, key, "") is None
            }
            named.append(tracker.model_copy(update=unnamed))
        config = config.model_copy(update={"report_to": named})
        return Job(label, config, self.folder / folder, variant.alone)

    @property
    def later(self) -> Sequence[int]:
        """The seeds to run once the learning rates are known: without the first seed, whose run has chosen
        the rate."""
        return self.seeds[1:] if self.rates else self.seeds

    @property
    def planned(self) -> int:
        return len(self.variants) * (len(self.rates) + len(self.later))

    def grid(self) -> list[Job]:
        """The runs that choose the learning rates, with the first seed."""
        return [
            self.job(
                f"{variant.text}, rate {rate}",
                variant,
                self.seeds[0],
                rate,
                rate_folder(variant, rate),
            )
            for rate in self.rates
            for variant in self.variants  # innermost: what cannot run shows early
        ]

    def sweep(self, seed: int, chosen: Mapping[str, float]) -> list[Job]:
        """Every variant with this seed."""
        return [
            self.job(
                f"{variant.text}, seed {seed}",
                variant,
                seed,
                chosen.get(variant.text),
                seed_folder(variant, seed, chosen.get(variant.text)),
            )
            for variant in self.variants
        ]

    def plan(self, chosen: Mapping[str, float]) -> dict[str, Any]:
        """`comparison.json` without results: the run folders of each variant."""
        return {
            "name": self.config.name,
            "seeds": [*self.seeds],
            "rates": [*self.rates],
            "chosen_on": rows_to_choose_by(self.config) if self.rates else None,
            "planned": self.planned,
            "config": self.config.model_dump(mode="json"),
            "variants": [self.entry(variant, chosen) for variant in self.variants],
        }

    def entry(self, variant: Variant, chosen: Mapping[str, float]) -> dict[str, Any]:
        """A variant's part of the plan; before its learning rate is chosen, its runs have no folder."""
        rate = chosen.get(variant.text)
        folders: dict[int, str | None]
        folders = {seed: seed_folder(variant, seed, rate) for seed in self.seeds}
        if not self.rates:
            rate = variant.config(self.config, self.seeds[0]).training.learning_rate
        elif rate is None:
            folders = dict.fromkeys(self.seeds)
        else:
            folders[self.seeds[0]] = rate_folder(variant, rate)
        return {
            "variant": variant.text,
            "learning_rate": rate,
            "grid": [{"rate": r, "folder": rate_folder(variant, r)} for r in self.rates],
            "runs": [{"seed": seed, "folder": folder} for seed, folder in folders.items()],
        }


def seed_folder(variant: Variant, seed: int, rate: float | None) -> str:
    """The folder of a run. Its name has a chosen rate, since other `--rates` may lead to another choice."""
    return f"{variant.folder}/seed-{seed}" + ("" if rate is None else f"-rate-{rate!r}")


def rate_folder(variant: Variant, rate: float) -> str:
    return f"{variant.folder}/rate-{rate!r}"


def rate_change(rate: float | None) -> list[str]:
    return [] if rate is None else [f"training.learning_rate={rate!r}"]


# --- refusals -----------------------------------------------------------------------------------


def refuse_duplicates(option: str, given: Sequence[Any]) -> None:
    """Raises UserError if a value is given twice: it would be counted twice, or share a folder."""
    for one in given:
        if given.count(one) > 1:
            raise UserError(f"{option}: {one} is given twice; leave one out")


def refuse_mixed_ranks(variant: Variant, config: Config) -> None:
    """Raises UserError for a method of one rank on mixed ranks, suggesting a variant with one rank."""
    ranks = config.lora.ranks.named
    if variant.alone or config.participation.pooled:
        return
    if not config.method.build().mixed_ranks and len(set(ranks)) > 1:
        shown = listed(sorted(set(ranks)))
        raise UserError(
            f"--methods {variant.text}: {variant.method} needs one rank for all clients, and lora.ranks "
            f"has {shown}; give the variant a rank of its own: "
            f"{variant.text}@lora.ranks={median_low(ranks)}"
        )


def refuse_own_rate(variant: Variant) -> None:
    """Raises UserError for a variant that sets the learning rate although `--rates` chooses it."""
    own = ("training.learning_rate=", "training=")
    if any(change.startswith(own) for change in variant.changes):
        raise UserError(
            f"--methods {variant.text}: --rates chooses training.learning_rate; leave out one of the two"
        )


def check_variant(variant: Variant, config: Config) -> None:
    """Raises UserError for mistakes that show without the model, naming the variant."""
    try:
        check_config(config)
        examine(config)
    except UserError as error:
        raise UserError(f"--methods {variant.text}: {error}") from None


def warn_of_left_out(variants: Sequence[Variant], folder: Path, watcher: Watcher) -> None:
    """Warn if this folder holds runs of variants that are not named now."""
    try:
        before = json.loads((folder / "comparison.json").read_text("utf-8"))["variants"]
    except (OSError, ValueError, KeyError):
        return
    named = {variant.text for variant in variants}
    if others := [entry["variant"] for entry in before if entry["variant"] not in named]:
        watcher.say(
            f"warning: the report leaves out {', '.join(others)}, whose runs are in {folder} as well; to "
            "keep them in the report, name them with --methods"
        )


def rows_to_choose_by(config: Config) -> str:
    """The rows on which a learning rate is chosen: the server's "validation" rows, or the held-out rows of
    the "clients", but never rows that are reported. Raises UserError if there are no such rows."""
    if config.data.validation is not None:
        return "validation"
    if config.evaluation.client_fraction and config.data.held_out is not None:
        return "clients"
    raise UserError(
        "--rates: a learning rate must not be chosen on the rows that are reported; keep other rows for "
        "the server with --set data.validation=500, or for each client, beside data.held_out, with "
        "--set evaluation.client_fraction=0.1"
    )


def refuse_other_settings(jobs: Sequence[Job]) -> None:
    """Raises UserError for a run folder that was made with other settings, naming the first difference."""
    for job in jobs:
        if not (job.folder / "config.yaml").is_file():
            continue
        # a record of each client alone is no run that could be loaded
        was = load_config(job.folder / "config.yaml") if job.alone else load_run_config(job.folder)
        found = difference(settings(anchored(was)), settings(anchored(job.config)))
        if found is not None:
            key, before, now = found
            raise UserError(
                f"{job.folder} was made with {key} = {before!r}, and this comparison needs {now!r}; "
                "change the setting back, remove that folder, or choose another one with --out"
            )


def settings(config: Config) -> dict[str, Any]:
    """Every setting that a run must keep, as in the config of a run folder."""
    whole = config.model_copy(update={"weighting": config.weighting_used})
    return whole.model_dump(mode="json", exclude={"report_to"})


def difference(was: Any, now: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first setting in which two configs differ, with both values; None if they are the same."""
    if not (isinstance(was, Mapping) and isinstance(now, Mapping)):
        return None if was == now else (path, was, now)
    for key in dict.fromkeys((*now, *was)):
        found = difference(was.get(key), now.get(key), f"{path}.{key}" if path else key)
        if found is not None:
            return found
    return None


# --- running ------------------------------------------------------------------------------------


def compare(
    config: Config,
    variants: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path,
    watcher: Watcher = SILENT,
    rates: Sequence[float] = (),
) -> Comparison:
    """Compare every variant with every seed: start missing runs, resume stopped ones, keep finished ones.

    With `rates`, each variant first chooses its learning rate among them with the first seed. The
    report is written anew after every seed. Raises UserError for mistakes before any run starts.
    """
    made = [parse_variant(text) for text in variants]
    refuse_duplicates("--methods", [variant.folder for variant in made])
    refuse_duplicates("--seeds", seeds)
    refuse_duplicates("--rates", rates)
    for variant in made:
        for seed in seeds:
            refuse_mixed_ranks(variant, variant.config(config, seed))
        if rates:
            refuse_own_rate(variant)
    folder = Path(folder)
    study = Study(config, made, seeds, rates, folder)
    grid, chosen = study.grid(), {}
    if rates:
        rows_to_choose_by(config)
    refuse_other_settings(grid or study.sweep(seeds[0], chosen))
    for variant in made:
        check_variant(variant, variant.config(config, seeds[0]))
    warn_of_left_out(made, folder, watcher)
    if rates:
        # what is complete stays as it is, unless it is that of other variants or rates
        known = planned(folder) == ([variant.text for variant in made], [*rates])
        if not known or not all(finished(job.folder) for job in grid):
            write_plan(folder, study.plan(chosen))
        finish(study, grid, 1, watcher)
        read = read_comparison(folder)
        chosen = {
            v.text: best_rate(read, v.text, of.grid)
            for v, of in zip(made, read.variants, strict=True)
        }
        for text, rate in chosen.items():
            watcher.say(f"{text}: learning rate {rate}")
    sweeps = [study.sweep(seed, chosen) for seed in study.later]
    refuse_other_settings([job for sweep in sweeps for job in sweep])
    write_plan(folder, study.plan(chosen))
    for k, sweep in enumerate(sweeps):  # seed by seed: soon there is something to compare
        finish(study, sweep, len(made) * (len(rates) + k) + 1, watcher)
    return read_comparison(folder)


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, and the report of the existing runs."""
    with saving(folder):
        private_folder(folder)
        write_text(folder / "comparison.json", json.dumps(plan))
        write_comparison(folder)


def planned(folder: Path) -> tuple[list[str], list[float]] | None:
    """The variants and rates of the comparison in this folder; None if it cannot be read."""
    try:
        plan = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return [entry["variant"] for entry in plan["variants"]], plan["rates"]


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn a failure to write the comparison into a message; finished runs stay."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error}; finished runs are kept; make room and give the same "
            "command again, or choose another folder with --out"
        ) from None


def finish(study: Study, jobs: Sequence[Job], first: int, watcher: Watcher) -> None:
    """Start, resume or keep each run, then write the report; `first`: the number of the first run."""
    left = [(number, job) for number, job in enumerate(jobs, first) if not finished(job.folder)]
    try:
        for number, job in left:
            label = f"{job.label} ({number} of {study.planned})"
            watcher.say(label)
            if job.alone:
                with saving(study.folder):
                    run_alone(job.config, job.folder, watcher.labelled(label))
            elif (job.folder / "config.yaml").is_file():
                resume_run(job.folder, watcher.labelled(label), [trackers_of(job.config)])
            else:
                start_run(job.config, job.folder, watcher.labelled(label))
            gc.collect()  # a model refers to itself: free it before the next is loaded
    finally:
        if left:
            watcher.step("writing the comparison", 0, 1)
            with saving(study.folder):
                write_comparison(study.folder)


def best_rate(comparison: Comparison, variant: str, grid: Sequence[Trial]) -> float:
    """The rate whose final model is best on the rows of the choice: by the metric of the task, then by loss,
    then the smaller rate. Raises UserError if no loss is finite."""

    def quality(trial: Trial) -> tuple[float, ...]:
        metrics, rate = comparison.validation(trial), trial.rate or 0.0
        loss = metrics.get("loss")
        if loss is None or trial.run is None:
            return ()
        value = metrics.get(trial.run.metric) or 0.0
        return (value if trial.run.greater else -value, -loss, -rate)

    best = max(grid, key=quality)
    if not quality(best) or best.rate is None:
        raise UserError(
            f"{variant}: no learning rate of --rates gave a finite loss; give smaller ones"
        )
    return best.rate
