"""The runs of a comparison, by variant and seed, and the values that its page and its tables take from them.

A pure function of files: `comparison.json`, written by `fedhl compare`, names the run folders of each
variant; everything else comes from the run folders.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedhl.errors import UserError
from fedhl.record import FAILED, FINISHED, Unit
from fedhl.report.files import Json, Run, dig, final_evaluation, items, num, read_run, total
from fedhl.report.statistics import mean_interval

KINDS = {
    "full": "full W",
    "truncated": "T_rmax(W)",
    "smallest": "smallest rank",
    "mean": "mean client",
    "worst": "worst client",
    "personal": "personal client",
}
"""The kinds of final models that are scored: with the full-rank W, as clients of the largest and of the
smallest rank deploy it, and by the clients on their own rows: the models that they are sent, and the mean
over their personal models."""

CURVES = {
    "full": ("full",),
    "truncated": ("truncated",),
    "mean": ("clients", "mean"),
    "worst": ("clients", "worst"),
}
"""The kinds that are scored in every round, with the keys that lead to them in an evaluation."""

BASELINES = {
    "alone": "Each client trains for itself, on its own rows, in every round; the scores of the full W are "
    "means over the clients' models.",
    "pooled": "One client has the training rows of all, the largest of their ranks, and takes the steps "
    "of all.",
    "pooled_full": "One client has the training rows of all, takes the steps of all, and has no adapter: it "
    "trains the whole weights of the adapted layers (full fine-tuning of these layers).",
}
"""Variants that are no federation, and what a federation is compared with."""
WHOLE = "pooled_full"
"""The baseline that trains no adapter."""

COSTS = {
    "MiB down": ("bytes", "down", 2**20),
    "MiB up": ("bytes", "up", 2**20),
    "Seconds training": ("seconds", "train", 1),
    "Seconds in all": ("seconds", "total", 1),
}
"""Totals of a run: group and key of its files, and the unit."""


@dataclass(frozen=True)
class Trial:
    """One run folder of a comparison; `run` is None until its first round is on disk."""

    seed: int
    rate: float | None
    folder: str | None
    run: Run | None

    @property
    def status(self) -> str:
        if self.run is None:
            return "missing" if self.folder else "waits for its learning rate"
        return str(dig(self.run.summary, "status") or "running")

    @property
    def finished(self) -> Run | None:
        return self.run if self.status in (FINISHED, FAILED) else None

    @cached_property
    def scores(self) -> dict[str, dict[str, float | None]]:
        """The loss and the metric at the end, by the kinds that were measured."""
        final = final_evaluation(self.run)[1] if self.run else {}
        ranks = dig(final, "ranks") or {}
        found = {name: dig(final, *keys) for name, keys in CURVES.items()}
        found["smallest"] = ranks[min(ranks, key=int)] if ranks else None
        found["personal"] = dig(self.run and self.run.summary, "personal", "mean", "personal")
        return {
            kind: {name: num(found[kind], name) for name in self.names if name in value}
            for kind in KINDS
            if isinstance(value := found[kind], dict)
        }

    @property
    def names(self) -> list[str]:
        """The loss, and the metric by which the run is judged."""
        return list(dict.fromkeys(("loss", self.run.metric if self.run else "loss")))

    def score(self, kind: str, metric: str) -> float | None:
        return self.scores.get(kind, {}).get(metric)

    def total(self, group: str, key: str) -> float | None:
        """A total of the run so far, e.g. of bytes down."""
        return total(self.run, group, key) if self.run else None


@dataclass(frozen=True)
class Variant:
    """A method with its own settings: its runs by seed, and the runs that chose its learning rate."""

    text: str
    trials: list[Trial]
    grid: list[Trial]
    rate: float | None

    @property
    def finished(self) -> list[Run]:
        return [run for trial in self.trials if (run := trial.finished)]

    @property
    def baseline(self) -> str | None:
        """The words for a variant that is no federation; None for one that is."""
        return BASELINES.get(self.text.split("@")[0])

    @property
    def weighting(self) -> Json | None:
        if self.baseline:
            return None
        return next((dig(run.summary, "weighting") for run in self.finished), None)

    @property
    def ranks(self) -> list[int]:
        """The ranks of the adapters that were trained; empty if whole weights were."""
        if self.text.split("@")[0] == WHOLE:
            return []
        clients = [client for run in self.finished for client in items(run.summary, "clients")]
        return sorted({int(rank) for client in clients if (rank := num(client, "rank"))})

    def values(self, kind: str, metric: str) -> list[float | None]:
        """The scores of the finished runs, by seed; empty if no run has this kind of score."""
        done = [trial for trial in self.trials if trial.finished]
        judged = any(metric in trial.scores.get(kind, {}) for trial in done)
        return [trial.score(kind, metric) for trial in done] if judged else []

    def cost(self, group: str, key: str) -> float | None:
        """The mean over the finished runs of a total, e.g. of bytes down."""
        return mean_interval([total(run, group, key) for run in self.finished])[0]


@dataclass(frozen=True)
class Comparison:
    """What `comparison.json` names, read from the run folders."""

    plan: Json
    variants: list[Variant]

    @property
    def name(self) -> str:
        return str(self.plan["name"])

    @property
    def trials(self) -> list[Trial]:
        return [trial for variant in self.variants for trial in variant.trials]

    @property
    def finished(self) -> tuple[int, int]:
        """The number of finished run folders, and of planned ones."""
        there = {t.folder for v in self.variants for t in (*v.grid, *v.trials) if t.finished}
        return len(there), int(self.plan["planned"])

    @property
    def metric(self) -> str:
        return next((run.metric for v in self.variants for run in v.finished), "loss")

    @property
    def greater(self) -> bool:
        """Whether more of the metric is better."""
        return any(run.greater for v in self.variants for run in v.finished)

    @property
    def unit(self) -> Unit:
        """What the metric is."""
        known: list[Unit] = [run.unit for v in self.variants for run in v.finished]
        return known[0] if known else "number"

    @property
    def kinds(self) -> list[str]:
        """The kinds to show: of the global model, if any variant has one; of the clients, where they have
        evaluated; of personal models, where there are any."""
        done = [variant for variant in self.variants if variant.finished]
        personal = ["personal"] if any(v.values("personal", "loss") for v in done) else []
        of_server = [v for v in done if any(v.values(k, "loss") for k in ("full", "truncated"))]
        if done and not of_server:
            return ["mean", *personal, "worst"]
        own = [kind for kind in ("mean", "worst") if any(v.values(kind, "loss") for v in done)]
        return ["full", "truncated", *own[:1], *personal, *own[1:]]

    @property
    def common(self) -> str:
        """The kind by which variants are compared: the first that any variant has."""
        measured = (k for k in self.kinds if any(v.values(k, self.metric) for v in self.variants))
        return next(measured, self.kinds[0])

    def untrained(self, kind: str, metric: str) -> list[float | None]:
        """The scores before round 1, by seed; empty if none is known. The adapters are the same for all
        variants, and so is this model."""
        first = {t.seed: t for v in reversed(self.variants) for t in v.trials if t.finished}
        starts = [dig(t.run.rounds[0], "evaluation") for t in first.values() if t.run]
        found = [value for each in starts if (value := dig(each, *CURVES.get(kind, (kind,))))]
        return [num(value, metric) for value in found if metric in value]

    def losses(self, variant: Variant) -> list[float | None]:
        """The losses of the first shown kind that the variant has."""
        found = (variant.values(kind, "loss") for kind in self.kinds)
        return next((values for values in found if values), [])

    def validation(self, trial: Trial) -> dict[str, float | None]:
        """The loss and the metric for the choice of a learning rate: of the full W on the server's validation
        rows, or the mean over the clients on their held-out rows."""
        final = final_evaluation(trial.run)[1] if trial.run else {}
        found = dig(final, "validation") or dig(final, "clients", "mean") or {}
        return {name: num(found, name) for name in trial.names if name in found}

    def differences(self, variant: Variant) -> list[float | None]:
        """Its metric minus the first variant's, seed by seed where both have finished."""
        first = {t.seed: t for t in self.variants[0].trials if t.finished}
        pairs = [
            (
                trial.score(self.common, self.metric),
                first[trial.seed].score(self.common, self.metric),
            )
            for trial in variant.trials
            if trial.finished and trial.seed in first
        ]
        return [None if a is None or b is None else a - b for a, b in pairs]


def read_comparison(folder: Path) -> Comparison:
    """The comparison in this folder. Raises UserError if `comparison.json` is missing or a run folder is
    damaged."""
    path = folder / "comparison.json"
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not the folder of a comparison: {path.name} cannot be read ({error})"
        ) from None

    def trial(seed: int, rate: float | None, below: str | None) -> Trial:
        run = None
        if below is not None and (folder / below / "metrics.jsonl").is_file():
            run = read_run(folder / below)
        return Trial(seed, rate, below, run)

    variants = [
        Variant(
            text=entry["variant"],
            trials=[trial(r["seed"], entry["learning_rate"], r["folder"]) for r in entry["runs"]],
            grid=[trial(plan["seeds"][0], g["rate"], g["folder"]) for g in entry["grid"]],
            rate=entry["learning_rate"],
        )
        for entry in plan["variants"]
    ]
    return Comparison(plan, variants)
