"""Markdown pages as HTML: links, coloured code, explained terms, and diffs beside their explanation."""

import itertools
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from jinja2 import Template
from markdown_it import MarkdownIt
from markdown_it.token import Token

from lab import stages
from lab.pages.site import code

GLOSSARY = "docs/glossary.md"
SECTIONS = ("Notation", "Units", "Terms")  # of the glossary, whose names and terms are linked
AMBIGUOUS = {*"dENkrnpv", "bit", "head", "tokens/s", "training"}  # mean something else elsewhere, too


@dataclass
class Page:
    """A Markdown file of the course, rendered."""

    title: str
    html: str
    sections: list[tuple[int, str, str, str]]
    """Level, anchor, heading and plain text of each."""


def address(source: str) -> str:
    """Where a file of the repository is in the site, which has the same folders."""
    return f"{source.removesuffix('.md')}.html" if source.endswith((".md", ".py")) else source


def relative(target: str, page: str) -> str:
    """The address of a file of the site, as seen from a page."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def slug(text: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def plain(token: Token) -> str:
    """The text of an inline token, without markup."""
    return "".join(" " if child.type == "softbreak" else child.content for child in token.children or [])


def glossary() -> dict[str, tuple[str, str]]:
    """By term: its anchor in the glossary, and what it means."""
    tokens = MARKDOWN.parse((stages.ROOT / GLOSSARY).read_text(encoding="utf-8"))
    found = {term: (slug(row), meaning) for _, row, terms, meaning in rows(tokens) for term in terms}
    return {term: about for term, about in found.items() if term not in AMBIGUOUS}


def rows(tokens: list[Token]) -> Iterator[tuple[Token, str, list[str], str]]:
    """The rows of the glossary: where each begins, its terms together and one by one, and what they mean."""
    section = ""
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            section = tokens[number + 1].content
        elif token.type == "tr_open" and tokens[number + 1].type == "td_open" and section in SECTIONS:
            terms = re.sub(r" \(or \w+\)", "", plain(tokens[number + 2])).split(", ")
            yield token, " ".join(terms), terms, plain(tokens[number + 5])


def render(source: str, template: Template, terms: dict[str, tuple[str, str]]) -> Page:
    """A page of the course, by its path from the root. template: of a diff; terms: as of `glossary`."""
    tokens = MARKDOWN.parse((stages.ROOT / source).read_text(encoding="utf-8"))
    at = relative(address(GLOSSARY), source)
    explained = {term: (f"{at}#{anchor}", meaning) for term, (anchor, meaning) in terms.items()}
    sections = anchored(tokens)
    if source == GLOSSARY:
        for start, row, *_ in rows(tokens):
            start.attrSet("id", slug(row))
        explained = {}
    link(tokens, explained)
    show_diffs(source, tokens, template, explained)
    return Page(sections[0][2], html_of(tokens), sections)


def html_of(tokens: list[Token]) -> str:
    return MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})


def coloured(_, tokens: list[Token], number: int, *__) -> str:
    html = code.coloured(tokens[number].content, tokens[number].info.strip())
    return f'<pre tabindex="0"><code class="code">{html}</code></pre>\n'


MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
MARKDOWN.add_render_rule("fence", coloured)
MARKDOWN.add_render_rule("code_block", coloured)
MARKDOWN.add_render_rule("table_open", lambda *_: '<div class="scroll" tabindex="0">\n<table>\n')
MARKDOWN.add_render_rule("table_close", lambda *_: "</table>\n</div>\n")


def anchored(tokens: list[Token]) -> list[tuple[int, str, str, str]]:
    """Gives headings the anchors that they have on GitHub; returns the sections, as in Page."""
    found = []
    for before, token in itertools.pairwise(tokens):
        if before.type == "heading_open":
            text = plain(token)
            earlier = [slug(heading) for _, _, heading, _ in found].count(slug(text))
            before.attrSet("id", slug(text) + (f"-{earlier}" if earlier else ""))
            found.append((int(before.tag[1]), before.attrGet("id"), text, ""))
        elif token.type == "inline" and found:
            found[-1] = (*found[-1][:3], f"{found[-1][3]}{plain(token)} ")
    return found


def link(tokens: list[Token], explained: dict[str, tuple[str, str]]) -> None:
    """Makes links lead to the site's pages, and links the first use of each term elsewhere, if in a text."""
    words = "|".join(sorted(map(re.escape, explained), key=len, reverse=True))
    pattern, seen = re.compile(rf"(?<![\w-])({words})(?![\w-])"), {""}

    def linked(text: str, before: str = "", after: str = "") -> str:
        html = before + escape(text, quote=False) + after
        if text not in explained or text in seen:
            return html
        seen.add(text)
        return code.term(html, *explained[text])

    for before, token in itertools.pairwise(tokens):
        inside = before.type == "heading_open"
        for child in token.children or []:
            if child.type == "link_open":
                inside, (path, hash_, anchor) = True, child.attrGet("href").partition("#")
                child.attrSet("href", (path if ":" in path else address(path)) + hash_ + anchor)
            elif child.type == "code_inline" and not inside:
                child.type, child.content = "html_inline", linked(child.content, "<code>", "</code>")
            elif child.type == "text" and not inside:
                parts = pattern.split(child.content)
                child.type, child.content = "html_inline", "".join(map(linked, parts))
            inside = inside and child.type != "link_close"


def show_diffs(source: str, tokens: list[Token], template: Template, explained: dict) -> None:
    """Puts each diff's hunks beside the items of the list "Hunk by hunk" that follows it, if one does."""
    for number in [n for n, token in enumerate(tokens) if "\n+++ b/" in token.content]:
        old, new = code.files_of(tokens[number].content)
        names = dict(explained)
        for file in (old, new):
            there = relative(address(file), source)
            names |= {name: (f"{there}#L{n}", doc) for name, (n, doc) in code.definitions(file).items()}
        hunks = code.hunks(tokens[number].content, names)
        start = next(n for n in range(number + 1, len(tokens)) if tokens[n].type == "inline")
        if tokens[start].content.startswith("**Hunk by hunk"):
            end = next(n for n in range(start, len(tokens)) if tokens[n].type == "ordered_list_close")
            inner = [(n, tokens[n].type, tokens[n].level) for n in range(start, end)]
            items = [n for n, kind, level in inner if (kind, level) == ("list_item_open", 1)]
            if len(items) != len(hunks):
                raise ValueError(f"{source}: {len(hunks)} hunks, but {len(items)} explanations")
            for hunk, first, after in zip(hunks, items, [*items[1:], end], strict=True):
                hunk["explanation"] = html_of(tokens[first + 1 : after - 1])
            for token in tokens[start - 1 : end + 1]:
                token.type, token.content, token.children = "html_block", "", None
        values = {"hunks": hunks, "source": old, "target": new, "key": slug(new)}
        tokens[number].type = "html_block"
        tokens[number].content = template.render(values)
