"""The course page in Chromium, opened from the disk: make site-check."""
# ruff: noqa: F811  fixtures are imported, and are arguments of tests

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call
from test_site import CHARACTERS, made_up_curves, site, trained  # noqa: F401

from lab import stages
from lab.pages import lessons
from lab.pages.site import __main__ as site_command
from lab.pages.site import models
from lab.storage import runs

pytestmark = pytest.mark.skipif("SITE_CHECK" not in os.environ, reason="long: make site-check runs it")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PAGES = ["index.html", "stage4_gqa/README.html", "stage7_mla_mtp/README.html", "stage4_gqa/model.py.html"]
PAGES += ["docs/glossary.html", "docs/scale.html", "cost.html", "README.html"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[site-check]'")
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium, or CHROMIUM=its path")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def visit(browser, site):
    """visit(address, …): opens a page. Messages on its console and requests to elsewhere are failures."""
    contexts, problems = [], []

    def go(address, scheme="light", width=1200, script=True):
        size = {"width": width, "height": 800}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=script))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: is_local(request.url, site) or problems.append(request.url))
        page.goto(f"{site.as_uri()}/{address}")
        return page

    yield go
    for context in contexts:
        context.close()
    assert not problems


def is_local(url: str, site: Path) -> bool:
    return url.startswith((site.as_uri(), "data:"))


@pytest.mark.parametrize("address", PAGES)
def test_pages_have_no_serious_fault_of_accessibility_in_either_theme(visit, address):
    """By axe-core, which also computes the contrasts. Folded parts are opened before."""
    axe = pytest.importorskip("axe_playwright_python", reason="needs pip install -e '.[site-check]'")
    page = visit(address)
    page.add_script_tag(path=Path(axe.__file__).parent / "axe.min.js")
    page.evaluate("document.querySelectorAll('main details').forEach((each) => (each.open = true))")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate("axe.run({preload: false}).then(({violations}) => violations)")
        grave = [each for each in found if each["impact"] in ("serious", "critical")]
        assert not [(each["id"], each["nodes"][0]["html"][:200], len(each["nodes"])) for each in grave]


@pytest.mark.parametrize("address", PAGES)
def test_no_page_scrolls_sideways_on_a_phone(visit, address):
    page = visit(address, width=360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_hovering_over_a_curve_shows_the_measured_value(visit):
    page = visit("index.html")
    shown = set()
    svg, tip = page.locator(".plot svg"), page.locator(".tip")
    box = svg.bounding_box()
    for x in range(60, int(box["width"]), 20):
        svg.hover(position={"x": x, "y": box["height"] / 2})
        shown.add(tip.inner_text())
    measured = made_up_curves()["stages"]
    for text in shown:
        label, mean, std, tokens = re.match(
            r"(.+): ([\d.]+)(?: ± ([\d.]+))? at ([\d.]+) training tokens", text
        ).groups()
        row = measured[stages.find(label.split()[0])]
        at = [round(number / 1e6, 2) for number in row["tokens"]].index(float(tokens))
        expected = [row["val_loss"][key][at] for key in ("mean", "std")]
        assert [None if value is None else f"{value:.3f}" for value in expected] == [mean, std]
    assert len(shown) > 1


def test_the_curves_follow_the_axis_the_stages_and_the_station(visit):
    page = visit("index.html")
    assert page.locator(".curve").count() == len(stages.course())
    page.get_by_label("0 gpt").uncheck()
    assert page.locator(".curve").count() == len(stages.course()) - 1
    page.get_by_label("seconds").check()
    assert page.locator(".plot .name").first.text_content() == "seconds of training"
    page.get_by_label("FLOPs", exact=True).check()
    page.locator(".plot svg").focus()
    page.keyboard.press("ArrowRight")
    assert "FLOPs" in page.locator(".tip").inner_text() and "1 rmsnorm" in page.locator(".tip").inner_text()
    page.locator('.stations a[href="#stage4_gqa"]').click()
    assert page.locator(".curve:not(.other)").count() == 2  # the step from stage 3 to stage 4
    page.reload()
    assert page.locator(".curve:not(.other)").count() == 2


def test_the_stations_are_tabs_for_mouse_and_keyboard(visit):
    page = visit("index.html")
    assert page.locator(".panel:visible h2").first.inner_text() == "Stage 0: GPT-2"
    page.locator('.stations a[href="#stage6_moe"]').click()
    page.keyboard.press("ArrowRight")
    assert page.locator("[role=tabpanel]:visible").count() == 1
    assert page.locator("[role=tabpanel]:visible").get_attribute("id") == "stage7a_mla"
    assert page.url.endswith("#stage7a_mla")
    page.reload()
    assert page.locator("[role=tabpanel]:visible").get_attribute("id") == "stage7a_mla"


def test_the_costs_follow_the_chosen_columns_and_size(visit):
    page = visit("cost.html")
    assert page.locator(".point").count() == len(stages.course()) and page.locator(".bar").count() > 9
    page.get_by_label("up").select_option("cache_bytes_per_token")
    page.locator(".plot svg").focus()
    page.keyboard.press("ArrowRight")
    cache = lessons.read_results()["stages"]["stage0_gpt"]["cache_bytes_per_token"]
    assert page.locator(".tip").inner_text().endswith(f"cache bytes per token {cache:,}")
    page.get_by_label("size").select_option("8 B, computed")
    page.get_by_label("across").select_option("parameters")
    page.locator(".plot svg").focus()
    page.keyboard.press("ArrowLeft")  # from the first point to the last
    parameters = lessons.read_results()["scale"]["8 B"]["7"]["parameters"] / 1e9
    assert f"parameters, billions {parameters:.2f}" in page.locator(".tip").inner_text()


def test_the_theme_is_the_browsers_until_the_reader_chooses(visit):
    page = visit("stage4_gqa/README.html", "dark")

    def state():
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return color, page.evaluate("document.querySelector('picture img').currentSrc").endswith("-dark.svg")

    assert state() == ("rgb(13, 17, 23)", True)
    page.locator(".theme").click()
    page.wait_for_timeout(200)
    assert state() == ("rgb(255, 255, 255)", False)
    page.reload()
    page.wait_for_timeout(200)
    assert state() == ("rgb(255, 255, 255)", False)


def test_the_arrow_keys_turn_the_pages_but_not_within_a_field(visit):
    page = visit("stage4_gqa/README.html")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**/stage5_flash/README.html")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**/stage4_gqa/README.html")
    page.locator(".search input").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(200)
    assert page.url.endswith("stage4_gqa/README.html")


