"""Load the frozen base model from a hub id, a folder, a package or a GGUF file.

A GGUF file is dequantised once into a cache folder (`$FEDHL_CACHE`, or `~/.cache/fedhl`); from then
on it loads like any other folder, whose files are checked against their sha256 each time.
"""

from __future__ import annotations

import importlib.util
import logging
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError

from fedhl.errors import UserError
from fedhl.files import SUMS, cache, intact, sha256, sha256_of, sums, whole_folder
from fedhl.locate import locate
from fedhl.model import classes
from fedhl.model.adapters import is_finite
from fedhl.model.dropout import refuse_random, set_dropout
from fedhl.model.processors import cannot_load, quiet, read_processor
from fedhl.model.reading import sample_logits, settle_padding
from fedhl.seeds import seeded
from fedhl.task import kind_named
from fedhl.task.kind import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The modules PEFT saves with a classification adapter, and matches by the end of their names.
HEAD_SUFFIXES = ("classifier", "score")
# What must stay unquantised in a 4-bit classifier, because it may have to be trained from scratch.
HEAD_MODULES = (
    *("classifier", "pre_classifier", "classification_head", "score", "pooler"),
    *("sequence_summary", "logits_proj"),
)


class Loaded(NamedTuple):
    """A frozen base model, and the facts about it that a run needs.

    `processor` is its tokenizer or its image processor; `task` is the name of its kind; `head` are the names
    of the parameters that are trained whole; `source_for_adapter` is the name of the base model in an
    exported adapter; `hash` identifies the weights: the sha256 of the files, or the commit on the hub;
    `use_cache` is the model's setting before it was switched off for training; `batches`: whether rows of
    different lengths may share a batch.
    """

    model: PreTrainedModel
    processor: Any
    task: str
    head: tuple[str, ...]
    source_for_adapter: str
    revision: str | None
    hash: str
    use_cache: bool
    batches: bool


def load_model(
    source: str,
    task: str,
    *,
    labels: Sequence[str] | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    four_bit: bool = False,
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    dropout: float | None = None,
    fresh_head: bool = False,
    seed: int = 0,
) -> Loaded:
    """The base model with its processor, every parameter frozen, in eval mode, on `device`.

    `source` is a path (a folder or a `.gguf` file), `package:import_name/inner/path` or a hub id,
    at `revision`; `task` is the name of a kind. A classification head that the checkpoint lacks, or
    holds for another number of labels without names, is drawn from `seed` alone: the global random state is
    neither used nor changed. A head whose labels have names is put into the order of `labels`; it is
    drawn anew with `fresh_head`. `dropout` replaces every dropout probability of the model; None leaves them.
    Raises UserError for a source, device or setting that cannot work, and for a head of other labels.
    """
    kind, target = kind_named(task), device_named(device)
    if four_bit:
        require_four_bit(target)
    path = locate(source)
    folder, digest = find_weights(source)
    if path is not None and digest is None:
        digest = hash_folder(path)
    processor = read_processor(kind, folder, source, revision)
    kwargs: dict[str, Any] = {"revision": revision} if path is None and revision else {}
    kwargs |= kind.model_settings(labels)
    if four_bit:
        kwargs |= four_bit_settings(kind, target)
    own = labels_of(folder, source, revision) if kind.head else ()
    with quiet(), seeded(seed, target if four_bit else torch.device("cpu")):
        model, lacking, misfits = load_weights(folder, source, kind, dtype, kwargs)
        if getattr(model, "_hf_peft_config_loaded", False):  # from the hub
            raise UserError(is_adapter(source))
        missing = lacking | misfits
        head = head_names(model, missing, source) if kind.head else ()
        if fresh_head:
            classes.draw(model, (name for name in head if name not in missing))
        elif labels is not None and not lacking.issuperset(head):
            classes.reorder(model, own, labels, source)
    if missing and not kind.head:
        raise UserError(incomplete(source, sorted(missing), model))
    if not all(model.get_parameter(name).is_floating_point() for name in head):
        raise UserError(
            f"model {source!r}: its classification head cannot be kept out of 4-bit quantisation "
            f"({', '.join(head)}); load it without 4-bit"
        )
    refuse_infinite(model, source)
    if not four_bit:
        model.to(target)  # pyright: ignore[reportArgumentType]
    if dropout is not None:
        set_dropout(model, dropout)
    model.requires_grad_(False)
    use_cache = bool(getattr(model.config, "use_cache", False))
    if use_cache:
        model.config.use_cache = False
    # Some models of narrow numbers can only be run with autocast; whether this run has it shows later.
    narrow = torch.autocast(target.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)
    with quiet(), seeded(seed, target), narrow:
        texts = kind.processor == "AutoTokenizer"
        batches = settle_padding(model, processor, source, kind.head) if texts else True
        if dropout == 0:
            refuse_random(model, sample_logits(model, processor, source), source)
    if gradient_checkpointing:
        enable_checkpointing(model, source)
    if digest is None:
        digest = str(getattr(model.config, "_commit_hash", None) or "unknown")
    pinned = revision if path is None else None
    return Loaded(model, processor, task, head, folder, pinned, digest, use_cache, batches)


