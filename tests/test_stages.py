"""What every stage promises; each test runs for every stage there is."""

import ast
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL

from lab import stages
from lab.training import cost


def tokens(batch_size=2, length=16):
    return torch.randint(
        TINY_MODEL["vocab_size"], (batch_size, length), generator=torch.Generator().manual_seed(1)
    )


def test_changing_a_future_token_never_changes_past_logits(make_model):
    model, idx = make_model(), tokens()
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % TINY_MODEL["vocab_size"]
        before, after = model(idx)[0], model(changed)[0]
        # An expert multiplies all its tokens at once, and how many these are changes the last digit.
        atol = 1e-6 if hasattr(model, "routers") else 0.0
        torch.testing.assert_close(before[:, :t], after[:, :t], atol=atol, rtol=0)
        assert not torch.equal(before[:, t], after[:, t])


def test_targets_do_not_change_the_logits(make_model):
    model, idx = make_model(), tokens()
    assert torch.equal(model(idx)[0], model(idx, targets=idx)[0])


def test_prefill_and_one_by_one_equal_the_full_forward(make_model):
    model, idx = make_model(), tokens()
    full, losses = model(idx)
    assert losses == {}
    cache = model.new_cache(2, 16)
    steps = [model(idx[:, :5], cache=cache)[0]]
    for t in range(5, 16):
        assert cache.length == t
        steps.append(model(idx[:, t : t + 1], cache=cache)[0])
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(16,), (1, 15), (7, 1, 8), (3, 3, 3, 3, 3, 1)])
def test_prefill_in_chunks_equals_the_full_forward(make_model, sizes):
    model, idx = make_model(), tokens()
    cache = model.new_cache(2, 16)
    chunks = [model(chunk, cache=cache)[0] for chunk in idx.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(idx)[0], atol=1e-5, rtol=0)


def test_a_full_cache_says_so(make_model):
    model = make_model()
    cache = model.new_cache(2, 8)
    with pytest.raises(ValueError, match="8"):
        model(tokens(length=9), cache=cache)


def test_a_cache_occupies_what_it_says(make_model):
    cache = make_model().new_cache(2, 8)
    stored = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    assert cache.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in stored) > 0


def test_the_loss_at_the_start_is_that_of_a_uniform_guess(make_model):
    idx = tokens(8)
    _, losses = make_model()(idx, targets=idx.roll(1, dims=1))
    assert losses["next_token"].item() == pytest.approx(math.log(TINY_MODEL["vocab_size"]), abs=0.15)


def test_next_token_loss_is_plain_cross_entropy_without_ignored_targets(make_model):
    model, idx = make_model(), tokens()
    targets = tokens(4)[2:]
    targets[:, 3:9] = -1
    logits, losses = model(idx, targets)
    chosen = logits.log_softmax(-1)[targets != -1]
    expected = -chosen[range(len(chosen)), targets[targets != -1]].mean()
    torch.testing.assert_close(losses["next_token"], expected)


def test_one_batch_can_be_learned_by_heart(make_model):
    model, idx = make_model(), tokens()
    targets = tokens(4)[2:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        _, losses = model(idx, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert losses["next_token"].item() < 0.02


def test_every_parameter_gets_a_gradient(make_model):
    model, idx = make_model(), tokens(8)
    _, losses = model(idx, targets=idx.roll(-1, dims=1))
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_weights_start_with_the_stds_of_gpt2(stage):
    torch.manual_seed(0)
    model = stage.GPT(stage.GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(
                parameter, torch.full_like(parameter, float("norm" in name and "weight" in name))
            )
            continue
        adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
        expected = 0.02 / math.sqrt(2 * 8) if adds_to_residual else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_a_tied_head_is_one_matrix_counted_once(make_model):
    tied, untied = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert cost.parameters(untied) - cost.parameters(tied) == tied.lm_head.weight.numel()


def test_dropout_acts_in_training_alone(make_model):
    model, idx = make_model(dropout=0.5), tokens()
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize(
    "sizes, named",
    [
        ({"n_embd": 30, "n_head": 4}, ["n_embd", "30", "n_head", "4"]),
        ({"n_layer": 0}, ["n_layer", "0"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"vocab_size": -1}, ["vocab_size", "-1"]),
    ],
)
def test_impossible_sizes_are_named_with_their_values(stage, sizes, named):
    with pytest.raises(ValueError) as error:
        stage.GPTConfig(**TINY_MODEL | sizes)
    assert all(word in str(error.value) for word in named)


def test_a_model_can_be_made_without_memory(stage):
    with torch.device("meta"):
        model = stage.GPT(stage.GPTConfig(**TINY_MODEL))
        _, losses = model(torch.zeros(1, 8, dtype=torch.int64), targets=torch.zeros(1, 8, dtype=torch.int64))
    sum(losses.values()).backward()


def test_bfloat16_autocast_agrees_with_float32(make_model):
    model, idx = make_model(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, losses = model(idx, targets=idx)
    assert losses["next_token"].dtype == torch.float32
    torch.testing.assert_close(logits.float(), model(idx)[0], atol=0.02, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_gives_nearly_the_same_logits_with_and_without_a_cache(make_model, dtype):
    model, idx = make_model().eval(), tokens()
    expected, _ = model(idx)
    model.to(dtype)
    with torch.inference_mode():
        found, _ = model(idx)
        cache = model.new_cache(*idx.shape)
        cached = [model(part, cache=cache)[0] for part in idx.split([3] + [1] * (idx.size(1) - 3), dim=1)]
    for logits in (found, torch.cat(cached, dim=1)):
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, atol=0.03, rtol=0.05)


def test_a_model_stands_alone(stage):
    """It imports torch, flash-attn and Python's own modules; of ours, the kernel that lies beside stage 5."""
    tree = ast.parse(Path(stage.__file__).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= {"torch", "math", "dataclasses", "flash_attn"}


def test_the_docstring_says_what_the_stage_is_in_ten_lines(stage):
    assert 3 <= len(stage.__doc__.strip().splitlines()) <= 10


def test_every_field_of_the_config_has_a_help_text(stage):
    lines = Path(stage.__file__).read_text().splitlines()
    for name in stage.GPTConfig.__dataclass_fields__:
        (number,) = (n for n, line in enumerate(lines) if line.startswith(f"    {name}: "))
        assert lines[number + 1].strip().startswith('"""'), name


def test_stages_are_found_by_number_and_by_name():
    for name in stages.course():
        assert stages.find(stages.number(name)) == stages.find(name) == name
    assert stages.find("7a") == stages.find("mla") == stages.find("stage7_mla_mtp/mla.py") == "stage7a_mla"
    assert stages.find("7") == stages.find("stage7_mla_mtp/") == "stage7_mla_mtp"
    assert stages.find("deepseek_v3") == stages.find("family/deepseek_v3") == "deepseek_v3"
    assert stages.find("family/deepseek_v3/model.py") == stages.find("./family/deepseek_v3/") == "deepseek_v3"
    assert stages.find("stage4_gqa/model.py") == stages.find(str(stages.path("stage4_gqa"))) == "stage4_gqa"
