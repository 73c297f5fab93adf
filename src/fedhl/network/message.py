"""A message: a safetensors file whose metadata has a JSON header and a checksum; nothing is unpickled.

The metadata has one entry, `fedhl`: the sha256 of everything else that has a meaning (the JSON text, the
table of the tensors, and their bytes), a space, and the JSON text of an object. The reader is our own,
since safetensors' readers of bytes do not give the metadata, and since it reads messages from machines that
we do not control: it names the mistake, and its memory is bounded by a small multiple of the size of the
header.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

DTYPES = {
    **{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I8": torch.int8, "I64": torch.int64},
}
"""The types of tensors in messages, by their safetensors names."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WHOLE = 2**53
"""Whole numbers in a header are below this: JSON readers agree on whole numbers only up to here."""
DIMENSIONS = 8
"""The most dimensions of a tensor; no parameter of a model has more."""


class Malformed(ValueError):
    """A message that cannot be accepted; the text is the reason."""


class Limit(NamedTuple):
    """The largest message, in bytes: the size of its safetensors header, and of all its tensors."""

    header: int
    tensors: int


class Entry(NamedTuple):
    """A tensor by its safetensors type and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, eq=False)
class Message:
    """A message whose checksum is right: its header, and its tensors, each of which is read when it is asked
    for.

    `begin`: the position of the tensors in `source`; `offsets`: the position of each tensor, from there.
    """

    source: Path | bytes
    header: Mapping[str, Any]
    tensors: Mapping[str, Entry]
    begin: int
    offsets: Mapping[str, int]

    def __getitem__(self, name: str) -> Tensor:
        entry = self.tensors[name]
        if not entry.size:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        with stream(self.source) as file:
            file.seek(self.begin + self.offsets[name])
            raw = bytearray(file.read(entry.size))
        # a clone, because bytes from a file are aligned otherwise than tensors are, and the last bits of
        # a product may depend on that
        return torch.frombuffer(raw, dtype=DTYPES[entry.dtype]).reshape(entry.shape).clone()


def stream(source: Path | bytes) -> BinaryIO:
    return source.open("rb") if isinstance(source, Path) else BytesIO(source)


def sealed(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The message of these tensors with this header, which must be JSON."""
    text = json.dumps(header, allow_nan=False)
    held = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    bare = memoryview(save(held))
    begin = 8 + int.from_bytes(bare[:8], "little")
    digest = checksum(text, json.loads(bytes(bare[8:begin])))
    digest.update(bare[begin:])
    return save(held, {"fedhl": f"{digest.hexdigest()} {text}"})


def opened(source: Path | bytes, limit: Limit | None = None) -> Message:
    """The message, of which only the size and the checksum have been checked; the size is checked before
    anything is parsed. Raises Malformed."""
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if limit is not None and size > 8 + sum(limit):
        raise Malformed(f"it has {size:,} bytes, expected at most {8 + sum(limit):,}")
    with stream(source) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise Malformed(f"it is not a safetensors file: its {size:,} bytes are too few")
        if limit is not None and length > limit.header:
            raise Malformed(f"its header has {length:,} bytes, expected at most {limit.header:,}")
        table = parsed(file.read(length), "its safetensors header")
        metadata = table.pop("__metadata__", None)
        match metadata:
            case {"fedhl": str(sealing), **rest} if not rest:
                said, _, text = sealing.partition(" ")
            case _:
                raise Malformed("its safetensors metadata must be one text, 'fedhl'")
        tensors, offsets = entries(table, size - 8 - length)
        digest = checksum(text, table)
        while block := file.read(2**20):
            digest.update(block)
    if said != digest.hexdigest():
        raise Malformed("it does not match its own checksum; it was damaged on the way")
    header = parsed(text.encode("utf-8", "surrogatepass"), "its header")
    return Message(source, header, tensors, 8 + length, offsets)


def checksum(text: str, table: Mapping[str, Any]) -> Any:
    """The sha256 of the text of a header and of the table of the tensors, to go on with the tensors. The
    table counts by what it says, as JSON of our own: other writers may order or space it otherwise."""
    return hashlib.sha256(json.dumps([text, table], sort_keys=True).encode())


def entries(table: Mapping[str, Any], size: int) -> tuple[dict[str, Entry], dict[str, int]]:
    """The tensors of a safetensors header, and the position of each. Raises Malformed unless the tensors fill
    `size` bytes without a gap."""
    found: dict[str, Entry] = {}
    places: list[tuple[int, int, str]] = []
    for name, said in table.items():
        found[name], begin, end = entry(said, f"tensor {shown(name)}")
        places.append((begin, end, name))
    at = 0
    for begin, end, _ in sorted(places):
        if begin != at:
            raise Malformed(f"its tensors leave a gap or overlap at byte {at}")
        at = end
    if at != size:
        raise Malformed(f"its tensors have {at:,} bytes, but {size:,} follow the header")
    return found, {name: begin for begin, _, name in places}


def entry(said: Any, what: str) -> tuple[Entry, int, int]:
    """One tensor of a safetensors header, and the positions of its begin and end. Raises Malformed."""
    match said:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **rest}:
            numbers = all(type(k) is int and 0 <= k < WHOLE for k in (*shape, begin, end))
            if dtype in DTYPES and numbers and len(shape) <= DIMENSIONS and not rest:
                found = Entry(dtype, tuple(shape))
                if end - begin != found.size:
                    raise Malformed(f"{what} is {found}, but has {end - begin} bytes")
                return found, begin, end
    raise Malformed(f"{what} is not described as safetensors does")


def parsed(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without a duplicate key. Raises Malformed for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key is given twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # so does a number of thousands of digits
        raise Malformed(f"{what} is not JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise Malformed(f"{what} is {shown(value)}, expected a mapping")
    return value


def shown(value: Any) -> str:
    """A value from another machine, shortened for a message of ours."""
    text = f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
