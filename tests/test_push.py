"""Exports on the hub: a real client, and a server on this machine that speaks its protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub import TOKEN, Hub, hub

from fedhl.errors import UserError
from fedhl.export.push import check_push, push

PUSH = """
import sys
from pathlib import Path
from fedhl.export.push import push
print(push(Path(sys.argv[1]), sys.argv[2], public=sys.argv[3:] == ["public"]))
"""


@pytest.fixture
def there() -> Iterator[Hub]:
    with hub() as here:
        yield here


def run(
    url: str, *arguments: str | Path, token: str = TOKEN, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, for which the hub is at `url`: the library reads that at its import."""
    settings = {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    # its own storage for large files is not part of what the server speaks
    env = os.environ | settings | {"HF_HUB_DISABLE_XET": "1", "COLUMNS": "200"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_an_export_arrives_whole(there: Hub, runs: Path, tmp_path: Path) -> None:
    arguments = ("--merged", "--out", tmp_path / "out", "--push", "me/that")
    sent = run(there.url, "-m", "fedhl", "export", runs / "tiny", *arguments, cwd=runs.parent)
    assert sent.returncode == 0, sent.stderr
    assert f"pushed to {there.url}/me/that" in sent.stdout
    files = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
    }
    assert there.files == {"me/that": files} and "README.md" in files
    assert there.private == {"me/that": True}
    # to the same place again, by whoever wants it public: it stays private
    again = run(there.url, "-c", PUSH, tmp_path / "out", "me/that", "public")
    assert again.returncode == 0 and there.private == {"me/that": True}
    assert len(there.messages) == 2


def test_a_hub_that_refuses_or_is_not_there(there: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x", encoding="utf-8")
    wrong = run(there.url, "-c", PUSH, tmp_path, "me/that", token="hf_wrong")
    assert "UserError: cannot push to me/that: Invalid credentials" in wrong.stderr
    assert f"the export stays in {tmp_path}" in wrong.stderr and not there.files
    nobody = run("http://127.0.0.1:9", "-c", PUSH, tmp_path, "me/that")
    assert "UserError: cannot push to me/that: " in nobody.stderr


@pytest.mark.parametrize("name", ["that", "me/", "/that", "me/that/more", "me/th at", ""])
def test_what_is_no_name_of_a_repository(name: str) -> None:
    with pytest.raises(UserError, match="expected the name of a repository on the hub, OWNER/NAME"):
        check_push(name)


def test_somebody_must_be_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="hf auth login"):
        check_push("me/that")


def test_an_adapter_of_a_base_that_only_this_machine_has_stays_here(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"which nobody else has: .*--merged"):
        push(tmp_path, "me/that")
