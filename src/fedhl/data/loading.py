"""Read labelled text from a file, an installed package or the hub, and hold rows out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedhl.data.files import read_file, reader_of
from fedhl.data.image_folder import hash_images, images_in, read_images
from fedhl.errors import UserError, in_one_line
from fedhl.files import sha256
from fedhl.locate import locate
from fedhl.task.rows import Row, Rows

T = TypeVar("T")
Indices = NDArray[np.int64]


def load_rows(
    source: str, *, split: str | None = None, limit: int | None = None, encoding: str = "utf-8"
) -> Rows:
    """The rows of a data source as dictionaries, in the order of the file.

    Files: .jsonl, .ndjson, .json (an array of objects), .csv and .tsv (with a header), all of them
    also with .gz, and .parquet. Anything in a CSV is text; an empty cell is None. A folder of images has a
    row for each of them, as `fedhl.data.image_folder` says. A hub id
    (`owner/name` or `owner/name:config`) is read with `datasets`; `split` defaults to "train".
    `limit` keeps the first rows only, which are no random sample; `encoding` is that of text files.

    Raises UserError for a missing, unreadable, malformed (with its line) or empty source.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}, expected at least 1; leave it out for all rows")
    path, most = locate(source), None if limit is None else min(limit, sys.maxsize)
    if path is None:
        return read_hub(source, split or "train", most)
    if split is not None:
        raise UserError(
            f"{source}: a local file has no splits; remove split: {split!r}, or name another file"
        )
    if path.is_dir() and images_in(path):
        return read_images(path, source, most)
    rows = read_file(path, source, most, encoding)
    if not rows:
        raise UserError(f"{source}: no rows in this file")
    return rows


def fingerprint(source: str) -> str:
    """The identity of the data: "sha256:..." of a local file or a folder of images, "hub:" and the revision
    for a hub id. Of a table that names images by their paths it is that of the table alone."""
    path = locate(source)
    if path is None:
        return f"hub:{hub_revision(source)}"
    if path.is_dir() and (images := images_in(path)):
        return f"sha256:{hash_images(path, images)}"
    reader_of(path, source)
    return f"sha256:{sha256(path)}"


def hold_out(
    n: int,
    *,
    fraction: float | None = None,
    count: int | None = None,
    seed: int,
    strata: Sequence[Any] | None = None,
) -> tuple[Indices, Indices]:
    """Split row indices 0..n-1 at random into (training, held out), both sorted.

    `fraction` or `count` says how many rows are held out. With `strata` (a value per row) every
    value gives its share, rounded by largest remainder, so that the total is exact; ties are
    broken by the seed.

    Raises UserError when either side would be empty.
    """
    if (fraction is None) == (count is None):
        raise UserError("hold out either a fraction of the rows or a count of rows, not both")
    if strata is not None and len(strata) != n:
        raise ValueError(f"strata has {len(strata)} values for {n} rows")
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"the held-out fraction is {fraction}, expected between 0 and 1")
    held_count = round(fraction * n) if fraction is not None else int(count or 0)
    if not 0 < held_count < n:
        raise UserError(
            f"holding out {held_count} of {n} rows leaves nothing "
            f"{'to evaluate' if held_count <= 0 else 'to train on'}; "
            f"hold out between 1 and {n - 1}, or use more data"
        )
    names = [""] * n if strata is None else [str(value) for value in strata]
    _, group, sizes = np.unique(names, return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    held = np.concatenate(
        [
            rng.permutation(np.flatnonzero(group == index))[:quota]
            for index, quota in enumerate(apportion(sizes, held_count, rng))
        ]
    )
    held.sort()
    return np.setdiff1d(np.arange(n), held), held


def apportion(sizes: NDArray[np.int64], total: int, rng: np.random.Generator) -> Indices:
    """Integers that sum to `total`, proportional to `sizes` by largest remainder."""
    # Exact integers: with floats, equal remainders would differ by rounding.
    quotas, remainders = np.divmod(sizes * total, sizes.sum())
    surplus = total - int(quotas.sum())
    order = np.lexsort((rng.random(len(sizes)), -remainders))
    quotas[order[:surplus]] += 1
    return quotas


# --- the hub ------------------------------------------------------------------------------------


def read_hub(source: str, split: str, limit: int | None) -> Rows:
    import datasets

    dataset = from_hub(
        source, lambda name, config: datasets.load_dataset(name, config, split=split)
    )
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if not len(dataset):
        raise UserError(f"{source}: split {split!r} has no rows")
    for name, feature in dataset.features.items():
        if isinstance(
            feature, datasets.Image
        ):  # as the bytes of its file, to be decoded by the task
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    try:
        rows = dataset.to_list()
    except Exception as error:  # of a value that Python cannot hold
        raise UserError(
            f"{source}: split {split!r} cannot be read ({in_one_line(error)})"
        ) from error
    return [Row(row, number) for number, row in enumerate(rows)]


def hub_revision(source: str) -> str:
    import datasets

    return from_hub(source, datasets.load_dataset_builder).hash or "unknown"


def from_hub(source: str, load: Callable[[str, str | None], T]) -> T:
    """`load(name, config)`. Raises UserError for an error between here and the hub."""
    name, _, config = source.partition(":")
    try:
        return load(name, config or None)
    except Exception as error:  # the library raises nearly everything here
        raise UserError(
            f"no file {source!r} here, and the hub dataset of that name cannot be loaded: "
            f"{in_one_line(error)}"
        ) from error
