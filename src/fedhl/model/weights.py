"""Where the weights of a base model are, and their hash; a GGUF file is dequantised once into a cache folder
(`$FEDHL_CACHE`, or `~/.cache/fedhl`), whose files are checked against their sha256 each time."""

from __future__ import annotations

import importlib.util
import logging
import secrets
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError

from fedhl.errors import UserError
from fedhl.files import SUMS, cache, intact, sha256, sha256_of, sums, whole_folder
from fedhl.locate import locate
from fedhl.model.library import cannot_load, quiet

logger = logging.getLogger(__name__)


def find_weights(source: str) -> tuple[str, str | None]:
    """The folder or hub id of `source`; and the hash of a GGUF file, which names its folder in the cache."""
    path = locate(source)
    if path is None:
        return source, None
    if (path / "adapter_config.json").is_file():
        raise UserError(is_adapter(source))
    return gguf_folder(path) if path.is_file() else (str(path.resolve()), None)


def is_adapter(source: str) -> str:
    return (
        f"model {source!r} is an adapter, not a model; set model.source to the base model that the "
        f"adapter was trained on, and lora.start: {source}, to begin with the adapter"
    )


def hash_folder(folder: Path) -> str:
    """The sha256 over names and contents of the weight files of a folder, in name order."""
    files = sorted(folder.glob("*.safetensors")) or sorted(
        [*folder.glob("*model*.bin"), *folder.glob("*.gguf")]
    )
    if not files:
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise UserError(
            f"model folder {folder} holds no weights (*.safetensors); found "
            f"{', '.join(found) if found else 'nothing'}; give the folder that holds config.json and "
            "the weights, or a .gguf file"
        )
    return hash_files(files)


def hash_files(files: Iterable[Path]) -> str:
    return sha256_of("".join(f"{path.name}\0{sha256(path)}\n" for path in files))


def gguf_folder(file: Path) -> tuple[str, str]:
    """The cached folder that holds `file` dequantised to float32 (made now if need be, or if it is not as it
    was made), and its hash."""
    if file.suffix != ".gguf":
        raise UserError(
            f"model {file} is a file but not a .gguf file; give a folder or a .gguf file"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {file.name} needs the gguf package: pip install gguf")
    digest = sha256(file)
    folder = cache().resolve() / "gguf" / digest[:16]
    if not intact(folder):
        if folder.is_dir():
            logger.warning("%s is damaged, or of an older fedhl: it is made anew", folder)
        logger.info(
            "converting %s to %s, once; this takes about half a minute",
            file.name,
            folder,
        )
        convert_gguf(file, folder)
    return str(folder), digest


def convert_gguf(file: Path, folder: Path) -> None:
    """Dequantise `file` into `folder`, which appears only when it is complete."""
    staging = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        with whole_folder(folder, staging, replace=True), quiet():
            dequantise(file, staging)
            (staging / SUMS).write_text(sums(staging), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # a full disk raises either
        if not intact(folder):  # unless another process has just made the same folder
            raise UserError(no_cache(folder, error)) from error


def no_cache(folder: Path, error: Exception) -> str:
    return (
        f"cannot write the converted model to {folder}: {error}; it needs four "
        "bytes per parameter: make room, or point FEDHL_CACHE at another folder"
    )


def dequantise(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    except Exception as error:  # the library raises nearly everything here
        raise UserError(cannot_load("GGUF model", str(file), error)) from error
    # The weights are plain float32 now, but the marks of quantisation would forbid saving them.
    model.hf_quantizer = None  # pyright: ignore[reportArgumentType]
    for attribute in ("is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
