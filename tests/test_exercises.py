"""The exercises: each mistake is caught and gets its own diagnosis, and right solutions in any style pass."""

import ast
import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from deploy.quantization.gptq import gptq
from exercises import cut, diagnose, probe, quantization, stage7
from exercises.chapters import CHAPTERS, find
from exercises.diagnose import PASSED, UNWRITTEN, WRONG
from exercises.probe import TOLERANCE
from lab import stages
from lab.sampling import generation

FILE = stages.ROOT / "my" / "answer.py"  # is never written
EXERCISES = [
    pytest.param(chapter, exercise, id=exercise.number)
    for chapter in CHAPTERS
    for exercise in chapter.exercises
]
WHOLE = [pytest.param(c, c.whole, id=f"{c.number} whole") for c in CHAPTERS if c.whole]
every_exercise = pytest.mark.parametrize("chapter,exercise", EXERCISES)


def reference(chapter, exercise):
    return chapter.reference(chapter.source_of(exercise))


def rewritten(chapter, exercise, rewrite):
    """A rewrite as a learner's file would have it, as a syntax tree."""
    source = reference(chapter, exercise)
    if not isinstance(rewrite.code, str):
        return ast.parse(cut.patched(source, exercise.functions, rewrite.code))
    code = ast.parse(rewrite.code)
    return cut.merged(source, code, [name for name in exercise.functions if cut.find(code, name)])


@every_exercise
def test_a_blank_is_not_written_and_the_course_s_code_passes(chapter, exercise):
    source = reference(chapter, exercise)
    blanked = cut.blank(source, dict.fromkeys(exercise.functions, exercise.number))
    feedback = diagnose.check(chapter, exercise, ast.parse(blanked), FILE)
    assert feedback.state == UNWRITTEN, feedback
    feedback = diagnose.check(chapter, exercise, ast.parse(source), FILE)
    assert feedback.state == PASSED, feedback


@every_exercise
def test_putting_the_solution_into_the_blanks_gives_the_course_s_code(chapter, exercise):
    source = reference(chapter, exercise)
    blanked = cut.blank(source, dict.fromkeys(exercise.functions, exercise.number))
    assert blanked != source
    restored = cut.merged(blanked, ast.parse(source), exercise.functions)
    assert ast.dump(restored) == ast.dump(ast.parse(source))


@pytest.mark.parametrize("chapter,exercise", EXERCISES + WHOLE)
def test_each_mistake_is_caught_and_gets_its_own_diagnosis(chapter, exercise):
    source = reference(chapter, exercise)
    expected = diagnose.outcome_of(exercise, source)
    outcomes = {m.name: diagnose.outcome_of(exercise, source, m) for m in exercise.mistakes}
    assert len(outcomes) == len(exercise.mistakes)
    for name, outcome in outcomes.items():
        assert probe.distance(outcome, expected) > 4 * TOLERANCE, f"{name} is not caught"
    for (one, a), (other, b) in itertools.combinations(outcomes.items(), 2):
        assert min(probe.distance(a, b), probe.distance(b, a)) > 4 * TOLERANCE, f"{one} looks like {other}"


@every_exercise
def test_right_solutions_pass_in_any_style_and_a_mistake_in_another_style_is_recognized(chapter, exercise):
    source = reference(chapter, exercise)
    expected = diagnose.outcome_of(exercise, source)
    for rewrite in exercise.rewrites:
        code = rewritten(chapter, exercise, rewrite)
        outcome = probe.run(exercise.probes, probe.load(code))
        distance = probe.distance(outcome, expected)
        if not rewrite.mistake:
            assert distance <= TOLERANCE / 10, f"{rewrite.name}: {distance:.1e} {outcome.raised}"
        else:
            feedback = diagnose.judge(exercise, source, code, FILE)
            assert (feedback.state, feedback.mistakes) == (WRONG, (rewrite.mistake,)), rewrite.name


@pytest.mark.parametrize("chapter,exercise", EXERCISES + WHOLE)
def test_feedback_is_in_whole_sentences_shows_no_code_and_blames_nobody(chapter, exercise):
    for mistake in exercise.mistakes:
        parts = (mistake.observed, mistake.why, mistake.look)
        assert all(part.rstrip(")").endswith(".") for part in parts), mistake.name
        assert not re.search(r"\b(you|your|self\.\w+|torch\.\w+)\b", " ".join(parts).lower()), mistake.name


@pytest.mark.parametrize("chapter,exercise", EXERCISES + WHOLE)
def test_what_should_hold_for_a_right_solution_holds_for_the_course_s_code(chapter, exercise):
    module = probe.load(reference(chapter, exercise))
    with torch.no_grad():
        for text, holds in exercise.properties.items():
            assert holds(module), text


def test_the_sorted_experts_can_be_checked_in_a_pytorch_without_grouped_mm(monkeypatch):
    chapter, exercise = find("6.5")
    expected = diagnose.outcome_of(exercise, reference(chapter, exercise))
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    outcome = probe.run(exercise.probes, probe.load(reference(chapter, exercise)))
    assert probe.distance(outcome, expected) <= TOLERANCE / 10, outcome.raised


def test_the_exact_probabilities_of_speculative_decoding_are_those_of_the_paper():
    """A draft is accepted with min(1, p / q), and the token has the model's distribution p."""
    accepted = stage7.chances(generation, stage7.P, stage7.Q)
    assert torch.allclose(accepted, (stage7.P / stage7.Q).clamp_max(1), atol=1e-6)
    assert torch.allclose(stage7.in_the_end(generation, stage7.P, stage7.Q, accepted), stage7.P, atol=1e-6)


def test_the_loop_of_gptq_in_the_exercise_gives_the_codes_of_the_course_s_gptq():
    chapter, exercise = find("8.3")
    weight, hessian = quantization.layer_to_round()
    module = probe.load(reference(chapter, exercise))
    theirs = gptq(weight, hessian, 4, None, act_order=False, damping=0.0, block=5)
    assert torch.equal(module.round_columns(weight, hessian, 4), theirs.codes)


@pytest.mark.parametrize(
    "number,answers", [("8", [4.375, 0.0498, 6_291_456, 0]), ("9", [7, 16, 14, "its end"])]
)
def test_predictions_on_quantization_and_serving_are_as_in_their_explanations(number, answers):
    chapter, _ = find(number)
    computed = [question.answer() for question in chapter.questions]
    assert [a if isinstance(a, str) else pytest.approx(a, rel=1e-3) for a in answers] == computed
