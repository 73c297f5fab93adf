"""The gate before a SuperLink: the requests of nodes pass whole, and no other request passes."""

from __future__ import annotations

import http.client
import http.server
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import certificates
import httpx
import pytest
import uvicorn
from flwr.superlink.routers.control.router import router as control
from flwr.superlink.routers.fleet.router import router as fleet
from support.tiny import fedhl

from fedhl.flower.gate import gate


class Asked(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@pytest.fixture
def superlink() -> Iterator[tuple[str, list[Asked]]]:
    """A server that echoes what arrives, and keeps a list of it."""
    arrived: list[Asked] = []

    class Echo(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.headers.get("transfer-encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            arrived.append(Asked(self.command, self.path, dict(self.headers), body))
            self.send_response(418)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("flwr-answer", "kept")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = answer

        def log_message(self, format: str, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", arrived
    server.shutdown()
    server.server_close()


@contextmanager
def gate_before(superlink: str) -> Iterator[int]:
    """The port of a gate before this server."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        config = uvicorn.Config(gate(superlink, False), log_level="critical", ws="none")
        server = uvicorn.Server(config)
        serving = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
        serving.start()
        yield door.getsockname()[1]
        server.should_exit = True
        serving.join(30)


def paths(router: object) -> list[str]:
    return [route.path for route in router.routes]  # pyright: ignore[reportAttributeAccessIssue]


def test_all_that_nodes_ask_passes_whole(superlink: tuple[str, list[Asked]]) -> None:
    url, arrived = superlink
    assert len(paths(fleet)) > 10
    body = bytes(range(256)) * 5000
    with gate_before(url) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as node:
        for path in paths(fleet):
            answer = node.post(path, content=body, headers={"flwr-signature": "s", "te": "x"})
            assert (answer.status_code, answer.content) == (418, body)
            assert answer.headers["flwr-answer"] == "kept"
        chunked = node.post(paths(fleet)[0], content=iter([b"one", b"two"]))
        assert chunked.content == b"onetwo"
    assert [asked.path for asked in arrived] == [*paths(fleet), paths(fleet)[0]]
    for asked in arrived[:-1]:
        assert (asked.method, asked.body) == ("POST", body)
        assert asked.headers["flwr-signature"] == "s" and "te" not in asked.headers


ELSEWHERE = [
    *(
        "/",
        "/health",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/../control/start-run",
        "//v1/control/x",
    ),
    *(
        "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/V1/FLEET/get-run",
    ),
    *("/v1/fleet/get-run/../../control/start-run", "/v1/fleet/get-run?x=/v1/control/start-run"),
    *(
        "/v1/fleet\\..\\control",
        "/v1/fleet/get-run;/../../control/start-run",
        "/docs",
        "/openapi.json",
    ),
    "http://127.0.0.1/v1/control/start-run",
]


def test_nothing_else_passes(superlink: tuple[str, list[Asked]]) -> None:
    """No path of the control API, which starts runs, nor another spelling of one, nor another method."""
    url, arrived = superlink
    assert any("start-run" in path for path in paths(control))
    with gate_before(url) as port:
        tries = [("POST", path) for path in (*paths(control), *ELSEWHERE)]
        tries += [(method, paths(fleet)[0]) for method in ("GET", "PUT", "PATCH", "DELETE", "HEAD")]
        for method, path in tries:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request(method, path, body=b"x")
            assert connection.getresponse().status in (403, 404, 405), (method, path)
            connection.close()
        # two lengths, or two requests in one: whatever the gate takes them for, only nodes' requests pass
        for wrong in (
            b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n"
            b"transfer-encoding: chunked\r\n\r\n0\r\n\r\nPOST /v1/control/start-run HTTP/1.1\r\n"
            b"host: x\r\ncontent-length: 0\r\n\r\n",
            b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
            b"POST /v1/control/start-run HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
                line.sendall(wrong)
                line.shutdown(socket.SHUT_WR)
                while line.recv(65536):
                    pass
    assert {asked.path for asked in arrived} <= {"/v1/fleet/get-run"}


def test_a_superlink_that_is_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with gate_before(f"http://127.0.0.1:{port}") as door:
        answer = httpx.post(f"http://127.0.0.1:{door}/v1/fleet/get-run")
    assert (answer.status_code, answer.text) == (502, "the SuperLink does not answer\n")


def test_mistakes_are_told(tmp_path: Path) -> None:
    done = fedhl(tmp_path, "gate", "127.0.0.1", "--certificates", ".")
    assert done.code == 2 and "expected HOST:PORT, e.g. 0.0.0.0:8000, got '127.0.0.1'" in done.err
    done = fedhl(tmp_path, "gate", "127.0.0.1:1", "--certificates", "keys")
    assert done.code == 2 and "cannot use server.pem, server.key and ca.crt in keys: " in done.err
    certificates.make(tmp_path / "keys", ["127.0.0.1"], [])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        done = fedhl(tmp_path, "gate", "127.0.0.1:1", "--certificates", "keys", "--listen", listen)
    assert done.code == 2 and f"cannot listen on {listen}: " in done.err


def test_it_speaks_tls_and_trusts_its_own_authority_only(
    superlink: tuple[str, list[Asked]], tmp_path: Path
) -> None:
    """A SuperLink of another authority, or without TLS, is none."""
    certificates.make(tmp_path / "keys", ["127.0.0.1"], [])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "fedhl", "gate", superlink[0].removeprefix("http://")]
    command += ["--certificates", str(tmp_path / "keys"), "--listen", listen]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        trust = ssl.create_default_context(cafile=tmp_path / "keys" / "ca.crt")
        transport = httpx.HTTPTransport(verify=trust, retries=12)
        with httpx.Client(transport=transport, timeout=60) as node:
            answer = node.post(f"https://{listen}/v1/fleet/get-run")
        assert answer.status_code == 502 and not superlink[1]
    finally:
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said.split()) == (130, ["stopped"])
