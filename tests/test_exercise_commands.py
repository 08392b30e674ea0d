"""exercise.py as a learner uses it: files, feedback in words, progress, hunts and predictions."""

import ast
import io
import json
import sys
import textwrap

import pytest
from conftest import call

import compare
import exercise
from exercises import chapters, cut, diagnose, hunting, predictions, probe, progress
from lab import stages


@pytest.fixture
def my(tmp_path, monkeypatch):
    """The learner's folder, in a temporary place."""
    monkeypatch.setattr(stages, "MY", tmp_path / "my")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my"


@pytest.fixture
def run(my, monkeypatch, capsys):
    """run(*arguments): the exit status of exercise.py, and what it printed."""

    def run(*arguments):
        status = call(monkeypatch, exercise, *arguments)
        out, err = capsys.readouterr()
        return int(status), out + err

    return run


@pytest.fixture
def answer(run, my):
    """answer(number, body, …): writes the bodies of the first functions, solves the others, and checks."""

    def answer(number, *bodies):
        chapter, found = chapters.find(number)
        source = chapter.reference(chapter.source)
        text = progress.text_to_start_with(chapter, chapter.source, whole=False)
        for name, body in zip(found.functions, bodies, strict=False):
            blank = f'raise NotImplementedError("exercise {number}: {name}")'
            indent = text[: text.index(blank)].rsplit("\n", 1)[1]
            text = text.replace(blank, body.strip("\n").replace("\n", "\n" + indent))
        tree = cut.merged(text, ast.parse(source), found.functions[len(bodies) :])
        if len(bodies) < len(found.functions):
            text = ast.unparse(tree)
        my.mkdir(exist_ok=True)
        (my / f"{chapter.name}.py").write_text(text)
        return run("check", number)

    return answer


def solve(my, chapter):
    """Puts the course's own solutions into the learner's files."""
    my.mkdir(exist_ok=True)
    for source in chapter.sources:
        (my / chapter.file(source)).write_text(chapter.reference(source))


def test_a_fresh_file_is_not_an_error_and_every_blank_says_not_written_yet(run, my):
    assert run("start", "4")[0] == 0
    for exercise_ in chapters.find("4")[0].exercises:
        status, said = run("check", exercise_.number)
        assert status == 0 and "Not written yet, as expected at the start" in said
    status, said = run("check", "4")
    assert status == 0 and said.count("not written") == 3


def test_a_learner_s_file_is_never_overwritten_without_a_copy(run, my):
    run("start", "4")
    (my / "stage4.py").write_text("mine = 1\n")
    status, said = run("start", "4")
    assert status == 2 and "--again" in said and (my / "stage4.py").read_text() == "mine = 1\n"
    assert run("start", "4", "--again")[0] == 0
    (my / "stage4.py").write_text("mine = 2\n")
    assert run("start", "4", "--again", "--whole")[0] == 0
    kept = [path.read_text() for path in sorted((my / "backups").iterdir())]
    assert kept == ["mine = 1\n", "mine = 2\n"]
    assert "n_kv_head" not in (my / "stage4.py").read_text().partition("average_heads")[0]


@pytest.mark.parametrize("chapter", chapters.CHAPTERS, ids=lambda chapter: chapter.name)
def test_the_solution_passes_alone_and_as_a_whole_and_progress_goes_on(run, my, chapter):
    assert f"start {chapters.CHAPTERS[0].number}" in run()[1].splitlines()[-1]
    run("start", chapter.number)
    assert {path.name for path in my.glob("*.py")} == {chapter.file(source) for source in chapter.sources}
    solve(my, chapter)
    status, said = run("check", chapter.number)
    assert status == 0 and said.count(": passed") == len(exercise.parts(chapter))
    assert (f"train.py --stage my/{chapter.name}.py" in said) == hunting.is_model(chapter)
    assert f"{len(exercise.parts(chapter))} of " in run()[1]
    assert f"check {chapter.number}" not in run()[1].splitlines()[-1]


def test_a_wrong_exercise_is_explained_even_if_the_last_one_has_passed(run, my):
    chapter, wrong = chapters.find("8.1")
    solve(my, chapter)
    path = my / progress.file(chapter, wrong).name
    path.write_text(cut.patched(path.read_text(), wrong.functions, wrong.mistakes[0].patches))
    status, said = run("check", "8")
    assert status == 1 and "8.1 The grid of a group: not right yet" in said and "Look at:" in said


def test_unfinished_parts_of_the_file_do_not_interfere(run, my, answer):
    status, said = answer("4.1", cut_body("4", "attention"))
    assert status == 0 and "4.1 Attention in groups: passed" in said
    assert run("check", "4.2")[1].count("Not written yet") == 1


