"""All figures: where their files are, and how the lessons show them."""

import functools
import re
from pathlib import Path
from xml.sax.saxutils import quoteattr

from lab import stages
from lab.pages.figures import basics, block, deployed, heads, tokens
from lab.pages.figures.svg import Drawing

# By folder and name of the file: what draws it.
IDEAS = {
    ("stage0_gpt", "mask"): basics.mask,
    ("stage1_rmsnorm", "norms"): basics.norms,
    ("stage2_rope", "rope"): basics.rope,
    ("stage3_swiglu", "gate"): basics.gate,
    ("stage4_gqa", "wiring"): heads.wiring,
    ("stage5_flash", "tiles"): heads.tiles,
    ("stage6_moe", "routing"): tokens.routing,
    ("stage7_mla_mtp", "latent"): heads.latent,
    ("stage7_mla_mtp", "prediction"): tokens.prediction,
    ("deploy/serving", "pages"): deployed.pages,
    ("deploy/quantization", "group"): deployed.group,
}


@functools.cache
def drawings() -> dict[tuple[Path, str], Drawing]:
    """Every figure, by the folder of its lesson and its name."""
    found = {}
    for name in stages.course():
        figure = "block7a" if name == "stage7a_mla" else "block"  # one lesson has two stages
        found[stages.path(name).parent, figure] = block.draw(name)
    for (folder, figure), draw in IDEAS.items():
        found[stages.ROOT / folder, figure] = draw()
    return found


def files() -> dict[Path, str]:
    """The text of every SVG file: one for light pages, one for dark ones."""
    found = {}
    for (folder, figure), drawing in drawings().items():
        found[folder / "figures" / f"{figure}.svg"] = drawing.render("light")
        found[folder / "figures" / f"{figure}-dark.svg"] = drawing.render("dark")
    return found


def pages() -> dict[Path, str]:
    """Every lesson with its figures filled in. Raises ValueError if it has no place for one of them."""
    found = {}
    for (folder, figure), drawing in drawings().items():
        page = folder / "README.md"
        text = found.get(page) or page.read_text(encoding="utf-8")
        place = re.compile(rf"<!-- figure {figure} -->\n.*?<!-- end -->", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"{page} has no <!-- figure {figure} --> … <!-- end -->")
        found[page] = place.sub(lambda _, d=drawing, f=figure: markup(f, d), text)
    return found


def markup(figure: str, drawing: Drawing) -> str:
    """How a page shows a figure.

    GitHub chooses the source of a <picture> by the reader's theme. An SVG that looks at the theme itself
    would get that of the browser or the system, which may be another one.
    """
    return f"""<!-- figure {figure} -->
<picture>
  <source media="(prefers-color-scheme: dark)" srcset="figures/{figure}-dark.svg">
  <img alt={quoteattr(drawing.description)} src="figures/{figure}.svg">
</picture>
<!-- end -->"""
