"""A whole federation on one machine, as it is on many: a SuperLink behind its gate, and SuperNodes, in
processes of their own, over TLS, with node authentication. For trying things out; `make federation` and the
tests use it."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import certificates
import psutil

from fedhl.config import Config
from fedhl.flower.submit import write_app

ADDRESS = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]


class Loopback:
    """A SuperLink with its nodes. `folder` holds certificates, keys, logs and Flower's own state; `cwd` is
    where relative paths of a config begin; `secure`: with TLS, node authentication and a gate."""

    def __init__(self, folder: Path, cwd: Path, secure: bool = True) -> None:
        self.folder, self.cwd, self.secure = folder, cwd, secure
        self.port = self.nodes_port = free_port()  # nodes come through the gate, or another proxy
        self.processes: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)
        home = self.home("flwr", self.port)
        if secure:
            certificates.make(folder, [ADDRESS], [])
        programs = str(Path(sys.executable).parent)  # Flower starts others of its own
        self.environment = os.environ | {
            "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
            "FLWR_HOME": str(home.absolute()),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FEDHL_CACHE": os.environ.get("FEDHL_CACHE") or str(folder.absolute() / "cache"),
            "PYTHONUNBUFFERED": "1",
        }

    def home(self, name: str, port: int) -> Path:
        """A folder of settings for Flower's commands, which name the server at this port `loopback`."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        trust = f'root-certificates = "{self.folder.absolute()}/ca.crt"'
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "{ADDRESS}:{port}"\n'
            f"{trust if self.secure else 'insecure = true'}\n"
        )
        return home

    # --- processes ------------------------------------------------------------------------------

    def start(self, name: str, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A program of Flower's, with its output in `NAME.log`, in a session of its own."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name(program)), *arguments],
                cwd=self.cwd,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text("utf-8", "replace") if file.exists() else ""

    def kill(self, process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
        """Send a signal to the process and all that it has started, also in sessions of their own."""
        for one in family(process.pid):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)
        process.wait(300)

    def leave(self, process: subprocess.Popen[bytes]) -> None:
        """Stop a node as an operator would, so that the SuperLink knows at once that it has left: until
        then, for about a minute, it lets no other in with the same key."""
        others = family(process.pid)
        process.terminate()
        process.wait(300)
        for one in others:
            with suppress(psutil.NoSuchProcess):
                one.kill()

    def stop(self) -> None:
        for process in reversed(self.processes):
            self.kill(process)

    def superlink(self) -> subprocess.Popen[bytes]:
        """The server, once it answers. It keeps what it knows in a file, and can be started again."""
        trust = ["--insecure"]
        if self.secure:
            files = {"ca-certfile": "ca.crt", "certfile": "server.pem", "keyfile": "server.key"}
            given = [(f"--ssl-{key}", str(self.folder.absolute() / x)) for key, x in files.items()]
            trust = [part for pair in given for part in pair] + ["--enable-supernode-auth"]
        process = self.start(
            "superlink",
            "flower-superlink",
            *trust,
            *("--host", ADDRESS, "--port", str(self.port)),
            *("--database", str(self.folder.absolute() / "superlink.db")),
            "--disable-runtime-dependency-installation",
        )
        self.wait_for(process, "superlink", self.port, 200)
        return process

    def gate(self) -> subprocess.Popen[bytes]:
        """The gate, once it answers; nodes that are started from now on come through it."""
        self.nodes_port = free_port()
        process = self.start(
            *("gate", "fedhl", "gate", f"{ADDRESS}:{self.port}"),
            *("--listen", f"{ADDRESS}:{self.nodes_port}"),
            *("--certificates", str(self.folder.absolute())),
        )
        self.wait_for(process, "gate", self.nodes_port, 403)
        return process

    def wait_for(self, process: subprocess.Popen[bytes], name: str, port: int, status: int) -> None:
        """Until /health at this port is answered with this status."""
        scheme, context = "http", None
        if self.secure:
            scheme = "https"
            context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))

        def up() -> bool:
            assert process.poll() is None, self.log(name)
            try:
                place = f"{scheme}://{ADDRESS}:{port}/health"
                return urllib.request.urlopen(place, timeout=5, context=context).status == status
            except urllib.error.HTTPError as error:
                return error.code == status
            except OSError:
                return False

        wait_until(up, 300, lambda: self.log(name))

    def register(self, node: str) -> None:
        """Make the node's keys, and its public one known to the SuperLink."""
        certificates.make(self.folder, [ADDRESS], [node])
        public = str(self.folder.absolute() / f"{node}.pub")
        self.flwr("supernode", "register", public, "loopback")

    def supernode(
        self, name: str, settings: Mapping[str, Any], *arguments: str, authority: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """A node with these settings; a registered one has its key."""
        trust = ["--insecure"]
        if self.secure:
            trust = ["--root-certificates", str(authority or self.folder.absolute() / "ca.crt")]
            if (self.folder / name).exists():
                trust += ["--auth-supernode-private-key", str(self.folder.absolute() / name)]
        config = " ".join(
            f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
            for key, value in settings.items()
        )
        return self.start(
            name,
            "flower-supernode",
            *trust,
            *("--superlink", f"{ADDRESS}:{self.nodes_port}", "--port", str(free_port())),
            *("--node-config", config),
            *arguments,
        )

    def flwr(self, *arguments: str) -> str:
        """A command of Flower's, to its end; what it printed."""
        done = self.ask(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, *arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command of Flower's, with its own settings or those in `home`."""
        settings = {"FLWR_HOME": str(home.absolute())} if home else {}
        return subprocess.run(
            [str(Path(sys.executable).with_name("flwr")), *arguments],
            env={**self.environment, **settings},
            cwd=self.cwd,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def submit(
        self, config: Config, run: Path, client: str = "fedhl.flower.client:app"
    ) -> subprocess.Popen[bytes]:
        """`fedhl serve`, as a process; its log is `run.log`. `client`: another ClientApp than fedhl's."""
        app = self.folder / "app"
        write_app(app, config, run.absolute(), client)
        submit = (
            "import sys; from fedhl.flower.submit import follow, start; "
            "follow(start(sys.argv[1], 'loopback'), 'loopback')"
        )
        return self.start("run", Path(sys.executable).name, "-c", submit, str(app))

    def trespass(self, config: Config) -> str:
        """What somebody is told who has `ca.crt` and tries to start a run where the nodes connect."""
        app = self.folder / "trespass"
        write_app(app, config, self.folder.absolute() / "stolen")
        told = self.ask(
            *("run", str(app), "loopback", "--format", "json"),
            home=self.home("outside", self.nodes_port),
        )
        return told.stdout + told.stderr


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_until(happened: Callable[[], bool], seconds: float, why: Callable[[], str]) -> None:
    """Until `happened()`. Raises TimeoutError that says `why()`."""
    end = monotonic() + seconds
    while not happened():
        if monotonic() > end:
            raise TimeoutError(f"nothing happened in {seconds} s: {why()}")
        sleep(0.25)


@contextmanager
def loopback(folder: Path, cwd: Path, secure: bool = True) -> Iterator[Loopback]:
    """A federation whose processes all end with the block."""
    federation = Loopback(folder, cwd, secure)
    try:
        federation.superlink()
        if secure:
            federation.gate()
        yield federation
    finally:
        federation.stop()
