"""The files of a client on its own machine: the factors that it keeps for itself, and what it holds in its
base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from fedhl.files import private_folder, sha256, write_bytes, write_text
from fedhl.record import round_name, rounds_in
from fedhl.shelf import Matrices, save_matrices


class Kept:
    """The tensors that a client keeps for itself between the rounds of a run: a file for each of the last
    two.

    A server that has lost a round to a crash asks for it again. The client must then begin it from the
    tensors of the round before, not from those of its first attempt.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self) -> dict[int, Path]:
        return rounds_in(self.folder, ".safetensors")

    def before(self, round: int) -> dict[str, Tensor]:
        """The tensors that were kept after the last round before this one; {} if there are none."""
        files = self.files()
        earlier = [number for number in files if number < round]
        return load_file(files[max(earlier)]) if earlier else {}

    def keep(self, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors; the file is written whole or not at all."""
        private_folder(self.folder)
        content = save({name: x.contiguous() for name, x in tensors.items()})
        write_bytes(self.folder / (round_name(round) + ".safetensors"), content)
        files = self.files()
        for old in sorted(number for number in files if number <= round)[:-2]:
            files[old].unlink()


class Holdings:
    """What a client holds in its base (see `fedhl.server.ledger`): `held/VERSION.safetensors`, float32, and
    its sha256 in `held/VERSION.sha256`, for the last two versions.

    A client cannot know whether the server has received its reply. So it keeps the version to which the last
    broadcast was relative, too: the next one is relative to either of the two.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "held"

    def memory(self, version: str | None) -> Mapping[str, Tensor] | None:
        """The memory of this version, by layer, {} for the version None, nothing; None if it is not here, or
        damaged."""
        if version is None:
            return {}
        file = self.file(version)
        try:
            said = file.with_suffix(".sha256").read_text("ascii").strip()
            return Matrices(file, said) if sha256(file) == said else None
        except (OSError, ValueError):
            return None

    def keep(self, before: str | None, version: str, memory: Mapping[str, Tensor]) -> None:
        """Keep this memory beside that of the version `before`, and remove all others. Each file is written
        whole or not at all."""
        private_folder(self.folder)
        file = self.file(version)
        if self.memory(version) is None:
            written = save_matrices(file, memory)
            write_text(file.with_suffix(".sha256"), written.sha256 + "\n")
        for other in self.folder.iterdir():
            if other.stem not in (before, version):
                other.unlink(missing_ok=True)

    def file(self, version: str) -> Path:
        return self.folder / f"{version}.safetensors"
