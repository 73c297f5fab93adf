"""The replies of the current round, on disk: a server that is killed continues with those that had arrived.

incoming/round-000003/
    clients.json     the clients that were connected when the round began: id, rank and rows of each
    ID.safetensors   a reply, as it arrived
    ID.rank          the rank of its client in the next round
    ID.forgotten     its client has lost what it held, and begins this round as a newcomer
    closed.json      written when the round is closed: the clients without a reply, and the reasons
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedhl.files import file_name, private_folder, write_bytes, write_text
from fedhl.network.message import Malformed, shown
from fedhl.record import round_name, rounds_in
from fedhl.server import Client


@dataclass(frozen=True)
class Incoming:
    """The replies that have arrived in one round of the run in the folder `run`."""

    run: Path
    round: int

    @property
    def folder(self) -> Path:
        return self.run / "incoming" / round_name(self.round)

    def clients(self) -> list[tuple[str, int, int]] | None:
        """The clients that were connected when the round began, each with its rank and its number of rows;
        None before that."""
        file = self.folder / "clients.json"
        if not file.exists():
            return None
        return [(id, rank, examples) for id, rank, examples in json.loads(file.read_text("utf-8"))]

    def begin(self, clients: Iterable[tuple[str, int, int]]) -> None:
        """The round begins with these clients."""
        private_folder(self.folder.parent)
        private_folder(self.folder)
        write_text(self.folder / "clients.json", json.dumps(list(clients)) + "\n")

    def remove_others(self) -> None:
        """Remove all other rounds: earlier ones are in the state by now, later ones have lost their state."""
        private_folder(self.folder.parent)
        private_folder(self.folder)
        for other in self.folder.parent.iterdir():
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)

    def file(self, client: Client) -> Path:
        """The file of a client's reply."""
        return self.folder / (file_name(client.id) + ".safetensors")

    def size(self, client: Client) -> int:
        """The bytes of a client's reply; 0 if it has not arrived."""
        file = self.file(client)
        return file.stat().st_size if file.exists() else 0

    def rank(self, client: Client) -> int:
        """The next rank of a client whose reply has arrived."""
        return json.loads(self.file(client).with_suffix(".rank").read_text())

    def keep(
        self,
        client: Client,
        header: Mapping[str, Any],
        payload: bytes | None,
        limit: int,
        least_rank: int,
    ) -> None:
        """Put a reply on disk, with the rank of its client in the next round.

        Raises Malformed, and writes nothing, for a reply of more than `limit` bytes, so that no client can
        fill the disk, and for a rank below `least_rank` or above the client's own.
        """
        if payload is None:
            raise Malformed("its reply has no payload")
        if len(payload) > limit:
            raise Malformed(f"it has {len(payload):,} bytes, expected at most {limit:,}")
        rank = header.get("next_rank", client.rank)
        if type(rank) is not int or not least_rank <= rank <= client.rank:
            raise Malformed(
                f"its next rank is {shown(rank)}, expected {least_rank} to {client.rank}"
            )
        write_text(self.file(client).with_suffix(".rank"), json.dumps(rank))
        write_bytes(self.file(client), payload)

    def forget(self, client: Client) -> None:
        """Record that this client has lost what it held."""
        write_text(self.file(client).with_suffix(".forgotten"), "")

    def forgotten(self, clients: Iterable[Client]) -> set[str]:
        """The ids of these clients that have lost what they held."""
        return {
            client.id for client in clients if self.file(client).with_suffix(".forgotten").exists()
        }

    def closed(self) -> dict[str, str]:
        """The clients without a reply, by client id, and the reasons; {} while the round is open."""
        file = self.folder / "closed.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else {}

    def close(self, missing: Mapping[str, str]) -> None:
        """Close the round: replies that arrive from now on do not count.

        The sum of the round may be sent, to be evaluated, before its checkpoint is on disk. A restart must
        come to the same sum, or two sums with the same noise would have been sent.
        """
        write_text(self.folder / "closed.json", json.dumps(missing) + "\n")


def rounds_done(run: Path) -> int:
    """The number of rounds that the run in this folder has finished."""
    return max(rounds_in(run / "state"), default=0)


def clients_interrupted(run: Path) -> int:
    """The number of clients at the begin of the round in which the server was stopped; 0 if it was not
    stopped within a round."""
    return len(Incoming(run, rounds_done(run) + 1).clients() or ())


def remove_incoming(run: Path) -> None:
    """Remove the replies of all rounds: the run has ended."""
    shutil.rmtree(run / "incoming", ignore_errors=True)
