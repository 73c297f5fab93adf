"""A gate before a SuperLink: nodes get in, and whoever else reaches its port does not.

Flower has one port for nodes and for users who start runs. A run brings its own code, so that whoever starts
one can have any program run on the server and on every node. Behind the gate the SuperLink listens on its own
machine alone, and from there runs are started; the gate listens to the world, and passes the requests of
nodes on.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fedhl.errors import UserError

FLEET = re.compile(rb"/v1/fleet/[a-z-]+")
"""What a node asks of a SuperLink, as it is on the wire: nothing that could be decoded into another path."""
HOP = {"connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
"""Headers that are about one connection, and not about what is passed on (RFC 9110, 7.6.1)."""
PATIENCE = 600.0
"""Seconds that a request may wait for the SuperLink."""


def gate(superlink: str, trust: ssl.SSLContext | bool) -> Starlette:
    """The gate as an app: it passes the requests of nodes on to `superlink`, a URL, and answers all others
    with 403. `trust` decides whether the SuperLink is the right one."""

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(
            base_url=superlink, verify=trust, timeout=PATIENCE, trust_env=False
        ) as app.state.client:
            yield

    async def passed_on(request: Request) -> Response:
        path: bytes = request.scope["raw_path"]
        if request.method != "POST" or request.url.query or not FLEET.fullmatch(path):
            return PlainTextResponse("this gate is for the nodes of a federation\n", 403)
        client: httpx.AsyncClient = request.app.state.client
        asked = client.build_request(
            "POST", path.decode(), headers=end_to_end(request.headers), content=request.stream()
        )
        try:
            answer = await client.send(asked, stream=True)
        except httpx.TransportError:
            return PlainTextResponse("the SuperLink does not answer\n", 502)
        return StreamingResponse(
            answer.aiter_raw(),
            answer.status_code,
            end_to_end(answer.headers),
            background=BackgroundTask(answer.aclose),
        )

    every = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    return Starlette(routes=[Route("/{path:path}", passed_on, methods=every)], lifespan=life)


def end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that are passed on."""
    return {name: value for name, value in headers.items() if name.lower() not in HOP}


def open_gate(host: str, port: int, superlink: str, certificates: Path) -> None:
    """Serve the gate over TLS until the process is told to end. `superlink`: HOST:PORT; `certificates`: the
    folder of the certificate, the key and the authority of both. Raises UserError for files that are missing
    or no certificates, and for a port that is taken."""
    certificate, key = certificates / "server.pem", certificates / "server.key"
    try:
        trust = ssl.create_default_context(cafile=certificates / "ca.crt")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:
        raise UserError(
            f"cannot use server.pem, server.key and ca.crt in {certificates}: {error}"
        ) from error
    config = uvicorn.Config(
        gate(f"https://{superlink}", trust),
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_level="warning",
        access_log=False,
        ws="none",
        server_header=False,
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        door = socket.create_server((host, port), family=family, backlog=config.backlog)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}") from error
    with door:
        uvicorn.Server(config).run(sockets=[door])
