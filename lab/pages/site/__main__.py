"""Builds the course as a web site: python -m lab.pages.site

It needs no server and loads nothing from elsewhere: open site/index.html, or put the folder on any static
host. It has the folders of the repository: a page is beside its figures, with .html in the place of .md.
"""

import sys

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, since importing torch takes seconds

import ast
import posixpath
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from exercises import chapters
from lab import atomic, cli, stages
from lab.comparison import report
from lab.errors import UserError, shown
from lab.pages import lessons
from lab.pages.site import charts, code, models, prose

HERE = Path(__file__).parent
FURTHER = ("family/deepseek_v3/README.md", "deploy/quantization/README.md", "deploy/serving/README.md")
OTHERS = ("README.md", "docs/learning-path.md", "docs/glossary.md", "docs/scale.md", "docs/benchmarks.md")
CHAPTERS = {posixpath.dirname(chapter.source): chapter for chapter in chapters.CHAPTERS}
LINK = re.compile(r'(?:href|src|srcset)="([^"#:]+)(?:#[^"]*)?"')  # without a scheme: within the site


@dataclass
class Settings:
    """Builds the course as a web site that needs no server."""

    out: str = "site"
    """Folder of the site. If it is a site already, it is replaced."""
    steps: int = 1000
    """Training steps of each of the three models that run in the page; 0: a page without them."""

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps must be 0 or more, not {self.steps}")


def build(out: Path, trained: dict) -> None:
    """Writes the site; trained: the models of its first page, as `models.trained` returns them."""
    with atomic.scratch(out.resolve().parent) as scratch:
        site = scratch / "site"
        shutil.copytree(HERE / "static", site / "static")
        write(site, trained)
        models.write(site / "static", trained)
        if out.exists():
            out.rename(scratch / "old")
        site.rename(out)


def write(site: Path, trained: dict) -> None:
    """Writes the site's own pages, all that can be reached from them by links, and the search's index."""
    templates = Environment(loader=FileSystemLoader(HERE / "templates"), trim_blocks=True, lstrip_blocks=True)
    order, terms, index, done = reading_order(), prose.glossary(), [], set()
    waiting = [prose.address(source) for source in OTHERS]

    def put(address: str, template: str, **values) -> None:
        root = prose.relative(".", address).rstrip("/") + "/"
        html = templates.get_template(template).render(root=root, here=address, lessons=order, **values)
        (site / address).parent.mkdir(parents=True, exist_ok=True)
        (site / address).write_text(html, encoding="utf-8")
        done.add(address)
        waiting.extend(posixpath.normpath(f"{address}/../{target}") for target in LINK.findall(html))

    put_own_pages(put, trained)
    while waiting:
        address = waiting.pop(0)
        source = address.removesuffix(".html")
        if address in done or address.startswith("static/"):
            continue
        if (stages.ROOT / f"{source}.md").exists():
            page = prose.render(f"{source}.md", templates.get_template("hunks.html"), terms)
            index += [[page.title, f"{address}#{at}", *texts] for _, at, *texts in page.sections]
            chapter = CHAPTERS.get(posixpath.dirname(source))
            put(address, "page.html", title=page.title, page=page, chapter=chapter, solution=code.solution)
        elif source.endswith(".py"):
            put(address, "source.html", title=source, lines=code.lines(source))
        else:
            (site / address).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(stages.ROOT / address, site / address)
            done.add(address)
    (site / "static" / "search.js").write_text(models.script("search", index), encoding="utf-8")


def reading_order() -> list[tuple[str, str]]:
    """The address and title of each lesson, in order."""
    files = [f"{stages.path(name).parent.name}/README.md" for name in stages.course()]
    texts = {file: (stages.ROOT / file).read_text(encoding="utf-8") for file in [*files, *FURTHER]}
    return [(prose.address(file), text.partition("\n")[0].removeprefix("# ")) for file, text in texts.items()]


def put_own_pages(put, trained: dict) -> None:
    """The first page and the page of costs."""
    results = lessons.read_results()
    sizes = charts.costs(results)
    put("cost.html", "cost.html", sizes=sizes, results=results)
    put(
        "index.html",
        "home.html",
        stages=[station(name, results) for name in stages.course()],
        measured=sizes[0],
        curves=charts.curves(),
        models={name: stages.label(name) for name in trained},
        sizes=models.SIZES,
        prompt=models.PROMPT,
    )


def station(name: str, results: dict) -> dict:
    """What the first page says about a stage."""
    file, folder = stages.path(name), stages.path(name).parent.name
    text = (file.parent / "README.md").read_text(encoding="utf-8")
    figure = "block7a" if name == "stage7a_mla" else "block"
    picture = re.search(rf"<!-- figure {figure} -->\n(.*?)<!-- end -->", text, re.DOTALL)[1]
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    return {
        "name": name,
        "idea": report.IDEAS[name],
        "lines": results["stages"][name]["lines_changed"],
        "summary": docstring.partition(": ")[2].partition("\n")[0],
        "lesson": f"{folder}/README.html",
        "notebooks": re.findall(r"\[([^\]]+)\]\(\.\./(notebooks/[^)]+)\)", text),
        "figure": picture.replace('"figures/', f'"{folder}/figures/'),
    }


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    out = Path(settings.out)
    if out.is_file() or (out.exists() and any(out.iterdir()) and not (out / "static" / "search.js").exists()):
        raise UserError(f"{shown(out)} is no site and no empty folder: choose another --out")
    build(out, models.trained(settings.steps) if settings.steps else {})
    print(f"open {shown(out / 'index.html')}")


if __name__ == "__main__":
    cli.run(main)
