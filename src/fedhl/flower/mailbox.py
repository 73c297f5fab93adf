"""Messages to Flower's nodes, and their replies: a bad reply never stops the replies of other nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from functools import partial
from threading import Thread
from time import monotonic, sleep
from typing import Any, TypeVar

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from fedhl.flower.records import unpack
from fedhl.network.message import Malformed, shown

T = TypeVar("T")

POLL = 0.5
"""Seconds between two looks for replies that have arrived."""
STALL = 5.0
"""Seconds for which replies that are announced, but do not arrive, may delay all others."""


class Mailbox:
    """Sends messages over the grid, and collects the replies as they arrive."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.uploads: dict[
            str, Future[list[Message]]
        ] = {}  # by message: a reply that has not arrived in full

    def nodes(self) -> set[int]:
        """The nodes that Flower knows now."""
        return set(self.grid.get_node_ids())

    def push(self, message: Message) -> str | None:
        """Send one message. Returns its id, or None if Flower did not accept it."""
        return next((id for id in self.grid.push_messages([message]) if id), None)

    def collect(
        self,
        sent: dict[str, T],
        accept: Callable[[T, dict[str, Any], bytes | None], None],
        refuse: Callable[[T, str], None],
    ) -> None:
        """Process the replies that have arrived to the messages `sent`, and remove these messages from
        `sent`.

        `sent`: the receiver of each message, by the message's id. `accept` is given the receiver, the
        header and the payload of its reply, and raises Malformed to refuse it; `refuse` is given the
        receiver and the reason, for such a reply and for a reply that cannot be read.
        """

        def unreadable(id: str, reason: str) -> None:
            refuse(sent.pop(id), reason)

        for reply in self.pull(sent, unreadable):
            receiver = sent.pop(reply.metadata.reply_to_message_id, None)
            if receiver is None:
                continue  # not an answer, or a second one
            try:
                accept(receiver, *answer(reply))
            except Malformed as error:
                refuse(receiver, str(error))

    def pull(
        self, messages: Iterable[str], unreadable: Callable[[str, str], None]
    ) -> list[Message]:
        """The replies to these messages that have arrived. `unreadable` is given the message of each reply
        that Flower has, but cannot read, and the reason.

        The replies are pulled one by one, since Flower deletes a reply before it reads it, and raises an
        error for a bad one: the replies of other nodes must not be lost with it. Flower also waits for the
        end of a node's upload, which may never come: such a reply is left to a thread of its own.
        """
        found: list[Message] = []
        end = monotonic() + STALL
        for id in list(messages):
            seconds = 0.0 if id in self.uploads else max(0.0, end - monotonic())
            reply = self.uploads.pop(id, None) or in_background(partial(self.fetch, id))
            if not wait([reply], seconds).done:
                self.uploads[id] = reply
                continue
            error = reply.exception()
            if isinstance(error, httpx.HTTPError | MemoryError):  # no fault of the reply's
                raise error
            if error is not None:
                unreadable(id, f"Flower cannot read its reply: {one_line(repr(error))}")
            else:
                found += reply.result()
        return found

    def fetch(self, id: str) -> list[Message]:
        """The reply to one message, if it has arrived; waits for the end of its upload."""
        return list(self.grid.pull_messages([id]))

    def forget(self, id: str) -> None:
        """Stop waiting for the upload of the reply to this message."""
        self.uploads.pop(id, None)


def pause(spent: float = 0.0) -> None:
    """Wait before the next look, twice as long as the last one took: each look costs Flower a request for
    every reply, and these requests must not take all of its time."""
    sleep(min(max(POLL, 2 * spent), STALL))


def in_background(work: Callable[[], T]) -> Future[T]:
    """The result of `work`, done by a thread for which the end of the process does not wait."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def answer(message: Message) -> tuple[dict[str, Any], bytes | None]:
    """The header and payload of a reply. Raises Malformed, with the reason, if it reports an error."""
    if message.has_error() or not message.has_content():
        code, reason = (
            (message.error.code, message.error.reason) if message.has_error() else (0, "")
        )
        last = one_line((reason or "").strip().rpartition("\n")[2]) or "unknown"
        raise Malformed(f"its node reports an error ({code}): {last}")
    header, payload = unpack(message.content)
    if "error" in header:
        said = header["error"]
        raise Malformed(
            f"its node says: {one_line(said) if isinstance(said, str) else shown(said)}"
        )
    return header, payload


def one_line(text: str) -> str:
    """A client's text for our log and files: shortened, without control characters, which a terminal would
    obey, and without unpaired surrogates, which no file can hold."""
    return "".join(c if c.isprintable() else " " for c in text[:500])
