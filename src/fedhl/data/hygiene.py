"""What is no mistake in the rows, and yet worth a look before anything is trained."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from fedhl.config import Config
from fedhl.data.shards import Shards
from fedhl.names import listed, plural
from fedhl.task.labels import label_names
from fedhl.task.rows import Rows, short_place


def remarks(config: Config, shards: Shards) -> Iterator[str]:
    """Warnings, a line each: labels of one row, labels that look alike, texts of blanks, and texts that are
    held out and trained on."""
    training = [shards.rows[k] for k in in_order(list(shards.clients.values()))]
    own = [*shards.client_held_out.values(), shards.validation]
    unseen = [shards.rows[k] for k in in_order(own)] + shards.held_out
    classes = config.task.classes(training, config.data.source)
    if classes is not None:
        yield from of_labels(label_names(classes))
    task = config.task
    blank = [k for k, row in enumerate(training) if not all(map(str.strip, task.learnt(row)))]
    if blank:
        yield (
            f"warning: {plural(len(blank), 'training row')} {have(blank)} a text of nothing but blanks: "
            f"{places(training, blank)}"
        )
    known = {task.texts(row) for row in training}
    seen = [k for k, row in enumerate(unseen) if task.texts(row) in known]
    if seen:
        yield (
            f"warning: {len(seen):,} of {plural(len(unseen), 'held-out row')} {have(seen)} the text of a "
            f"training row, so that the scores are too good: {places(unseen, seen)}"
        )


def of_labels(names: Sequence[str]) -> Iterator[str]:
    counts = Counter(names)
    alone = sorted(name for name, count in counts.items() if count == 1)
    if alone:
        yield (
            f"warning: {plural(len(alone), 'label')} {have(alone)} one training row alone: "
            f"{listed(map(repr, alone))}"
        )
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(counts):
        alike["".join(name.split()).casefold()].append(name)
    groups = [group for group in alike.values() if len(group) > 1]
    if groups:
        shown = (
            " and ".join(f"{name!r} ({counts[name]:,})" for name in group[:3]) for group in groups
        )
        yield f"warning: labels that differ by case or blanks only: {listed(shown, 3)}"


def in_order(parts: Sequence[np.ndarray]) -> list[int]:
    """The indices of all parts, in the order of the source."""
    return np.sort(np.concatenate(parts)).tolist() if parts else []


def places(rows: Rows, found: Sequence[int]) -> str:
    return listed(short_place(rows, k) for k in found)


def have(found: Sequence[object]) -> str:
    return "has" if len(found) == 1 else "have"
