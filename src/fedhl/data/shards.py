"""From a config to the rows of every client: read, split, partition, tokenise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedhl.config import Config
from fedhl.config.inputs import ColumnPartition, DirichletPartition
from fedhl.data.label_groups import split_labels
from fedhl.data.loading import Indices, fingerprint, hold_out, load_rows
from fedhl.data.partition import by_column, dirichlet, iid
from fedhl.errors import UserError
from fedhl.names import listed, plural, unknown
from fedhl.seeds import derive
from fedhl.task.examples import Encoded
from fedhl.task.labels import labels_of, named_labels, sorted_labels
from fedhl.task.rows import Rows, column, located

CLIENTS_OWN = "clients' own"
"""The begin of the hash of data that the clients have, and that the server does not know."""


@dataclass(frozen=True)
class Shards:
    """The rows, and their owners.

    `clients` and `client_held_out`: the indices in `rows` of each client's training and held-out rows;
    `held_out`: the server's held-out rows; `validation`: the indices of the server's rows for the choice of
    settings; `labels`: the names of the classes, in the order of their ids; `tasks`: the ids of each task's
    labels, if labels arrive over time; `pooled`: the number of clients whose training rows the one client of
    that name has, 0 if each has its own.
    """

    rows: Rows
    clients: dict[str, Indices]
    client_held_out: dict[str, Indices]
    held_out: Rows
    validation: Indices
    labels: list[str] | None
    hash: str
    tasks: Sequence[Sequence[int]] = ()
    pooled: int = 0


@dataclass(frozen=True)
class Tokenised:
    """The rows of `Shards` as model inputs; `rows`: the indices in `Shards.rows` of those in `train`. Of all
    `count` rows, `dropped` had no room for a completion, and `truncated` lost their end."""

    train: dict[str, list[Any]]
    rows: dict[str, Indices]
    client_held_out: dict[str, list[Any]]
    held_out: list[Any]
    validation: list[Any]
    count: int
    dropped: int
    truncated: int


def read(config: Config) -> Shards:
    """Read and partition the data. Raises UserError, naming the setting, the row or the client."""
    data = config.data
    rows = rows_where(config, load_rows(data.source, split=data.split, encoding=data.encoding))
    check_fields(config, rows)  # before rows are drawn, while their numbers are those of the file
    if data.limit is not None and data.limit < len(rows):
        rng = np.random.default_rng(derive(config.seed, "limit"))
        rows = [rows[k] for k in np.sort(rng.permutation(len(rows))[: data.limit])]
    classes = config.task.classes(rows, data.source)
    training, held_out, hash = np.arange(len(rows)), [], fingerprint(data.source)
    rule = data.held_out
    if rule is not None and rule.source is not None:
        held_out = load_rows(
            rule.source, split=rule.split, limit=rule.count, encoding=data.encoding
        )
        hash += f" {fingerprint(rule.source)}"
    elif rule is not None and rule.split is not None:
        held_out = rows_where(config, load_rows(data.source, split=rule.split))[: rule.count]
    elif rule is not None:
        training, held = hold_out(
            len(rows),
            fraction=rule.fraction,
            count=rule.count,
            seed=derive(config.seed, "held out"),
            strata=classes,
        )
        held_out = [rows[k] for k in held]
    validation: Indices = np.arange(0)
    if data.validation is not None:
        training, validation = hold_out_validation(config, training, classes)
    labels, names = None, config.task.labels(rows, data.source)
    if names is not None:
        with located(rows, data.source):
            labels = labels_of(names, training)
    clients = {
        name: training[part] for name, part in partition_training(config, rows, training).items()
    }
    client_held_out: dict[str, Indices] = {}
    if config.evaluation.client_fraction:
        for name, part in clients.items():
            kept, held = hold_out_client(config, name, part)
            clients[name], client_held_out[name] = kept, held
    shards = Shards(rows, clients, client_held_out, held_out, validation, labels, hash)
    return with_tasks(config, shards) if config.tasks else shards


def client_shards(
    config: Config, client: str, source: str, fields: Sequence[str] | None = None
) -> Shards:
    """The shards of a client with data of its own: the rows of `source` that `data.where` selects, without
    the rows that it holds out. `fields`: the fields that a config may use (default: all). `labels` of the
    result are those of its own rows. Raises UserError as `read` does."""
    data = config.data.model_copy(update={"source": source, "split": None})
    config = config.model_copy(update={"data": data})
    rows = load_rows(source, encoding=data.encoding)
    if fields is not None:
        for row in rows:
            for name in row.keys() - set(fields):
                del row[name]
    rows = rows_where(config, rows)
    check_fields(config, rows)
    part, held = np.arange(len(rows)), {}
    if config.evaluation.client_fraction:
        part, held[client] = hold_out_client(config, client, part)
    names = config.task.labels(rows, source)
    labels = None if names is None else sorted_labels({name for k in part for name in names[k]})
    return Shards(rows, {client: part}, held, [], np.arange(0), labels, fingerprint(source))


def server_shards(config: Config, labels: Sequence[str] | None) -> Shards:
    """The shards of a server whose clients have data of their own: held-out rows, if `data.held_out` names a
    source. Raises UserError if the held-out rows would be a part of `data.source`."""
    rule, nobody = config.data.held_out, np.arange(0)
    names = None if labels is None else list(labels)
    if rule is None:
        return Shards([], {}, {}, [], nobody, names, CLIENTS_OWN)
    if rule.source is None:
        raise UserError(
            "data.held_out: when clients have their own data, the server's held-out rows need a source "
            "of their own; set data.held_out.source, or data.held_out: null"
        )
    encoding = config.data.encoding
    held = load_rows(rule.source, split=rule.split, limit=rule.count, encoding=encoding)
    return Shards([], {}, {}, held, nobody, names, f"{CLIENTS_OWN} {fingerprint(rule.source)}")


def with_tasks(config: Config, shards: Shards) -> Shards:
    """The shards with the labels of each task. Raises UserError if the labels do not fit the config, if no
    client has training rows of a task, or if the server has no held-out rows of it."""
    rule, labels = config.tasks, shards.labels
    assert rule is not None and labels is not None
    if rule.count is not None and len(labels) < 2 * rule.count:
        raise UserError(
            f"tasks.count: {rule.count} tasks of at least two labels each need {2 * rule.count} "
            f"labels, the data has {len(labels)}; lower tasks.count"
        )
    if rule.count is not None:
        groups = split_labels(len(labels), rule.count, config.seed)
    else:
        groups = ids_by_task(rule.groups or (), labels)

    def found(rows: Rows) -> set[int]:
        classes = config.task.classes(rows, config.data.source) or []
        return set(named_labels(classes, rows, config.data.source, labels)[0])

    training = found([shards.rows[k] for part in shards.clients.values() for k in part])
    held_out = found(shards.held_out)
    for group in groups:
        names = listed(labels[k] for k in group)
        if not training & set(group):
            raise UserError(
                f"tasks: no client has training rows of the task with labels {names}; change "
                "the tasks or the data"
            )
        if held_out and not held_out & set(group):
            raise UserError(
                f"tasks: the server has no held-out row of the task with labels {names}; hold out "
                "more rows (data.held_out)"
            )
    return replace(shards, tasks=groups)


def ids_by_task(groups: Sequence[Sequence[Any]], labels: Sequence[str]) -> list[list[int]]:
    """`tasks.groups` as label ids. Raises UserError unless each label of the data is in a group."""
    named = [[str(label) for label in group] for group in groups]
    everything = [name for group in named for name in group]
    for name in everything:
        if name not in labels:
            raise UserError(f"tasks.groups: {unknown('label', name, labels)}")
    if missing := [name for name in labels if name not in everything]:
        raise UserError(f"tasks.groups: label {missing[0]!r} is in no task; add it to one")
    return [sorted(labels.index(name) for name in group) for group in named]


def check_fields(config: Config, rows: Rows) -> None:
    """Raises UserError unless every row has the fields of the task, with texts in the text fields."""
    where = config.data.where
    config.task.check(rows, config.data.source + (f" (the rows where {where})" if where else ""))


def rows_where(config: Config, rows: Rows) -> Rows:
    """The rows of `data.source` that `data.where` selects."""
    for field, wanted in config.data.where.items():
        rows = rows_with(rows, field, wanted, config.data.source)
    return rows


def rows_with(rows: Rows, field: str, wanted: Any, source: str) -> Rows:
    """The rows whose `field` has the value `wanted`, or one of these values. Raises UserError if there is no
    such row."""
    values = {str(value) for value in (wanted if isinstance(wanted, list) else [wanted])}
    found = [str(value) for value in column(rows, field, source)]
    chosen = [row for row, value in zip(rows, found, strict=True) if value in values]
    if not chosen:
        seen = sorted(set(found))
        raise UserError(
            f"data.where: no row of {source} has {field} {' or '.join(sorted(values))}; its values are "
            f"{listed(seen)}"
        )
    return chosen


def partition_training(config: Config, rows: Rows, training: Indices) -> dict[str, Indices]:
    """Each client's rows, as positions in `training`."""
    rule, source = config.partition, config.data.source
    seed = derive(config.seed, "partition")
    if isinstance(rule, ColumnPartition):
        names = column(rows, rule.column, source)
        lost = {str(name) for name in names} - {str(names[k]) for k in training}
        if lost:
            raise UserError(
                f"partition.column: the server holds out every row of client {min(lost)!r}, so that it has "
                "nothing to train on; hold out fewer rows (data.held_out), or give the client more"
            )
        return by_column([names[k] for k in training])
    if isinstance(rule, DirichletPartition):
        by = rule.by or config.task.class_field
        if by is None:
            raise UserError(
                f"partition.by is missing: a Dirichlet split of {config.task.kind} rows needs a field to "
                "split by"
            )
        values = column(rows, by, source)
        skewed = [values[k] for k in training]
        return dirichlet(skewed, rule.clients, rule.alpha, seed, rule.min_examples)
    return iid(len(training), rule.clients, seed)