def load_processor(source: str, task: str, revision: str | None = None) -> Any:
    """The tokenizer or image processor alone of a model. Raises UserError as `load_model` does."""
    return read_processor(kind_named(task), find_weights(source)[0], source, revision)


# --- loading ------------------------------------------------------------------------------------


def load_weights(
    folder: str, source: str, kind: type[Kind], dtype: torch.dtype, kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model, the parameters that its checkpoint did not hold, and those of another shape there."""
    import transformers

    try:
        loaded: Any = getattr(transformers, kind.auto).from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            # Only heads may differ: `head_names` and `load_model` refuse anything else.
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    except Exception as error:  # the library raises nearly everything here
        raise UserError(cannot_load("model", source, error)) from error
    model, info = loaded
    model.eval()
    return model, set(info["missing_keys"]), {name for name, *_ in info["mismatched_keys"]}


def labels_of(folder: str, source: str, revision: str | None) -> list[str]:
    """The names that the checkpoint gives to the rows of its classification head."""
    from transformers import AutoConfig

    kwargs = {} if revision is None or Path(folder).exists() else {"revision": revision}
    with quiet():
        try:
            names: dict[Any, Any] = AutoConfig.from_pretrained(folder, **kwargs).id2label or {}
        except Exception as error:  # the library raises nearly everything here
            raise UserError(cannot_load("model", source, error)) from error
    return [str(names[i]) for i in sorted(names)]


def head_names(model: PreTrainedModel, missing: set[str], source: str) -> tuple[str, ...]:
    """The parameters to train whole: those the checkpoint lacks, and the classifier itself.

    A pooler may be missing (masked language models have none); any other gap inside the encoder
    means that the weights do not belong to this architecture.
    """
    prefix = model.base_model_prefix + "."
    lost = sorted(n for n in missing if n.startswith(prefix) and "pooler" not in n)
    if lost:
        raise UserError(incomplete(source, lost, model))
    names = [name for name, _ in model.named_parameters()]
    head = [n for n in names if any(part.endswith(HEAD_SUFFIXES) for part in n.split(".")[:-1])]
    if not head:  # it has another name: `classification_head`, `logits_proj`
        head = [n for n in names if not n.startswith(prefix)]
    return tuple(name for name in names if name in missing or name in head)


def incomplete(source: str, lost: Sequence[str], model: PreTrainedModel) -> str:
    shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    return (
        f"model {source!r}: its weights do not fit a {type(model).__name__}: {shown} missing or of "
        "another shape; check that config.json belongs to these weights, and that the task is right"
    )


def refuse_infinite(model: PreTrainedModel, source: str) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_finite(parameter):
            raise UserError(
                f"model {source!r}: its weight {name} holds NaN or infinite numbers; restore the weights"
            )


def enable_checkpointing(model: PreTrainedModel, source: str) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"model {source!r}: {type(model).__name__} does not support gradient checkpointing; "
            "turn it off"
        )
    # The first is its name in newer transformers. Non-reentrant: gradients pass frozen inputs.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


# --- devices and quantisation -------------------------------------------------------------------


def device_named(name: str) -> torch.device:
    """The device of this name. Raises UserError unless this machine has it."""
    available = ["cpu"]
    available += ["cuda"] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not one of cpu, cuda, mps")
    if device.type not in available:
        raise UserError(
            f"device {name!r} is not available; PyTorch {torch.__version__} finds here: "
            f"{', '.join(available)}"
        )
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise UserError(f"device {name!r} does not exist, expected cuda:0 to cuda:{count - 1}")
    return torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )


def require_four_bit(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(
            f"a 4-bit base needs an NVIDIA GPU (device: cuda), got device {device.type!r}; "
            "load the base unquantised, for example in bfloat16"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("a 4-bit base needs bitsandbytes: pip install bitsandbytes")


def four_bit_settings(kind: type[Kind], device: torch.device) -> dict[str, Any]:
    """NF4 with double quantisation, arithmetic in bfloat16 (QLoRA, arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        # None: transformers spares the output embedding and what is tied to it.
        llm_int8_skip_modules=list(HEAD_MODULES) if kind.head else None,
    )
    return {"quantization_config": config, "device_map": {"": device.index}}


# --- files --------------------------------------------------------------------------------------


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
