"""A hub on this machine, as far as the client of huggingface_hub speaks to it when it pushes a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"


@dataclass
class Hub:
    """What was pushed: repositories by name, whether each is private, and its files."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that is served inside the block, to whoever has the token."""
    here = Hub()
    handler = type("Served", (Handler,), {"hub": here})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    here.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            large = {True: "lfs", False: "regular"}
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": large[file["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for file in asked
            ]
            self.answer(200, {"files": modes})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self.answer(200, self.batch(json.loads(body)))
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404, {"error": f"nothing at {self.path}"})

    def create(self, wanted: dict[str, Any]) -> None:
        name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        if name in self.hub.files:
            self.answer(
                409, {"error": "You already created this model repo", "url": self.place(name)}
            )
            return
        self.hub.private[name] = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.files[name] = {}
        self.answer(200, {"url": self.place(name), "name": name})

    def place(self, name: str) -> str:
        return f"{self.hub.url}/{name}"

    def batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}"}}}
            for each in wanted["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.rpartition("/")[2]
        right = hashlib.sha256(content).hexdigest() == digest
        if right:
            self.hub.objects[digest] = content
        self.answer(200 if right else 400, {})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        name = "/".join(self.path.split("/")[3:5])
        files = self.hub.files[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        place = f"{self.place(name)}/commit/{'0' * 40}"
        self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": place})

    def do_GET(self) -> None:
        self.answer(404, {"error": f"nothing at {self.path}"})

    def answer(self, code: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests read what was pushed."""
