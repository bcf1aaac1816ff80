"""Relative links and anchors in all Markdown files lead to something; no network is used."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
_NOT_OURS = {"build", "dist", "node_modules"}
_MARKDOWN = MarkdownIt("commonmark").enable("table")


def pages(root: Path) -> list[Path]:
    """All Markdown files below *root*, except what tools have put there."""
    found = []
    for path in sorted(root.rglob("*.md")):
        folders = path.relative_to(root).parts[:-1]
        if not any(name in _NOT_OURS or name.startswith(".") for name in folders):
            found.append(path)
    return found


def inline(path: Path) -> Iterator[tuple[str, Token]]:
    """Each piece of text, links included, with the kind of the block that it stands in."""
    tokens = _MARKDOWN.parse(path.read_text())
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "inline":
            yield before.type if before else "", token


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for kind, token in inline(path):
        if kind == "heading_open":
            text = "".join(child.content for child in token.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


def broken(path: Path, root: Path) -> list[str]:
    """What is wrong with the links of a page, a line each."""
    problems = []
    for _, token in inline(path):
        for child in token.children or ():
            link = child.attrGet("href") or child.attrGet("src")
            if not isinstance(link, str) or urlsplit(link).scheme:
                continue
            place, _, anchor = unquote(link).partition("#")
            target = (path.parent / place).resolve() if place else path
            if place.startswith("/") or not target.is_relative_to(root) or not target.exists():
                problems.append(f"{path.relative_to(root)}: {link} leads nowhere")
            elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
                problems.append(f"{path.relative_to(root)}: {link} names no heading")
    return problems


@pytest.mark.parametrize("path", pages(ROOT), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    assert broken(path, ROOT) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "# One `two`, three\n# Again\n# Again\n\n| [x](#again-2) |\n|---|\n| ![y](gone.png) |\n\n"
        "[ok](#one-two-three) [ok](a.md#again-1) [ok](https://example.org/gone#x) [out](../..)\n"
        "```\n[code](is-no-link.md)\n```\n"
    )

    assert broken(page, tmp_path) == [
        "a.md: #again-2 names no heading",
        "a.md: gone.png leads nowhere",
        "a.md: ../.. leads nowhere",
    ]