def test_a_diff_is_unified_or_side_by_side(visit):
    page = visit("stage4_gqa/README.html")
    block = page.locator("#stage4_gqamodelpy-5 .changed").first
    tops = lambda: [block.locator(side).bounding_box()["y"] for side in (".old", ".new")]  # noqa: E731
    assert tops()[0] < tops()[1] and page.locator(".block:not(.changed) .old:visible").count() == 0
    page.get_by_label("side by side").check()
    assert tops()[0] == tops()[1] and page.locator(".block:not(.changed) .old:visible").count() > 0


def test_a_term_is_explained_under_the_mouse_and_the_focus_until_escape(visit):
    page = visit("stage4_gqa/README.html")
    tip = page.locator("#explanation")
    assert not tip.is_visible()
    page.locator("p .term").first.hover()
    assert tip.inner_text() == page.locator("p .term").first.get_attribute("data-tip")
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.locator(".code .term").first.focus()
    assert tip.inner_text() == page.locator(".code .term").first.get_attribute("data-tip")


def test_the_search_leads_to_a_section(visit):
    page = visit("docs/glossary.html")
    page.locator(".search input").fill("pitfalls grouped")
    page.locator(".search li a").first.click()
    page.wait_for_url("**/stage4_gqa/README.html#pitfalls")
    page.locator(".search input").fill("zyzzyva")
    page.get_by_text("Nothing found.").wait_for()
    page.locator("h1").click()
    assert not page.locator(".search ol").is_visible()
    page.locator(".search input").fill("pitfalls grouped")
    page.locator(".search input").press("Enter")
    page.wait_for_url("**/stage4_gqa/README.html#pitfalls")


def test_one_page_does_not_fill_the_search(visit):
    page = visit("index.html", width=360)
    page.locator(".search input").fill("latent")
    page.locator(".search li a").first.wait_for()
    pages = [link.partition(": ")[0] for link in page.locator(".search li a").all_inner_texts()]
    assert len(set(pages)) >= 4 and page.get_by_text("more sections").is_visible()
    assert page.locator(".search ol").bounding_box()["x"] >= 0