def cut_body(number, name):
    """The body of a function of the course."""
    chapter, _ = chapters.find(number)
    source = chapter.reference(chapter.source)
    start, end = cut.body_lines(ast.parse(source), source, name)
    return textwrap.dedent("\n".join(source.splitlines()[start:end]))


def test_an_exception_names_the_learner_s_line_and_the_shapes_there(answer, my):
    status, said = answer("4.1", "a = 1\nscores = q @ k.mT\nreturn scores @ v")
    line = 1 + (my / "stage4.py").read_text().splitlines().index("    scores = q @ k.mT")
    assert status == 1 and f"stage4.py, line {line}, in attention: RuntimeError" in said
    assert "q (2, 6, 5, 8), k (2, 3, 9, 8), v (2, 3, 9, 8)" in said and "Traceback" not in said


def test_an_exception_in_the_course_s_code_names_the_learner_s_line_that_called_it(answer, my):
    bodies = [cut_body("4", name) for name in chapters.find("4.2")[1].functions]
    bodies[0] = bodies[0].replace("config.n_embd // config.n_head", "3")
    status, said = answer("4.2", *bodies)
    text = (my / "stage4.py").read_text().splitlines()
    line = 1 + next(i for i, code in enumerate(text) if "cache.update(self.layer_idx" in code)
    assert status == 1 and f"line {line}, in forward" in said and "(raised in update" in said, said


def test_a_mistake_inside_a_helper_of_the_learner_is_found_at_its_line(my, run, answer):
    answer("4.1", "return helper(q, k, v, mask, dropout)")
    text = (
        my / "stage4.py"
    ).read_text() + "\n\ndef helper(q, k, v, mask, dropout):\n    return q @ missing\n"
    (my / "stage4.py").write_text(text)
    status, said = run("check", "4.1")
    line = len(text.splitlines())
    assert status == 1 and f"line {line}, in helper: NameError" in said


def test_helpers_constants_and_trials_in_the_learner_s_file_are_no_obstacle(my, run, answer):
    answer("4.1", "return Mine.attend(q, k * ONE, v, mask, dropout) + extra(v)")
    text = (my / "stage4.py").read_text().replace("import math\n", "import math\nimport itertools\n")
    text += "\nONE = 1.0\nmodel = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=9))\n"
    text += "print(model)\n\ndef extra(v, scale=ONE):\n    return 0 * next(itertools.count())\n"
    body = "\n        ".join(cut_body("4", "attention").splitlines())
    text += "\nclass Mine(RMSNorm):\n    @staticmethod\n"
    text += f"    def attend(q, k, v, mask, dropout):\n        {body}\n"
    (my / "stage4.py").write_text(text)
    status, said = run("check", "4.1")
    assert status == 0 and ": passed" in said, said


