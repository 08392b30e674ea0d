"""The course page: links, contents, charts and models, without a browser. make site-check has one."""

import itertools
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from conftest import call

from data.tokenizers import CharTokenizer
from exercises import chapters, cut
from lab import stages
from lab.comparison import diffs
from lab.errors import UserError
from lab.pages import lessons
from lab.pages.site import __main__ as site_command
from lab.pages.site import charts, code, models, prose

CHARACTERS = "".join(sorted({*models.READ, *"'-Aqvxz"}))
TINY = {"vocab_size": len(CHARACTERS), "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64}
VOID = {"meta", "link", "img", "source", "input", "br", "hr"}  # elements without an end
NODE = shutil.which("node")


class Document(HTMLParser):
    """What a page refers to, its anchors, and where its markup is wrong."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.ids, self.links, self.loaded, self.wrong = [], [], [], [], []
        self.feed(html)
        self.wrong += [f"<{tag}> is not closed" for tag in self.open if tag != "p"]

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.loaded += [given[key] for key in ("src", "srcset") if given.get(key)]
        self.loaded += [given["href"]] if tag == "link" else []
        if tag == "img" and not given.get("alt"):
            self.wrong.append(f"{given['src']} has no alternative text")
        if len(given) < len(attributes):
            self.wrong.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at line {self.getpos()[0]} closes nothing")


def tiny(name: str) -> tuple:
    """A model with weights far from their small beginnings, so that wrong arithmetic shows."""
    torch.manual_seed(0)
    stage = stages.load(name)
    model = stage.GPT(stage.GPTConfig(**TINY)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 8 if parameter.dim() > 1 else torch.rand_like(parameter) + 0.5)
        for key, buffer in model.named_buffers():
            if key.endswith("correction_bias"):
                buffer.copy_(torch.randn_like(buffer))
    return model, CharTokenizer(CHARACTERS)


def made_up_curves() -> dict:
    """curves.json in its own form, with numbers that occur nowhere else."""
    found = {}
    for number, name in enumerate(stages.course()):
        losses = {"mean": [2.5 + number / 1000, 1.75 + number / 1000], "std": [0.0624, 0.0136]}
        cost = {"flops_per_token": 5e6, "tokens_per_second": 2e4, "tokens": [192_000, 384_000]}
        if name == "stage7a_mla":  # as if trained with a single seed
            losses["std"] = [None, None]
        found[name] = {**cost, "val_loss": losses, "train": {"tokens": [7680], "loss": [3.1]}}
    return {"format": 2, "stages": found}


@pytest.fixture(scope="module")
def trained():
    return {name: tiny(name) for name in models.STAGES}


@pytest.fixture(scope="module")
def site(tmp_path_factory, trained):
    """The whole site, with tiny models and made-up curves."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "curves.json").write_text(json.dumps(made_up_curves()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "CURVES", folder / "curves.json")
        site_command.build(folder / "site", trained)
    return folder / "site"


@pytest.fixture(scope="module")
def documents(site):
    """Every page of the site, by its path."""
    return {path: Document(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def page(site: Path, address: str) -> str:
    return (site / address).read_text(encoding="utf-8")


def plain(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html))


def test_every_link_leads_to_a_file_and_an_anchor_of_the_site(documents):
    missing = []
    for path, document in documents.items():
        for target in (*document.links, *document.loaded):
            file, _, anchor = unquote(target).partition("#")
            if not re.match(r"https?:|data:", target):
                there = (path.parent / file).resolve() if file else path
                known = documents[there].ids if there in documents else []
                if not there.exists() or (anchor and there in documents and anchor not in known):
                    missing.append(f"{path.name}: {target}")
    assert not missing


def test_no_page_loads_anything_from_elsewhere(site, documents):
    for path, document in documents.items():
        assert not [target for target in document.loaded if re.match(r"(\w+:)?//", target)], path
    for path in (site / "static").iterdir():
        text = path.read_text(encoding="utf-8")
        if path.name != "search.js":
            assert not re.search(
                r"https?://(?!www\.w3\.org/)|\bfetch\(|XMLHttpRequest|@import|url\(", text
            ), path


def test_every_page_is_well_formed_with_anchors_that_are_unique(documents):
    for path, document in documents.items():
        assert not document.wrong, path
        assert len(document.ids) == len(set(document.ids)), path


def test_every_lesson_is_in_the_site_and_leads_to_its_neighbours(site):
    order = [address for address, _ in site_command.reading_order()]
    assert [address.partition("/")[0] for address in order[:3]] == [
        "stage0_gpt",
        "stage1_rmsnorm",
        "stage2_rope",
    ]
    for before, after in itertools.pairwise(order):
        assert f'rel="next" href="{"../" * before.count("/")}{after}"' in page(site, before)
        assert f'rel="prev" href="{"../" * after.count("/")}{before}"' in page(site, after)


@pytest.mark.parametrize("name", [name for name in stages.course() if diffs.origin(name)])
def test_each_hunk_stands_beside_its_explanation_with_the_lines_of_both_files(site, name):
    html = page(site, f"{stages.path(name).parent.name}/README.html")
    key = prose.slug(diffs.file(name))
    hunks = re.findall(rf'<section class="hunk" id="{key}-\d+".*?</section>', html, re.DOTALL)
    assert len(hunks) == diffs.diff(name).count("\n@@ ")
    for hunk in hunks:
        why = re.search(r'<div class="why">(.*?)</div>', hunk, re.DOTALL)[1]
        assert len(plain(why).split()) > 3  # the number is one word
    for side, file in (("old", diffs.origin(name)), ("new", name)):
        lines = diffs.source(file)
        blocks = [block for hunk in hunks for block in re.split(r'<div class="(?=old|new)', hunk)]
        shown = [block for block in blocks if block.startswith(side)]
        found = re.findall(r'class="at">(\d+)</span>.*?class="text">(.*?)</span></div>', "".join(shown))
        assert found and all(plain(text) == lines[int(number) - 1] for number, text in found)


def test_names_in_diffs_and_prose_lead_to_their_explanation(site):
    html = page(site, "stage4_gqa/README.html")
    glossary = 'class="term" href="../docs/glossary.html#n_kv_head" data-tip="key/value heads"'
    assert f'<a {glossary}><span class="n">n_kv_head</span></a>' in html
    assert f"<a {glossary}>n_kv_head</a>" in html
    line = [number for number, text in enumerate(diffs.source("stage4_gqa"), 1) if "def causal_mask(" in text]
    assert f'href="model.py.html#L{line[0]}" data-tip="Mask (n_query, n_key) to add' in html
    assert 'class="term"' not in re.search(r"<h1.*?</h1>", html)[0]
    assert "#num_experts_per_tok" not in html  # k is a key here, and no number of experts


def test_questions_have_folded_answers(site):
    for name in {stages.path(name).parent.name for name in stages.course()}:
        text = (stages.ROOT / name / "README.md").read_text(encoding="utf-8")
        main = page(site, f"{name}/README.html").partition("<main")[2]
        assert main.count("<details><summary>Answer</summary>") == text.count("<summary>Answer</summary>") > 0


@pytest.mark.parametrize("chapter", chapters.CHAPTERS, ids=lambda chapter: chapter.name)
def test_exercises_have_folded_hints_and_the_courses_code_as_folded_solution(site, chapter):
    html = page(site, f"{Path(chapter.source).parent}/README.html")
    for exercise in chapter.exercises:
        pattern = rf'<section class="exercise" id="exercise-{exercise.number}">.*?</section>'
        shown = re.search(pattern, html, re.DOTALL)[0]
        folded = [plain(text) for text in re.findall(r"</summary>(.*?)</details>", shown, re.DOTALL)]
        reference = chapter.reference(chapter.source_of(exercise))
        code = "\n\n".join(cut.piece(reference, name) for name in exercise.functions)
        assert folded == [exercise.shapes, exercise.steps, code + "\n"]
        assert exercise.question in plain(shown)


def test_a_filled_section_on_where_an_idea_pays_keeps_its_table_and_its_picture(tmp_path, monkeypatch):
    table = "| size | gain |\n|---|---|\n| 8 | 2.5× |"
    picture = '<picture>\n  <img alt="a gain" src="../results/ideas/x.png">\n</picture>'
    text = f"# A\n\n## Where it pays\n\nHere, `n_x`.\n\n<!-- pays x -->\n{picture}\n\n{table}\n<!-- end -->\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    html = prose.render("README.md", None, {"gain": ("x", "y"), "n_x": ("x", "y")}).html
    assert "<td>2.5×</td>" in html and 'src="../results/ideas/x.png"' in html in html
    assert ">gain</a></th>" in html and "><code>n_x</code></a>" in html


def test_the_first_page_has_a_station_for_each_stage_with_its_figure_and_its_links(site):
    html = page(site, "index.html")
    for name in stages.course():
        panel = re.search(rf'<section class="panel" id="{name}">.*?</section>', html, re.DOTALL)[0]
        folder = stages.path(name).parent.name
        figure = "block7a" if name == "stage7a_mla" else "block"
        assert f'href="#{name}"' in html and f'src="{folder}/figures/{figure}.svg"' in panel
        assert f'href="{folder}/README.html"' in panel and "#exercises" in panel
        assert ("#the-diff" in panel) == (name != "stage0_gpt")
    assert html.count("Changed since stage") == len(stages.course()) - 1  # in the figures' descriptions


def test_a_stations_numbers_are_those_of_the_results(site):
    results = lessons.read_results()["stages"]
    before, after = results["stage3_swiglu"], results["stage4_gqa"]
    panel = re.search(r'id="stage4_gqa">.*?</section>', page(site, "index.html"), re.DOTALL)[0]
    text = " ".join(plain(panel).split())
    for key, digits, divisor in (("cache_bytes_per_token", 0, 1), ("flops_per_token", 2, 1e6)):
        one, other = (f"{row[key] / divisor:,.{digits}f}" for row in (before, after))
        assert f"{one} → {other}" in text
    speeds = [f"{row['training_tokens_per_second']['median']:,.0f}" for row in (before, after)]
    assert ("≈" if after["differs"]["training_tokens_per_second"] is False else "→").join(
        speeds
    ) in text.replace(" ", "")


def test_a_stage_has_a_button_for_each_notebook_of_its_lesson(site):
    panel = re.search(r'id="stage4_gqa">.*?</section>', page(site, "index.html"), re.DOTALL)[0]
    found = re.search(r'href="(notebooks/\w+\.ipynb)">Notebook: The cache, growing</a>', panel)
    assert (site / found[1]).read_bytes() == (stages.ROOT / found[1]).read_bytes()


def test_a_table_behind_the_curves_has_all_their_numbers(site):
    html = page(site, "index.html")
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)[1])
    table = re.search(r"<details><summary>The numbers.*?</table>", html, re.DOTALL)[0]
    assert [stage["name"] for stage in data["content"]["stages"]] == stages.course()
    for name, measured in made_up_curves()["stages"].items():
        losses = measured["val_loss"]
        for mean, std in zip(losses["mean"], losses["std"], strict=True):
            spread = "" if std is None else f" ± {std:.3f}"
            assert f"<td>{mean:.3f}{spread}</td>" in table, name