def test_everything_can_be_read_without_a_script(visit):
    page = visit("index.html", script=False)
    for name in stages.course():
        assert page.locator(f"#{name}").is_visible()
    assert page.locator('noscript img[src="results/loss.png"]').is_visible()
    assert not page.locator("#try").is_visible() and not page.locator("[data-chart]").is_visible()
    page = visit("stage4_gqa/README.html", script=False)
    assert page.locator(".hunk").count() == 8 and page.locator("details summary").first.is_visible()
    page.get_by_label("side by side").check()
    assert page.locator(".block:not(.changed) .old:visible").count() > 0


def test_the_models_compute_in_the_page_what_torch_computes(visit, trained):
    page = visit("index.html")
    tokens = torch.arange(24) * 7 % len(CHARACTERS)
    for name in models.STAGES:
        assert not page.evaluate(f"'{name}' in DATA")  # the weights come with the click
        page.get_by_label("Model").select_option(name)
        page.get_by_role("button", name="Load and write").click()
        page.get_by_text("Click one.").wait_for()
        page.evaluate(f"models.{name}.reset()")
        script = f"(tokens) => tokens.map((token) => [...models.{name}.step(token).logits])"
        found = torch.tensor(page.evaluate(script, tokens.tolist()))
        with torch.no_grad():
            logits = trained[name][0](tokens[None])[0][0]
        assert (found - logits).abs().max() < 2e-5 * logits.abs().max()
        page.reload()


def test_texts_are_written_one_at_a_time_and_keep_their_lines(visit):
    page = visit("index.html")
    button, text = page.get_by_role("button", name="Load and write"), page.locator("#try .text")
    page.get_by_label("Beginning of the text").fill("ROMEO:\nO")
    page.get_by_label("Characters to write").fill("400")
    submit = "form.requestSubmit(); form.querySelector('button').disabled"
    assert page.evaluate(f"const form = document.querySelector('#try form'); {submit}")  # while it loads, too
    page.get_by_text("Writing …").wait_for()
    assert button.is_disabled()
    page.get_by_text("Click one.").wait_for()
    assert button.is_enabled() and text.inner_text().startswith("ROMEO:↵\nO")
    first, second = (text.locator("button").nth(i).bounding_box()["y"] for i in (0, 7))
    assert second > first


def test_a_written_text_shows_attention_and_experts_of_any_character(visit):
    page = visit("index.html")
    text, panel, status = (page.locator(f"#try .{name}") for name in ("text", "panel", "status"))
    assert text.locator("button").count() == len(models.READ)  # before anything is loaded
    assert panel.locator("caption").first.inner_text().startswith("Layer 1: experts ")
    page.get_by_label("Beginning of the text").fill("AJ")
    page.get_by_role("button", name="Load and write").click()
    page.get_by_text("The model does not know “J”.").wait_for()
    page.get_by_label("Model").select_option("stage7_mla_mtp")
    page.get_by_label("Beginning of the text").fill("ROMEO:")
    page.get_by_label("Characters to write").fill("100")
    page.get_by_role("button", name="Load and write").click()
    page.get_by_text("Click one.").wait_for()
    assert text.locator("button").count() == 106 and "106 characters" in status.inner_text()
    text.locator("button").nth(3).click()
    assert (
        panel.locator("tr").count() == 2 * 4 and panel.locator("tr").first.locator(".strip span").count() == 4
    )
    text.locator("button").nth(3).press("ArrowRight")
    assert panel.locator("tr").first.locator(".strip span").count() == 5
    shares = re.findall(r"(\d+)%", panel.locator(".strongest").first.inner_text())
    assert 0 < sum(map(int, shares)) <= 101
    text.locator("button").last.click()
    assert panel.locator("tr").first.locator(".strip span").count() == 64  # the window


def test_make_site_trains_what_is_missing_and_reuses_it(workshop, monkeypatch, text):
    """With two steps of training, on a made-up text in the place of TinyShakespeare."""
    monkeypatch.setattr(models, "DATA", str(workshop / "words.txt"))
    monkeypatch.setattr(models, "READ", "a bad")
    assert call(monkeypatch, site_command, "--steps", "2") == 0
    assert {f"{name}.js" for name in models.STAGES} < {path.name for path in Path("site/static").iterdir()}
    before = {path: path.stat().st_mtime for path in runs.RUNS.rglob("config.json")}
    assert call(monkeypatch, site_command, "--steps", "2") == 0 and len(before) == 3
    assert before == {path: path.stat().st_mtime for path in runs.RUNS.rglob("config.json")}
    assert call(monkeypatch, site_command, "--steps", "0", "--out", "bare") == 0
    assert 'id="try"' not in Path("bare/index.html").read_text(encoding="utf-8")
