"""The rows of each client: every row goes to exactly one client, reproducibly from a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedhl.errors import UserError
from fedhl.names import one_line

if TYPE_CHECKING:
    from rich.table import Table

Indices = NDArray[np.int64]
Partition = dict[str, Indices]

MAX_DRAWS = 1000
MAX_LABEL_COLUMNS = 8
MAX_CLIENT_ROWS, FIRST_CLIENTS, LAST_CLIENTS = 30, 10, 3


def iid(n: int, clients: int, seed: int) -> Partition:
    """Rows 0..n-1 shuffled and dealt out evenly: client sizes differ by at most one.

    Raises UserError when there are fewer rows than clients.
    """
    check_sizes(n, clients, 1)
    shuffled = np.random.default_rng(seed).permutation(n)
    return named_clients([np.sort(part) for part in np.array_split(shuffled, clients)])


def dirichlet(
    labels: Sequence[Any], clients: int, alpha: float, seed: int, min_examples: int = 1
) -> Partition:
    """Label skew: the rows of each label are shared out by `π ~ Dirichlet(α, ..., α)`.

    A small α gives every client few labels, a large one approaches `iid`. All shares are drawn
    again until every client has `min_examples` rows. (Hsu et al. 2019; Li et al. 2022.)

    Raises UserError when none of 1000 draws gives that, or there are too few rows.
    """
    check_sizes(len(labels), clients, min_examples)
    if not (alpha > 0 and np.isfinite(alpha)):
        raise UserError(f"Dirichlet alpha is {alpha}, expected a number above 0, e.g. 0.5")
    _, group, totals = np.unique([str(v) for v in labels], return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    cuts = draw_cuts(totals, clients, alpha, min_examples, rng)
    owned: list[list[Indices]] = [[] for _ in range(clients)]
    for label, positions in enumerate(cuts):
        rows = rng.permutation(np.flatnonzero(group == label))
        for client, part in enumerate(np.split(rows, positions[:-1])):
            owned[client].append(part)
    return named_clients([np.sort(np.concatenate(parts)) for parts in owned])


def by_column(values: Sequence[Any]) -> Partition:
    """Natural clients: one per distinct value, named `str(value)`, sorted by name."""
    if not len(values):
        raise UserError("there are no rows to split between clients")
    for row, value in enumerate(values):
        if value is None:
            raise UserError(
                f"row {row} (counted from 0) names no client: its value is empty; "
                "fill it in or remove the row"
            )
        if not one_line(str(value)):
            raise UserError(
                f"row {row} (counted from 0): the client {str(value)!r:.60} has a control character or a "
                "line break in its name; clean the data"
            )
    names, group = np.unique([str(value) for value in values], return_inverse=True)
    return {str(name): np.flatnonzero(group == index) for index, name in enumerate(names)}


def partition_table(
    partition: Mapping[str, Indices],
    labels: Sequence[Any] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Table:
    """A table of the clients: their ranks, with `ranks`; their numbers of rows; and, with `labels` (one per
    row), their label counts.

    More than 8 labels: the number of labels, the commonest and its share instead. More than 30
    clients: the first 10, the last 3, and the smallest, median and largest size.

    Raises UserError when a client has no rows.
    """
    from rich.markup import escape
    from rich.table import Table

    if empty := [client for client, rows in partition.items() if not len(rows)]:
        raise UserError(f"client {empty[0]!r} has no rows; use fewer clients or more data")
    texts = None if labels is None else [str(label) for label in labels]
    names = sorted(set(texts or []))
    wide = len(names) > MAX_LABEL_COLUMNS
    sizes = [len(rows) for rows in partition.values()]
    table = Table(title=f"{len(partition)} clients, {sum(sizes)} examples", title_justify="left")
    table.add_column("client")
    for heading in [
        *(["rank"] if ranks else []),
        "examples",
        *(["labels", "top label", "share"] if wide else names),
    ]:
        table.add_column(escape(heading), justify="right")
    lines = [
        [client, *([str(ranks[client])] if ranks else []), *client_cells(rows, texts, names, wide)]
        for client, rows in partition.items()
    ]
    many = len(lines) > MAX_CLIENT_ROWS
    for cells in [*lines[:FIRST_CLIENTS], ["..."], *lines[-LAST_CLIENTS:]] if many else lines:
        table.add_row(*map(escape, cells))
    if many:
        table.add_section()
        median = f"{np.median(sizes):g}"
        ends = f"{min(sizes)} / {median} / {max(sizes)}"
        table.add_row("min / median / max", *([""] if ranks else []), ends)
    return table


def client_cells(
    rows: Indices, labels: list[str] | None, names: list[str], wide: bool
) -> list[str]:
    cells = [str(len(rows))]
    if labels is None:
        return cells
    counts = Counter(labels[row] for row in rows)
    if not wide:
        return cells + [str(counts[name]) for name in names]
    top = min(counts, key=lambda name: (-counts[name], name))
    return [*cells, str(len(counts)), top, f"{counts[top] / len(rows):.0%}"]


def draw_cuts(
    totals: NDArray[np.int64],
    clients: int,
    alpha: float,
    min_examples: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """End positions (labels, clients) that cut each label's rows into the clients' parts."""
    best = (-1, 0)  # the largest smallest client seen, and its index
    for _ in range(MAX_DRAWS):
        shares = rng.dirichlet(np.full(clients, alpha), size=len(totals))
        cuts = np.rint(np.cumsum(shares, axis=1) * totals[:, None]).astype(np.int64)
        cuts[:, -1] = totals  # rounding must lose no row
        sizes = np.diff(cuts, axis=1, prepend=0).sum(axis=0)
        smallest = int(sizes.argmin())
        if sizes[smallest] >= min_examples:
            return cuts
        best = max(best, (int(sizes[smallest]), smallest))
    raise UserError(
        f"no Dirichlet split with alpha {alpha:g} gives all {clients} clients at least "
        f"{min_examples} examples: in the best of {MAX_DRAWS} draws {client_name(best[1], clients)!r} "
        f"has {best[0]}; raise alpha, use fewer clients or more rows, or lower min_examples"
    )


def check_sizes(n: int, clients: int, min_examples: int) -> None:
    if clients < 1:
        raise UserError(f"the number of clients is {clients}, expected at least 1")
    if min_examples < 1:
        raise UserError(
            f"min_examples is {min_examples}, expected at least 1, since a client without rows cannot train"
        )
    if n < clients * min_examples:
        raise UserError(
            f"{n} rows cannot give {clients} clients {min_examples} or more each; "
            "use fewer clients or more rows"
        )


def named_clients(parts: Sequence[Indices]) -> Partition:
    return {client_name(index, len(parts)): rows for index, rows in enumerate(parts)}


def client_name(index: int, clients: int) -> str:
    """ "client-07" of 100: padded, so that names sort as numbers do."""
    return f"client-{index:0{len(str(clients - 1))}d}"
