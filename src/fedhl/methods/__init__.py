"""The aggregation methods, one file each, and how to get one by name."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

from fedhl.names import Table, build, construct, imported

if TYPE_CHECKING:
    from fedhl.method import Method

METHODS = Table(
    {
        "eclora": "fedhl.methods.eclora:ECLoRA",
        "fed_plora": "fedhl.methods.fed_plora:FedPLoRA",
        "fedex_lora": "fedhl.methods.fedex_lora:FedExLoRA",
        "fedhera": "fedhl.methods.fedhera:FedHera",
        "fedhl": "fedhl.methods.fedhl:FedHL",
        "fedhl_ef": "fedhl.methods.fedhl_ef:FedHLEF",
        "fedit": "fedhl.methods.fedit:FedIT",
        "fedmomentum": "fedhl.methods.fedmomentum:FedMomentum",
        "fedsa_lora": "fedhl.methods.fedsa_lora:FedSALoRA",
        "fedsvd": "fedhl.methods.fedsvd:FedSVD",
        "ffa_lora": "fedhl.methods.ffa_lora:FFALoRA",
        "flexlora": "fedhl.methods.flexlora:FlexLoRA",
        "flora": "fedhl.methods.flora:FLoRA",
        "flora_na": "fedhl.methods.flora_na:FLoRANA",
        "florist": "fedhl.methods.florist:FLoRIST",
        "frlora": "fedhl.methods.frlora:FRLoRA",
        "fslora": "fedhl.methods.fslora:FSLoRA",
        "hetlora": "fedhl.methods.hetlora:HetLoRA",
        "hlora": "fedhl.methods.hlora:HLoRA",
        "lora_a2": "fedhl.methods.lora_a2:LoRAA2",
        "lora_fair": "fedhl.methods.lora_fair:LoRAFAIR",
        "rac_lora": "fedhl.methods.rac_lora:RACLoRA",
        "raflora": "fedhl.methods.raflora:RaFLoRA",
        "rbla": "fedhl.methods.rbla:RBLA",
        "rolora": "fedhl.methods.rolora:RoLoRA",
        "sd_lora": "fedhl.methods.sd_lora:SDLoRA",
    }
)
"""Name -> class. A class is imported at its first use: a wrong name can be refused without torch."""

CONTRACT = (
    "mixed_ranks",
    "laws",
    "init",
    "broadcast",
    "aggregate",
    "delta",
    "traffic",
)
"""The parts that a method must have."""
OPTIONAL = ("weighting", "per_client", "starts", "reference")
"""The parts that a method may leave out: then it has those of `fedhl.method.Method`."""


def get_method(name: str, **hyperparameters: Any) -> Method[Any]:
    """A method by name, or by `"package.module:Class"` for a method outside fedhl. A class that leaves
    optional parts out, and does not inherit them, is given the defaults of `Method`.

    Raises ValueError for an unknown name (suggesting the nearest), a class that cannot be imported
    or is not a dataclass, and a hyperparameter that the method does not have.
    """
    if ":" not in name:
        return build("method", METHODS, name, hyperparameters)
    try:
        cls = imported(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ValueError(f"method {name!r} must be a dataclass that follows fedhl.method.Method")
    if missing := [part for part in CONTRACT if not hasattr(cls, part)]:
        raise ValueError(
            f"method {name!r} lacks {', '.join(missing)}; see fedhl.method.Method and "
            "docs/adding-a-method.md"
        )
    from fedhl import method as contract  # imports torch

    for part in OPTIONAL:
        if not hasattr(cls, part):
            setattr(cls, part, getattr(contract.Method, part))
    return construct("method", name, cls, hyperparameters)
