"""Adapter folders, merged models and their cards; merging adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhl.lazy import lazy

if TYPE_CHECKING:
    from fedhl.export.cards import model_card
    from fedhl.export.folders import export_adapter, export_merged
    from fedhl.export.merging import Merge, merge_adapters, merge_folders

__all__ = [
    "Merge",
    "export_adapter",
    "export_merged",
    "merge_adapters",
    "merge_folders",
    "model_card",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "model_card": "fedhl.export.cards",
        **dict.fromkeys(("export_adapter", "export_merged"), "fedhl.export.folders"),
        **dict.fromkeys(("Merge", "merge_adapters", "merge_folders"), "fedhl.export.merging"),
    },
)