def test_without_curves_the_first_page_shows_the_picture_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "CURVES", tmp_path / "missing.json")
    assert charts.curves() is None
    written = {}
    site_command.put_own_pages(lambda address, template, **values: written.update({address: values}), {})
    assert written["index.html"]["curves"] is None


def test_the_costs_are_those_of_the_results_with_a_table_for_every_size(site):
    html, results = page(site, "cost.html"), lessons.read_results()
    sizes = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)[1])[
        "content"
    ]
    assert [size["title"].split(",")[0] for size in sizes] == ["0.8 M", *results["scale"]]
    assert html.count("<details><summary>The numbers") == len(sizes)
    measured, largest = sizes[0]["rows"][0]["values"], sizes[-1]["rows"]
    loss = results["stages"]["stage0_gpt"]["val_loss"]
    mean, std = loss["mean"], loss["std"]
    assert measured["val_loss"] == pytest.approx([mean, mean - std, mean + std])
    rounds = results["stages"]["stage0_gpt"]["training_tokens_per_second"]["values"]
    assert measured["training_tokens_per_second"][1:] == [min(rounds), max(rounds)]
    parameters = results["scale"]["8 B"]["7"]["parameters"] / 1e9
    assert largest[-1]["values"]["parameters"] == [parameters] and f"<td>{parameters:,.2f}</td>" in html


