"""The personal models of a run, in the folder `personal` of its run folder: how all of them score, and a file
for each client that is not on a machine of its own. The folder is there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedhl.errors import UserError
from fedhl.federation.engine import IN_PROCESS, Engine
from fedhl.federation.federation import Federation
from fedhl.federation.personal import Personal
from fedhl.federation.scores import over_models, said
from fedhl.files import file_name, json_text, sha256, sha256_of, whole_folder
from fedhl.lora import LoRA
from fedhl.record import PERSONAL, SCORES, failure, read_metrics, read_scores, round_name
from fedhl.run.folder import networked, writing
from fedhl.server import Client, ServerState
from fedhl.watch import SILENT, Watcher

Json = dict[str, Any]
MOST_LETTERS = 200
"""Of a client in the name of a file, which has at most 255: a letter beyond ASCII counts as up to twelve."""
SEPARATOR = "::"  # between the parts of a tensor's name; layer names have dots


def keep_personal(
    federation: Federation,
    state: ServerState,
    folder: Path,
    watcher: Watcher = SILENT,
    engine: Engine = IN_PROCESS,
) -> None:
    """Have the personal models of a run whose rounds are done trained and evaluated, unless that is done, and
    write how they score, and those that are in this process. A run that has failed has none."""
    if federation.config.personal is None or failure(read_metrics(folder)):
        return
    origin = origin_of(folder, state)
    known = read_scores(folder)
    if known is not None and known["origin"] == origin:
        return
    began, records = perf_counter(), {}
    with (
        writing(folder),
        whole_folder(
            folder / PERSONAL, folder / f".partial-{PERSONAL}", replace=True, private=True
        ) as staging,
    ):
        for client, personal, record in engine.personal(federation, state, watcher):
            if personal is not None:
                write_model(model_file(staging, client.id), client, personal)
            records[client.id] = record
        if not records:
            raise UserError(
                "no client has made its personal model; the rounds are kept: give the same command again"
            )
        scores = over_models(records, federation.objective)
        scores |= {"seconds": perf_counter() - began, "round": state.round, "origin": origin}
        (staging / SCORES).write_text(json_text(scores, indent=1) + "\n", encoding="utf-8")
    watcher.say(said(scores))


def origin_of(folder: Path, state: ServerState) -> str:
    """The sha256 of the checkpoint from which the personal models start."""
    return sha256(folder / "state" / round_name(state.round) / "state.safetensors")


def there(folder: Path) -> Json:
    """`read_scores`. Raises UserError if there are no personal models."""
    scores = read_scores(folder)
    if scores is None:
        raise UserError(
            f"{folder} has no personal models; a run makes them at its end if its config has the group "
            "`personal`"
        )
    return scores


def model_file(place: Path, client: str) -> Path:
    """The file of a client's personal model in the folder of all."""
    name = file_name(client)
    if len(name) > MOST_LETTERS:
        name = f"{name[:MOST_LETTERS]}-{sha256_of(client)[:16]}"
    return place / f"{name}.safetensors"


def write_model(file: Path, client: Client, personal: Personal) -> None:
    """Write what the client alone has: `layer::LAYER::A` and `::B`, `magnitudes::LAYER`, `head::PARAMETER`;
    what it started from is in the checkpoint of the last round."""
    tensors = {
        SEPARATOR.join(("layer", layer, factor)): getattr(lora, factor).contiguous()
        for layer, lora in personal.adapter.items()
        for factor in ("A", "B")
    }
    for kind in ("magnitudes", "head"):
        part = getattr(personal, kind)
        tensors |= {SEPARATOR.join((kind, name)): x.contiguous() for name, x in part.items()}
    # one entry: of several the library writes any one first, and the bytes would differ
    save_file(tensors, file, metadata={"client": client.id})


def read_model(folder: Path, client: Client, state: ServerState) -> Personal:
    """The personal model of this client of the run in `folder`. Raises UserError if there is none, if it
    cannot be read, and if it has started from another state than this one."""
    if there(folder)["origin"] != origin_of(folder, state):
        raise UserError(
            f"{folder}: the personal models belong to another state than that of round {state.round}; "
            f"fedhl resume {folder} makes them again"
        )
    file = model_file(folder / PERSONAL, client.id)
    if not file.exists() and networked(folder):
        raise UserError(
            f"the personal model of client {client.id!r} is on the client's own machine, whose log names the "
            "folder; it is exported there"
        )
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}; restore the file") from None
    if metadata.get("client") != client.id:
        raise UserError(
            f"{file} is the personal model of another client, {metadata.get('client')!r}, whose name is "
            "the same to this file system"
        )
    factors: dict[str, dict[str, Any]] = {}
    parts: dict[str, dict[str, Any]] = {"magnitudes": {}, "head": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(SEPARATOR)
        if kind == "layer":
            layer, _, factor = name.rpartition(SEPARATOR)
            factors.setdefault(layer, {})[factor] = tensor
        else:
            parts[kind][name] = tensor
    adapter = {layer: LoRA(scale=client.scale, **both) for layer, both in sorted(factors.items())}
    return Personal(adapter, parts["magnitudes"], parts["head"])
