"""The record in a run folder: its rounds, its summary, and the best round.

The process that wrote the files may have been killed, or may still be writing. Only plain files are read
here; `fedhl.run.checkpoint` reads the states beside them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fedhl.errors import UserError

Json = dict[str, Any]


# --- names of rounds ----------------------------------------------------------------------------


def round_name(round: int) -> str:
    """`round-000012`: the name of a file or folder of one round; names sort as rounds do."""
    return f"round-{round:06d}"


def rounds_in(folder: Path, suffix: str = "") -> dict[int, Path]:
    """The files or folders of single rounds in `folder`, by round, the newest first; `suffix`: their
    ending."""
    known = {
        int(path.name.removeprefix("round-").removesuffix(suffix)): path
        for path in folder.glob(f"round-[0-9]*{suffix}")
    }
    return dict(sorted(known.items(), reverse=True))


# --- reading the record -------------------------------------------------------------------------


def read_metrics(folder: Path) -> list[Json]:
    """The lines of metrics.jsonl, one per round, without a last line that a killed process left incomplete.
    Empty before the first round.

    Raises UserError for any other malformed line, naming it.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[-1] == "":  # what follows the last newline
        lines.pop()
    rounds: list[Json] = []
    for number, text in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(lines):  # the process was killed while writing it
                break
            raise UserError(
                f"{where}: not JSON ({error}); only the last line may be incomplete"
            ) from None
        if not isinstance(line, dict) or type(line.get("round")) is not int:
            raise UserError(
                f'{where}: expected an object with an integer "round", got {text[:60]!r}'
            )
        if rounds and line["round"] <= rounds[-1]["round"]:
            raise UserError(
                f"{where}: round {line['round']} after round {rounds[-1]['round']}; "
                "rounds must increase from line to line"
            )
        rounds.append(line)
    return rounds


def read_summary(folder: Path) -> Json:
    """The summary of a run. Raises UserError if it is missing or unreadable."""
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UserError(
            f"{folder} has no readable summary.json ({error}); was a run started in this folder?"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON ({error}); `fedhl resume {folder}` writes it anew"
        ) from None
    if not isinstance(summary, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(summary).__name__}")
    return summary


PERSONAL, SCORES = "personal", "scores.json"
"""The folder of the personal models in a run folder, and in it the file of how they score."""
OWN_MODEL = "model.safetensors"
"""The file of a personal model on its client's own machine (see `fedhl.export.own`)."""


def is_own(folder: Path) -> bool:
    """Whether a folder is that of a personal model on its client's own machine, and not of a run."""
    return (folder / OWN_MODEL).is_file()


def read_scores(folder: Path) -> Json | None:
    """How the personal models of a run score; None if there are none yet."""
    file = folder / PERSONAL / SCORES
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


# --- how a run ended ----------------------------------------------------------------------------

FINISHED, FAILED = "finished", "failed"
"""The statuses of a run whose rounds are all done: it has learnt, or nothing can be made of it."""


def failure(rounds: Sequence[Json]) -> str | None:
    """The reason why nothing can be made of a run with these rounds, the lines of its metrics: no update
    counted, or its last evaluation is not finite. None if there is no such reason."""
    trained = [line for line in rounds if line["round"]]
    last = next((line for line in reversed(rounds) if line.get("evaluation")), None)
    if trained and not any(line["clients"] for line in trained):
        reasons = Counter(entry["reason"] for line in trained for entry in line["refused"])
        most = [f"{count} times {reason!r}" for reason, count in reasons.most_common(3)]
        return (
            f"no update was accepted in any of the {len(trained)} rounds, so that nothing was learnt: "
            + (", ".join(most) if most else "no client answered")
        )
    if last and not sound(last["evaluation"]):
        return f"training diverged: the loss is not finite after round {last['round']}"
    return None


def sound(evaluation: Mapping[str, Any]) -> bool:
    """Whether the losses of an evaluation are finite."""
    return all(loss is not None and math.isfinite(loss) for loss in measured(evaluation))


def measured(evaluation: Mapping[str, Any]) -> list[float | None]:
    """The losses of an evaluation, of the models by which a run is judged."""
    clients = evaluation.get("clients") or {}
    models = (evaluation.get("full"), evaluation.get("truncated"), clients.get("mean"))
    return [metrics.get("loss") for metrics in models if metrics]


# --- what a round has trained ---------------------------------------------------------------------


def training_loss(line: Mapping[str, Any]) -> float | None:
    """`Σ n_i loss_i / Σ n_i`: the mean training loss over the rows of the clients that count in a round. None
    if no client counts, or if a loss is null."""
    clients = line["clients"]
    if not clients or any(client["loss"] is None for client in clients):
        return None
    rows = sum(client["examples"] for client in clients)
    return sum(client["loss"] * client["examples"] for client in clients) / rows


# --- metrics ------------------------------------------------------------------------------------

Unit = Literal["share of rows", "share", "number"]
"""What a metric is. `share of rows`: the share of the rows for which something is true, such as the accuracy
of a classifier; its interval is Wilson's. `share`: another number from 0 to 1, such as an accuracy over
tokens, since the tokens of a row are no independent draws. `number`: anything else, such as a loss. People
read shares in percent."""


def unit_of(evaluation: Mapping[str, Any]) -> Unit:
    """What the metric is by which this evaluation is judged; its name tells where an evaluation of an older
    run does not."""
    return evaluation.get("unit") or unit_by_name(evaluation["metric"])


def unit_by_name(metric: str) -> Unit:
    """What a metric of this name is, if nobody says."""
    known: dict[str, Unit] = {"accuracy": "share of rows", "f1": "share"}
    return known.get(metric) or "number"


# --- which round is best ------------------------------------------------------------------------


def headline(evaluation: Mapping[str, Any]) -> float | None:
    """The number by which a round is judged: of the full model, else of the model of the top rank, else the
    mean over the clients."""
    clients = evaluation.get("clients")
    metrics = evaluation.get("full") or evaluation.get("truncated") or (clients and clients["mean"])
    return metrics and metrics[evaluation["metric"]]


def more_is_better(evaluation: Mapping[str, Any]) -> bool:
    """Whether more of the metric by which this evaluation is judged is better. An evaluation of an older run,
    which does not say, is judged by an accuracy or a loss."""
    return evaluation.get("greater", evaluation["metric"] == "accuracy")


def better(best: Json | None, evaluation: Mapping[str, Any], round: int) -> Json | None:
    """The better of the best round so far and this one, as `{"round": ..., "value": ...}`; of equal
    ones, the earlier."""
    value = headline(evaluation)
    if value is None or not math.isfinite(value):
        return best
    sign = 1 if more_is_better(evaluation) else -1
    if best is None or sign * value > sign * best["value"]:
        return {"round": round, "value": value}
    return best