def test_the_search_finds_every_section(site):
    text = (site / "static" / "search.js").read_text(encoding="utf-8")
    index = json.loads(text.partition('["search"] = ')[2].rstrip(";\n"))
    found = {address: (page, heading, body) for page, address, heading, body in index}
    name, heading, body = found["stage4_gqa/README.html#pitfalls"]
    assert (name, heading) == ("Stage 4: grouped-query attention (GQA)", "Pitfalls")
    assert "repeat_interleave" in body and "docs/scale.html#sizes" in found


def test_8_bit_weights_are_off_by_half_a_step_at_most():
    weight = torch.randn(5, 3, 40) * torch.logspace(-3, 3, 5).view(5, 1, 1)
    codes, scales = models.in_8_bits(weight)
    assert codes.dtype == torch.int8 and (codes.abs().amax(-1) == 127).all()  # a scale for each row
    assert ((codes * scales - weight).abs() <= scales * 0.501).all()
    assert (models.in_8_bits(torch.zeros(2, 4))[0] == 0).all()


def test_the_three_models_fit_into_two_and_a_half_mebibytes():
    total = 0
    for name in models.STAGES:
        stage = stages.load(name)
        model = stage.GPT(stage.GPTConfig(vocab_size=65, **models.SIZES))
        content = models.exported(model, CHARACTERS)
        total += len(models.script(name, content))
        assert not any(f"layers.{models.SIZES['n_layer']}." in key for key in content["tensors"])  # no MTP
    assert total < 2.5 * 2**20


