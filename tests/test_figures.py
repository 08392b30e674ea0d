"""The figures are those of the code, highlight what changed in it, and can be read on a phone."""

import ast
import difflib
import functools
import re
from itertools import combinations
from xml.etree import ElementTree

import pytest
import torch
from matplotlib import font_manager, ft2font

from lab import stages
from lab.comparison import diffs
from lab.pages.figures import block, changes, gallery, heads, svg
from stage5_flash.tiled import tiled_attention

FILES = sorted([*stages.ROOT.glob("stage*/figures/*.svg"), *stages.ROOT.glob("deploy/*/figures/*.svg")])
NAMES = [str(path.relative_to(stages.ROOT)) for path in FILES]
CHANGING = [name for name in stages.course() if diffs.origin(name)]


def elements(text):
    """The elements of an SVG, each with its tag without a namespace, and with the styles of its class."""
    rules = dict(re.findall(r"\.(\w+)\{(.*?)\}", text))
    root = ElementTree.fromstring(text)
    for node in root:
        if rule := rules.get(node.get("class")):
            node.attrib |= dict(style.split(":", 1) for style in rule.split(";"))
    return [(node.tag.partition("}")[2], node) for node in root]


def test_figures_and_the_lessons_that_show_them_are_those_of_the_code():
    """If this fails: python -m lab.pages.figures."""
    drawn = gallery.files()
    everything = {**drawn, **gallery.pages()}
    stale = [path for path, text in everything.items() if path.read_text(encoding="utf-8") != text]
    assert [str(path.relative_to(stages.ROOT)) for path in stale] == []
    assert set(FILES) == set(drawn)  # and no file is left from a figure that is no longer drawn


def test_all_figures_together_are_small():
    assert sum(path.stat().st_size for path in FILES) <= 300 * 1024


# --- What is highlighted ---


def parts(name):
    """The parts of the source that each box of a stage's figure stands for, and whether it is highlighted."""
    return block.compared(name, diffs.origin(name)).parts


def lines(tree, part):
    """The lines of a part of a source."""
    nodes = changes.find(tree, part)
    return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}


@pytest.mark.parametrize("name", CHANGING)
def test_every_highlighted_part_has_changed_lines_in_the_source(name):
    origin = diffs.origin(name)
    matcher = difflib.SequenceMatcher(None, diffs.source(origin), diffs.source(name), autojunk=False)
    removed, added = set(), set()
    for kind, a, a_end, b, b_end in matcher.get_opcodes():
        if kind != "equal":
            removed |= set(range(a + 1, a_end + 1))
            added |= set(range(b + 1, b_end + 1))
    before, after = changes.parsed(origin), changes.parsed(name)
    highlighted = [sources for sources, is_changed in parts(name) if is_changed]
    assert highlighted
    for sources in highlighted:
        changed = (lines(before, part) & removed or lines(after, part) & added for part in sources)
        assert any(changed), sources


@pytest.mark.parametrize("name", CHANGING)
def test_every_changed_function_of_a_stage_is_highlighted(name):
    before, after = changes.parsed(diffs.origin(name)), changes.parsed(name)
    highlighted = {part.partition("/")[0] for sources, changed in parts(name) if changed for part in sources}
    for unit in {*changes.units(before), *changes.units(after)} - block.NOT_DRAWN:
        if changes.changed(before, after, unit):
            assert highlighted & {unit, unit.partition(".")[0]}, unit


@pytest.mark.parametrize("name", CHANGING)
def test_a_stage_compared_with_itself_has_no_highlights(name):
    assert not any(is_changed for _, is_changed in block.compared(name, name).parts)


def test_comments_and_docstrings_are_no_changes_but_one_operator_is():
    source = stages.path("stage3_swiglu").read_text()
    before = ast.parse(source)
    commented = source.replace('"""idx (B, T) int64', '"""The tokens').replace("# (B, T, n_embd)", "# as x")
    edited = source.replace("F.silu(self.gate_proj(x)) *", "F.silu(self.gate_proj(x)) +")
    assert commented != source != edited
    assert not any(changes.changed(before, ast.parse(commented), unit) for unit in changes.units(before))
    parts = ("MLP.forward", "MLP.__init__/gate_proj", "Attention.forward", "RMSNorm")
    assert [changes.changed(before, ast.parse(edited), part) for part in parts] == [True, False, False, False]


@pytest.mark.parametrize("name", CHANGING)
def test_every_part_that_a_box_names_is_in_the_source_of_some_stage(name):
    """So a box cannot stand for a misspelt part, which would never change."""
    everywhere = [changes.parsed(stage) for stage in stages.course()]
    for sources, _ in parts(name):
        for part in sources:
            assert any(changes.find(tree, part) for tree in everywhere), part


