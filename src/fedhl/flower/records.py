"""Headers and payloads in Flower's records: a JSON text and one array of bytes, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedhl.network.message import Malformed

HELLO = "query"
TRAIN = "train"
EVALUATE = "evaluate"
PERSONAL = "train.personal"


def pack(header: Mapping[str, Any], payload: bytes | None = None) -> RecordDict:
    """The content of a message. Flower stores an array by its content, so that a payload for many clients is
    stored once."""
    records = RecordDict({"header": ConfigRecord({"json": json.dumps(header)})})
    if payload is not None:
        array = Array(dtype="uint8", shape=(len(payload),), stype="safetensors", data=payload)
        records["payload"] = ArrayRecord({"safetensors": array})
    return records


def unpack(content: RecordDict) -> tuple[dict[str, Any], bytes | None]:
    """The header and the payload of a message. Raises Malformed for anything else."""
    try:
        header = json.loads(content.config_records["header"]["json"])  # pyright: ignore
        records = content.array_records
        payload = records["payload"]["safetensors"].data if "payload" in records else None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise Malformed(f"it has no readable header or payload ({error!r:.200})") from None
    if not isinstance(header, dict):
        raise Malformed(f"its header is a {type(header).__name__}, expected a mapping")
    return header, payload