@pytest.fixture(scope="module")
def computed(site, trained):
    """Tokens, and what the page's script computes: by stage, for each token what `step` returns."""
    if not NODE:
        pytest.skip("needs node")
    # 64 tokens fill the window, which begins to move after them.
    tokens = torch.randint(len(CHARACTERS), (64,), generator=torch.Generator().manual_seed(1)).tolist()
    example = f"DATA.recorded.characters.map(c => {json.dumps(CHARACTERS)}.indexOf(c))"
    run = "(name, tokens) => { const model = new Model(DATA[name]); return tokens.map(t => model.step(t)); }"
    plain = "(key, value) => value instanceof Float32Array ? Array.from(value) : value"
    results = [f"{name}: run('{name}', {tokens})" for name in trained]
    results.append(f"recorded: run('{models.EXAMPLE}', {example})")
    files = ["model.js", "recorded.js", *(f"{name}.js" for name in trained)]
    texts = [(site / "static" / file).read_text(encoding="utf-8") for file in files]
    ending = f"const run = {run}; console.log(JSON.stringify({{{', '.join(results)}}}, {plain}))"
    script = "\n".join(["globalThis.window = globalThis;", *texts, ending])
    output = subprocess.run([NODE, "-"], input=script, capture_output=True, text=True, check=True).stdout
    return tokens, json.loads(output)


@pytest.mark.parametrize("name", models.STAGES)
def test_the_pages_script_computes_the_logits_of_torch_on_the_same_weights(computed, trained, name):
    tokens, steps = computed[0], computed[1][name]
    with torch.no_grad():
        logits = trained[name][0](torch.tensor([tokens]))[0][0]
    found = torch.tensor([step["logits"] for step in steps])
    assert logits.std() > 0.3 and (found - logits).abs().max() < 2e-5 * logits.abs().max()


def test_the_recorded_example_is_what_the_script_computes(site, computed):
    text = (site / "static" / "recorded.js").read_text(encoding="utf-8")
    recorded = json.loads(text.partition('["recorded"] = ')[2].rstrip(";\n"))
    assert "".join(recorded["characters"]) == models.READ and len(recorded["steps"]) == len(models.READ)
    for step, expected in zip(recorded["steps"], computed[1]["recorded"], strict=True):
        shares, exact = (torch.tensor(each["attention"], dtype=torch.double) for each in (step, expected))
        assert (shares - exact).abs().max() < 0.00501
        for chosen, found in zip(step["experts"], expected["experts"], strict=True):
            assert dict(chosen) == pytest.approx(dict(found), abs=1e-5)


@pytest.mark.skipif(not NODE, reason="needs node")
@pytest.mark.parametrize("name", ["charts.js", "model.js", "page.js", "try.js"])
def test_the_scripts_have_no_syntax_errors(name):
    subprocess.run([NODE, "--check", site_command.HERE / "static" / name], check=True)


def test_what_is_no_site_is_never_replaced_and_refused_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "trained", None)
    (tmp_path / "thesis.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        assert call(monkeypatch, site_command, "--out", str(out)) == 2
        assert "is no site and no empty folder: choose another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_older_site_is_replaced_whole(tmp_path, monkeypatch):
    old = tmp_path / "site"
    (old / "static").mkdir(parents=True)
    (old / "static" / "search.js").write_text("")
    (old / "gone.html").write_text("")
    monkeypatch.setattr(site_command, "write", lambda site, trained: None)
    site_command.build(old, {})
    assert not (old / "gone.html").exists() and (old / "static" / "style.css").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_finished_runs_are_reused_and_others_trained_anew(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(models.runs, "RUNS", tmp_path)
    monkeypatch.setattr(models, "finished", lambda folder, steps: "stage4" in folder.name)
    monkeypatch.setattr(models, "train", lambda name, steps, folder: begun.append((name, steps)) or 0)
    monkeypatch.setattr(models, "loaded", lambda folder: folder.name)
    found = models.trained(7)
    assert sorted(begun) == [("stage6_moe", 7), ("stage7_mla_mtp", 7)] and list(found) == list(models.STAGES)
    monkeypatch.setattr(models, "train", lambda name, steps, folder: 2)
    with pytest.raises(UserError, match="was not trained"):
        models.trained(7)


def test_the_generator_and_the_scripts_stay_small():
    def count(*files):
        return sum(len((site_command.HERE / file).read_text().splitlines()) for file in files)

    assert count("__init__.py", "__main__.py", "prose.py", "code.py", "charts.py") <= 500
    assert count("static/charts.js", "static/model.js") <= 400


def test_every_definition_with_a_docstring_is_explained_once():
    found = code.definitions("stage4_gqa/model.py")
    assert found["rotate"][1].startswith("Rotates the pairs") and "forward" not in found
