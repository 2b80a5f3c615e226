"""What mkdocs does to the pages beside its plugins: docstrings' roles become code, and the README is the first page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>~?(?:[\w.]*\.)?(\w+)</code>")
_NOTE = re.compile(r"^(```\w+) ([\w.-]+)$", re.MULTILINE)  # of a block: the file that it is, or no-run
_OUTSIDE = re.compile(r"\[([^]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The first page is the repository's README above the list of pages; links out of docs/ are text."""
    if page.file.src_uri == "README.md":
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        readme = re.sub(r"\]\((?!https?:|#|docs/)[^)]*\)", "](README.md)", readme).replace("](docs/", "](")
        readme = readme.replace('src="docs/', 'src="')
        _, _, index = markdown.partition("\n")
        markdown = f"{readme}\n## All pages\n{index}"
    markdown = _NOTE.sub(r'\1 title="\2"', markdown).replace(' title="no-run"', "")
    return _OUTSIDE.sub(r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """``:class:`cocoop_fast.Name``` in docstrings, as the name alone."""
    return _ROLE.sub(r"<code>\1</code>", html)