# --- What the pictures claim ---


def texts(folder, figure):
    """All text in a figure."""
    return [
        node.text for tag, node in elements(gallery.IDEAS[folder, figure]().render("light")) if tag == "text"
    ]


def test_the_running_numbers_of_the_tiles_end_at_the_output_of_tiled_attention():
    q, k, v, size = heads.tiles_example()
    *_, (_, _, _, total, out) = heads.running(q, k, v, slice(4, 6), size)
    torch.testing.assert_close(out / total, tiled_attention(q, k, v, size, size)[0, 0, -1, 0])
    assert f"{out / total:.3f}" in "".join(texts("stage5_flash", "tiles"))


def test_rope_shows_the_same_score_for_the_same_distance_and_another_one_for_another():
    _, first, second, further = (text for text in texts("stage2_rope", "rope") if text.startswith("q · k"))
    assert first == second != further


def test_the_wiring_is_that_of_neighbours_on_the_left_and_wrong_on_the_right():
    heads_read = [text for text in texts("stage4_gqa", "wiring") if re.fullmatch(r"k\d", text)]
    assert heads_read == ["k0", "k0", "k1", "k1", "k0", "k1", "k0", "k1"]


def test_the_extra_block_predicts_one_token_further_and_nothing_at_the_end():
    words = texts("stage7_mla_mtp", "prediction")
    rows = [words[i + 1 : i + 6] for i, word in enumerate(words) if word in ("block reads", "and predicts")]
    assert rows[0] == rows[1] == ["be", "or", "not", "to", "be"]
    assert rows[2] == ["or", "not", "to", "be", "–"]


def test_two_texts_hold_the_blocks_of_their_common_start_and_no_others():
    held = [text for text in texts("deploy/serving", "pages") if text.startswith("×")]
    assert held == ["×2", "×2", "×2", "×1", "×1", "×1"]


# --- How it looks ---


@functools.cache
def dejavu(family, weight):
    """The font that comes with matplotlib. It is wider than what most readers have."""
    properties = font_manager.FontProperties(family=family, weight=weight)
    return ft2font.FT2Font(font_manager.findfont(properties))


def extent(node):
    """left, top, right, bottom of a line of text in DejaVu."""
    family = "DejaVu Sans Mono" if "mono" in node.get("font-family", "") else "DejaVu Sans"
    font = dejavu(family, "bold" if node.get("font-weight") else "normal")
    size = float(node.get("font-size").removesuffix("px"))
    font.set_size(size, 72)
    font.set_text(node.text)
    width = font.get_width_height()[0] / 64
    x, y = float(node.get("x")), float(node.get("y"))
    left = {"start": x, "middle": x - width / 2, "end": x - width}[node.get("text-anchor", "start")]
    return left, y - 0.75 * size, left + width, y + 0.2 * size


def behind(drawn, i, x, y):
    """The last filled rectangle below element i at (x, y): left, right, and its colour."""
    for tag, node in reversed(drawn[:i]):
        if tag == "rect" and node.get("fill") != "none":
            left, top = float(node.get("x", 0)), float(node.get("y", 0))
            right, bottom = left + float(node.get("width")), top + float(node.get("height"))
            if left <= x <= right and top <= y <= bottom:
                return left, right, node.get("fill")
    raise AssertionError("a figure has a background")


def luminance(color):
    """Relative luminance of #rrggbb (WCAG 2.1)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_text_is_legible_in_its_box_apart_from_others_and_in_contrast(path):
    drawn = elements(path.read_text(encoding="utf-8"))
    texts = {}
    for i, (tag, node) in enumerate(drawn):
        if tag != "text":
            continue
        assert float(node.get("font-size").removesuffix("px")) >= 11, node.text
        left, top, right, bottom = texts[node.text, i] = extent(node)
        box_left, box_right, fill = behind(drawn, i, (left + right) / 2, (top + bottom) / 2)
        margin = 4 if box_left == 0 else 1
        assert box_left + margin <= left and right <= box_right - margin, (node.text, left, right)
        assert contrast(node.get("fill"), fill) >= 4.5, node.text
    for (one, a), (other, b) in combinations(texts.items(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (one, other)


@pytest.mark.parametrize("theme", svg.THEMES)
def test_lines_stand_out_from_the_page(theme):
    colors = svg.THEMES[theme]
    for name, color in colors.items():
        if name != "page" and not name.endswith("-fill"):
            assert contrast(color, colors["page"]) >= 3, name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_figure_has_a_title_and_a_description(path):
    texts = {
        tag: node.text for tag, node in elements(path.read_text(encoding="utf-8")) if tag in ("title", "desc")
    }
    assert len(texts["title"]) > 10 and len(texts["desc"]) > 40