@pytest.mark.parametrize(
    "change,expected",
    [
        (lambda text: text.replace("    repeats = ", "   repeats = "), "line 1"),
        (lambda text: text.replace("    repeats = ", "\trepeats = "), "tabs"),
        (lambda text: text.replace("def attention(", "def attend("), "has no function attention"),
        (lambda text: text.replace("v, mask, dropout):", "v):"), "takes (q, k, v)"),
        (lambda text: text.replace("def attention(", "class attention("), "is a class"),
        (lambda text: text + "\0", "null bytes"),
        (lambda text: "if True\n" + text, "line 1: expected ':'"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_checked_gets_one_clear_message(run, my, change, expected):
    solve(my, chapters.find("4")[0])
    path = my / "stage4.py"
    path.write_text(change(path.read_text()))
    status, said = run("check", "4.1")
    assert status == 1 and expected in said and "Traceback" not in said and len(said.splitlines()) < 7


def test_a_deleted_class_and_a_file_that_is_not_utf8_get_one_clear_message(run, my):
    solve(my, chapters.find("4")[0])
    path = my / "stage4.py"
    text = path.read_text()
    path.write_text(text.replace("class KVCache", "class Cache"))
    assert "has no class KVCache" in run("check", "4.2")[1]
    path.write_bytes(text.encode("utf-16"))
    status, said = run("check", "4.1")
    assert status == 1 and ("not UTF-8" in said or "null bytes" in said)


def test_windows_line_endings_and_a_byte_order_mark_make_no_difference(run, my):
    solve(my, chapters.find("4")[0])
    path = my / "stage4.py"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert run("check", "4.1")[0] == 0 and run("check", "4")[0] == 0


def test_a_loop_that_never_ends_is_stopped_and_named(answer, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.5)
    status, said = answer("4.1", "while True:\n    pass")
    assert status == 1 and "was stopped in line" in said and "in attention" in said


def test_two_mistakes_at_once_are_both_named(answer):
    body = cut_body("4", "attention").replace("repeat_interleave(repeats, dim=1)", "repeat(1, repeats, 1, 1)")
    status, said = answer("4.1", body.replace("* q.size(3) ** -0.5", ""))
    assert status == 1 and "Two things at once" in said
    assert "order k0, k1, k2, k0" in said and "not divided by the root" in said


def test_the_feedback_quoted_in_the_readme_is_what_a_learner_gets(answer):
    body = cut_body("4", "attention").replace("repeat_interleave(repeats, dim=1)", "repeat(1, repeats, 1, 1)")
    _, said = answer("4.1", body)
    assert said in (stages.ROOT / "exercises/README.md").read_text()


def test_of_many_pairs_of_mistakes_the_one_that_explains_most_is_tried_first(answer, monkeypatch):
    monkeypatch.setattr(diagnose, "SECONDS_FOR_PAIRS", 0.8)
    status, said = answer(
        "4.1", "return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)"
    )
    assert status == 1 and "Query i sees the keys up to i" in said and "dropout probability" in said, said


def test_an_unknown_mistake_is_described_by_the_first_wrong_number_and_by_what_holds(answer):
    body = cut_body("4", "attention").replace("return ", "return 3 * ")
    status, said = answer("4.1", body)
    assert status == 1 and "The first is at [0, 0, 0, 0]" in said and "3 times what is expected" in said
    assert "This holds: no position sees a later key" in said and "This does not" in said


def test_an_exception_that_a_known_mistake_also_raises_is_not_taken_for_it_with_other_shapes(answer):
    body = cut_body("4", "attention").replace(
        "repeat_interleave(repeats, dim=1)", "repeat_interleave(1, dim=1)"
    )
    status, said = answer("4.1", body)
    assert (
        status == 1
        and "RuntimeError: The size of tensor a (6)" in said
        and "Positions are repeated" not in said
    )
    body = cut_body("4", "attention").replace("dim=1)", "dim=2)")
    assert "Positions are repeated" in answer("4.1", body)[1]


def test_a_function_without_return_is_named(answer):
    status, said = answer("4.1", "q + 1")
    assert status == 1 and "attention returned nothing (None)" in said


def test_a_whole_diff_without_the_stage_s_functions_gets_feedback_on_the_file(run, my):
    run("start", "6", "--whole")
    text = (my / "stage6.py").read_text()
    (my / "stage6.py").write_text(text[: text.index("\ndef looped_experts")])
    status, said = run("check", "6")
    assert status == 1 and "6.1 The softmax router: not checked alone" in said
    assert "6 The whole stage: not right yet\n  " in said and "moe_intermediate_size" in said


def test_hints_come_one_after_the_other_and_the_solution_only_after_passing(run, my):
    run("start", "1")
    found = [run("hint", "1.1")[1] for _ in range(4)]
    assert [text.split()[1] for text in found] == ["1", "2", "3", "3"] and "--give-up" in found[3]
    status, said = run("solution", "1.1")
    assert status == 2 and "has not passed" in said
    assert run("solution", "1.1", "--give-up")[1].count("def forward") == 1  # the blank is not shown
    solve(my, chapters.find("1")[0])
    run("check", "1.1")
    assert run("solution", "1.1")[1].count("def forward") == 2


def test_progress_survives_damage_with_a_remedy_and_what_has_passed_stays_passed(run, my):
    solve(my, chapters.find("1")[0])
    run("check", "1.1")
    (my / "stage1.py").write_text((my / "stage1.py").read_text().replace("torch.rsqrt", "torch.sqrt"))
    assert run("check", "1.1")[0] == 1
    assert progress.of("1.1")["state"] == "passed"
    (my / "progress.json").write_text("{")
    status, said = run()
    assert status == 2 and "delete it" in said


def test_unknown_names_get_a_suggestion(run):
    assert "did you mean check" in run("chek", "4")[1]
    status, said = run("check", "4.9")
    assert status == 2 and "did you mean 4." in said
    assert "start 4" in run("check", "4.1")[1]
    assert "name an exercise" in run("solution", "4")[1]


def test_without_a_name_the_next_exercise_is_meant(run, my, monkeypatch):
    monkeypatch.setattr(chapters, "CHAPTERS", [chapters.find("1")[0]])
    assert "start 1" in run()[1] and run("start")[0] == 0 and (my / "stage1.py").exists()
    assert "1.1 RMSNorm: not written" in run("check")[1] and "for 1.1 RMSNorm" in run("hint")[1]
    solve(my, chapters.find("1")[0])
    run("check")
    assert "1.2 No biases: passed" in run("check")[1] and "1 The whole stage: passed" in run("check")[1]


def test_watch_checks_at_each_save_and_ends_once_it_passes_or_at_ctrl_c(run, my, monkeypatch):
    run("start", "4")

    def save(seconds):
        assert seconds == exercise.POLL_SECONDS
        if "average" in (my / "stage4.py").read_text() and "repeats = " not in (my / "stage4.py").read_text():
            solve(my, chapters.find("4")[0])
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(exercise.time, "sleep", save)
    status, said = run("watch", "4.1")
    assert status == 0 and said.index("Not written yet") < said.index(": passed")
    status, said = run("watch", "4.2")
    assert status == 0 and ": passed" in said
    (my / "stage4.py").write_text("repeats = 1\n")
    status, said = run("watch", "4.3")
    assert status == 0 and "Traceback" not in said


def test_a_hunt_hides_one_mistake_that_shows_and_judges_answers(run, my, monkeypatch):
    monkeypatch.setattr(hunting, "STEPS", 16)
    chapter, _ = chapters.find("4")
    status, said = run("hunt", "4", "--seed", "1")
    assert status == 0 and "with the mistake" in said
    hunted, source = (my / "hunt4.py").read_text(), (stages.ROOT / chapter.source).read_text()
    lines = hunting.changed_lines(source, hunted)
    place = hunting.function_at(ast.parse(hunted), lines[0])
    wrong = next(name for name in ("causal_mask", "MLP.forward") if name != place)
    assert "No," in run("hunt", "4", "--answer", wrong)[1]
    assert "there is no function" in run("hunt", "4", "--answer", "nothing")[1]
    (my / "hunt4.py").write_text(hunted + "# a note\n")
    assert "# a note" in (run("hunt", "4")[1] and (my / "hunt4.py").read_text())
    status, said = run("hunt", "4", "--answer", place)
    assert "Yes" in said and "Why:" in said
    assert "no hunt is open" in run("hunt", "4", "--answer", place)[1]
    run("hunt", "4", "--seed", "2")
    assert "# a note" in (my / "backups" / "hunt4-1.py").read_text()


def test_predictions_are_computed_and_judged(run, my, monkeypatch):
    right = [question.answer() for question in chapters.find("4")[0].questions]
    assert right[0] == 2 * 12 * 12 * 1024 * 64 * 2 and right[1] * 3 == right[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"36 MiB\nabc\n{right[1] + 1}\n\nlower\n"))
    status, said = run("predict", "4")
    assert status == 0 and said.count("Right.") == 1 and said.count("Not quite.") == 2
    assert "7,077,888" in said and "a number or a product" in said
    assert json.loads((my / "progress.json").read_text())["exercises"]["predict 4"]["right"] == 1


@pytest.mark.parametrize(
    "text,value",
    [("2 * 12 * 64", 1536), ("1,024", 1024), ("36 MiB", 36 * 2**20), ("2^10 bytes", 1024), ("-3/2", -1.5)],
)
def test_a_prediction_may_be_a_product_or_have_a_unit(text, value):
    assert predictions.number(text) == value


@pytest.mark.parametrize("text", ["", "x", "2 **", "__import__('os')", "9**9**9", "1/0", "[1]"])
def test_a_prediction_is_arithmetic_and_nothing_else(text):
    with pytest.raises(ValueError):
        predictions.number(text)


def test_a_learner_s_file_is_trained_sampled_and_compared(
    run, run_train, run_sample, workshop, monkeypatch, capsys
):
    (workshop / "my").mkdir()
    chapter, _ = chapters.find("4")
    run("start", "4")
    assert run_train("--stage", "my/stage4.py", "--steps", "1") == 2
    assert "not written yet: exercise 4.2" in capsys.readouterr().err
    assert not list((workshop / "runs").glob("my_stage4*"))
    solve(workshop / "my", chapter)
    monkeypatch.delitem(sys.modules, "my_stage4.model")  # as in a new process
    assert run_train("--stage", "my/stage4.py", "--steps", "2", "--eval-tokens", "64") == 0
    assert run_train("--stage", "4", "--steps", "2", "--eval-tokens", "64") == 0
    assert run_sample("--stage", "my/stage4.py", "--prompt", "a", "--max-new-tokens", "3") == 0
    assert (
        call(monkeypatch, compare, "--runs", "runs/my_stage4-words-seed0", "runs/stage4_gqa-words-seed0") == 0
    )
    assert "my_stage4" in capsys.readouterr().out
    assert run_train("--stage", "my/other.py") == 2
    assert "does not exist" in capsys.readouterr().err
