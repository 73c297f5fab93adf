"""Load the frozen base model from a hub id, a folder, a package or a GGUF file."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fedhl.errors import UserError
from fedhl.locate import locate
from fedhl.model import classes
from fedhl.model.adapters import is_finite
from fedhl.model.dropout import refuse_random, set_dropout
from fedhl.model.library import cannot_load, quiet
from fedhl.model.processors import read_processor
from fedhl.model.reading import sample_logits, settle_padding
from fedhl.model.weights import find_weights, hash_folder, is_adapter
from fedhl.seeds import seeded
from fedhl.task import kind_named
from fedhl.task.kind import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
