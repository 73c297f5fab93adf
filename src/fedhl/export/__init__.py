"""Adapter folders, merged models and their cards; merging adapters."""

from __future__ import annotations

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
