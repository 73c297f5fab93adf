"""Hooks of MkDocs: the repository's own pages and files beside those of docs/, and links that find them.

Pages of docs/ link to files outside of it, as they are in the repository. Such files get a place below
`repository/` on the site: Markdown as pages, examples for Python as pages of cells, everything else as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)([^)]*)\)")
"""`[text](target#anchor)`."""
CELL = re.compile(r"^# %%", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add README.md as the first page, and every file outside docs/ that a page links to."""
    waiting, pages = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"], set[str]()
    waiting += [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        if page in pages or not (ROOT / page).is_file():
            continue
        pages.add(page)
        if not page.startswith("docs/"):
            files.append(File.generated(config, place(page), content=text_of(page)))
        if page.endswith(".md"):
            text = (ROOT / page).read_text(encoding="utf-8")
            waiting += [target(page, link) for _, link, _ in LINK.findall(text)]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with its links to the repository's files turned to their places on the site."""
    source = page.file.src_uri
    here = (
        source.removeprefix("repository/") if source.startswith("repository/") else f"docs/{source}"
    )
    here = "README.md" if source == "index.md" else here

    def turned(link: re.Match[str]) -> str:
        text, there, rest = link.groups()
        file = target(here, there)
        if (ROOT / file).is_dir():  # a folder has no page: its name is enough
            return text
        if not (ROOT / file).is_file():  # a link to elsewhere, or code that looks like a link
            return link[0]
        return f"[{text}]({relpath(place(file), os.path.dirname(source) or '.')}{rest})"

    return LINK.sub(turned, markdown)


def target(page: str, link: str) -> str:
    """The path in the repository that a link on this page names."""
    return normpath(f"{os.path.dirname(page)}/{link}".lstrip("/"))


def place(file: str) -> str:
    """Where a file of the repository is on the site."""
    if file == "README.md":
        return "index.md"
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    if file.startswith("examples/python/"):
        file = file.removesuffix(".py") + ".md"
    return f"repository/{file}"


def text_of(file: str) -> str | bytes:
    """The file as it is on the site."""
    if file.startswith("examples/python/"):
        return notebook((ROOT / file).read_text(encoding="utf-8"))
    if file.endswith(".md"):
        return (ROOT / file).read_text(encoding="utf-8")
    return (ROOT / file).read_bytes()


def notebook(script: str) -> str:
    """A script of cells as a page: the comments of Markdown cells as text, the others as code."""
    parts = []
    for cell in CELL.split(script):
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            parts.append(
                "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
            )
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"
