"""Calls of Transformers: without its reports, and with its errors told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedhl.errors import in_one_line
from fedhl.locate import locate


def cannot_load(what: str, source: str, error: Exception) -> str:
    if locate(source) is None:
        advice = (
            "there is no such file or folder, so that the name was looked up on the Hugging Face hub; check "
            "the name, the revision and the connection, or give the path of a folder"
        )
    else:
        advice = (
            "expected a folder in the Hugging Face format (config.json, weights, tokenizer or image "
            "processor) of an architecture that the installed transformers knows"
        )
    return f"cannot load the {what} of {source!r}: {in_one_line(error)} ({advice})"


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block transformers prints no loading report and no progress bars; its errors are raised
    here."""
    from transformers.utils import logging as noise

    verbosity, bars = noise.get_verbosity(), noise.is_progress_bar_enabled()
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    try:
        yield
    finally:
        noise.set_verbosity(verbosity)
        if bars:
            noise.enable_progress_bar()