def hold_out_validation(
    config: Config, training: Indices, classes: Sequence[Any] | None
) -> tuple[Indices, Indices]:
    """The training rows as (training, validation)."""
    kept, held = hold_out(
        len(training),
        count=config.data.validation,
        seed=derive(config.seed, "validation"),
        strata=None if classes is None else [classes[k] for k in training],
    )
    return training[kept], training[held]


def hold_out_client(config: Config, client: str, part: Indices) -> tuple[Indices, Indices]:
    """A client's rows as (training, held out)."""
    fraction = config.evaluation.client_fraction
    if round(fraction * len(part)) in (0, len(part)):
        raise UserError(
            f"evaluation.client_fraction: client {client!r} has {len(part)} rows, and holding out "
            f"{fraction:g} of them leaves one side empty; change the fraction (its default is 0.1 when "
            "data.held_out is null; 0: none), or give every client more rows (in a Dirichlet split with "
            "partition.min_examples)"
        )
    seed = derive(config.seed, "client held out", client)
    kept, held = hold_out(len(part), fraction=fraction, seed=seed)
    return part[kept], part[held]


def tokenise(
    config: Config,
    shards: Shards,
    processor: Any,
    complete: Callable[[Encoded], Encoded] = lambda encoded: encoded,
) -> Tokenised:
    """Model inputs for all rows, each tokenised once. `complete` is given the model inputs with the numbers
    of their rows, and returns them, with what the base model has to add. It raises RowError if the model
    cannot read a row."""
    wanted = [*shards.clients.values(), *shards.client_held_out.values(), shards.validation]
    used = np.sort(np.concatenate(wanted))
    source = config.data.source
    encoded = Encoded([], [], 0)
    if len(used):
        encoded = config.task.encode(
            [shards.rows[k] for k in used], source, processor, shards.labels
        )
    encoded = replace(encoded, rows=[int(used[j]) for j in encoded.rows])
    with located(shards.rows, source):
        encoded = complete(encoded)
    by_row = dict(zip(encoded.rows, encoded.examples, strict=True))
    held_source = (config.data.held_out and config.data.held_out.source) or source
    held = Encoded([], [], 0)
    if shards.held_out:
        held = config.task.encode(shards.held_out, held_source, processor, shards.labels)
        with located(shards.held_out, held_source):
            held = complete(held)
        if not held.examples:
            raise UserError(
                f"data.held_out: none of the rows of {held_source} fits task.max_length = "
                f"{config.task.longest} tokens; raise task.max_length"
            )
    train = {
        name: [by_row[k] for k in part if k in by_row] for name, part in shards.clients.items()
    }
    for name, examples in train.items():
        if not examples:
            raise UserError(
                f"client {name!r} has no row left: the prompts of all its {len(shards.clients[name])} "
                f"rows fill task.max_length = {config.task.longest} tokens; raise task.max_length"
            )
    own = {
        name: [by_row[k] for k in part if k in by_row]
        for name, part in shards.client_held_out.items()
    }
    for name, examples in own.items():
        if not examples:
            raise UserError(
                f"evaluation.client_fraction: none of the {len(shards.client_held_out[name])} rows held "
                f"out of client {name!r} fits task.max_length = {config.task.longest} tokens; raise "
                "the fraction or task.max_length"
            )
    validation = [by_row[k] for k in shards.validation if k in by_row]
    count = len(used) + len(shards.held_out)
    dropped = count - len(by_row) - len(held.examples)
    cut = encoded.truncated + held.truncated
    kept = list(by_row)
    rows = {name: part[np.isin(part, kept)] for name, part in shards.clients.items()}
    return Tokenised(train, rows, own, held.examples, validation, count, dropped, cut)


def losses(config: Config, tokenised: Tokenised) -> Iterator[str]:
    """What the rows lose by `task.max_length`, in words; nothing where they lose nothing."""
    length = f"task.max_length = {config.task.longest}"
    cut, count = tokenised.truncated, tokenised.count
    if cut:
        yield f"{cut:,} of {plural(count, 'row')} ({cut / count:.0%}) cut to {length} tokens"
    if tokenised.dropped:
        yield (
            f"warning: {plural(tokenised.dropped, 'row')} dropped: their prompts leave no room for a "
            f"completion within {length}"
        )
