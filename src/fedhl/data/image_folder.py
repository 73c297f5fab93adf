"""Folders of images: an image lies in the folder of its label, and that may lie in the folder of a client."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from fedhl.errors import UserError
from fedhl.files import sha256, sha256_of
from fedhl.names import listed
from fedhl.task.rows import Row, Rows

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and below, in the order of their paths; hidden ones are left out."""
    found = [
        path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in ENDINGS
    ]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


def read_images(folder: Path, source: str, limit: int | None) -> Rows:
    """A row for each image: `image`, its path in the folder, `label`, and `client` where images lie as
    CLIENT/LABEL/NAME.png. Raises UserError for images that lie in no folder, or not all alike."""
    images = images_in(folder)
    depths = sorted({len(path.parts) for path in images})
    if depths[0] < 2 or len(depths) > 1:
        odd = [path.as_posix() for path in images if len(path.parts) == depths[0]]
        raise UserError(
            f"{source}: images lie as LABEL/NAME.png or as CLIENT/LABEL/NAME.png, all in one way, but "
            f"{listed(odd, 3)} and others do not; name a table (.csv, .jsonl) with a field of paths instead"
        )
    return [Row(fields(path), k) for k, path in enumerate(islice(images, limit))]


def fields(path: Path) -> dict[str, str]:
    *owner, label, _ = path.parts
    return {"image": path.as_posix(), "label": label} | (
        {"client": "/".join(owner)} if owner else {}
    )


def hash_images(folder: Path, images: Sequence[Path]) -> str:
    """The sha256 over the paths and the contents of these images."""
    return sha256_of("".join(f"{path.as_posix()}\0{sha256(folder / path)}\n" for path in images))
