"""Stage 6: routing, the fast path against a plain loop over experts, balancing, and statistics."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_training import metrics, stop_at

from lab import stages
from lab.training import cost, optim, presets

STAGE5, STAGE6 = stages.load("stage5_flash"), stages.load("stage6_moe")
SIZES = {"vocab_size": 65, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
ROUTERS = ["softmax", "sigmoid"]
needs_grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch 2.9 has no grouped_mm")


def config(**sizes):
    return STAGE6.GPTConfig(**SIZES | {"router": "softmax"} | sizes)


def moe(**sizes):
    """A mixture with random weights and, with the sigmoid router, biases that change its choices."""
    torch.manual_seed(0)
    made = STAGE6.MoE(config(**sizes)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if made.gate.config.router == "sigmoid":
        made.gate.e_score_correction_bias.normal_(std=0.3)
    return made


def loop(made, x):
    """The mixture, one expert after the other: the reference."""
    weights, indices = made.gate(x.flatten(0, 1))
    y = torch.zeros_like(x.flatten(0, 1))
    for expert, (gate_up, down) in enumerate(
        zip(made.experts.gate_up_proj, made.experts.down_proj, strict=True)
    ):
        token, place = (indices == expert).nonzero(as_tuple=True)
        gate, up = (x.flatten(0, 1)[token] @ gate_up.T).chunk(2, dim=-1)
        output = (F.silu(gate) * up) @ down.T
        y = y.index_add(0, token, output * weights[token, place, None])
    shared = 0 if made.shared_experts is None else made.shared_experts(x)
    return y.view_as(x) + shared


def with_gradients(function, made, x):
    """The output, and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    y = function(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *made.parameters()])
    return [y.detach(), *gradients]


def assert_close(ours, theirs, tolerance=1e-4):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=1e-4)


SHAPES = [
    {},
    {"n_shared_experts": 0},
    {"n_routed_experts": 16, "num_experts_per_tok": 6, "moe_intermediate_size": 16},
    {"n_routed_experts": 5, "num_experts_per_tok": 5, "n_shared_experts": 2},
    {"num_experts_per_tok": 1, "routed_scaling_factor": 2.5},
    {"moe_intermediate_size": 7},  # not a multiple of 16 bytes: the batched path
]


# The fast path


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_the_fast_path_is_the_loop_over_experts(router, sizes):
    made, x = moe(router=router, **sizes), torch.randn(3, 11, 32)
    assert_close(with_gradients(made, made, x), with_gradients(lambda x: loop(made, x), made, x))


@pytest.mark.parametrize("router", ROUTERS)
def test_the_batched_path_is_the_loop_over_experts(router, monkeypatch):
    """What a backend without grouped_mm takes, such as mps."""
    monkeypatch.setattr(STAGE6, "can_use_grouped_mm", lambda x, weight: False)
    made, x = moe(router=router), torch.randn(3, 11, 32)
    assert_close(with_gradients(made, made, x), with_gradients(lambda x: loop(made, x), made, x))


@pytest.mark.parametrize("router", ROUTERS)
def test_without_grouped_mm_as_in_pytorch_2_9_the_mixture_is_the_same(router, monkeypatch):
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    made, x = moe(router=router), torch.randn(3, 11, 32)
    assert_close(with_gradients(made, made, x), with_gradients(lambda x: loop(made, x), made, x))


@needs_grouped_mm
def test_the_grouped_product_is_used_where_it_can_be(monkeypatch):
    calls = []
    real = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(a[0].dtype) or real(*a, **k))
    made, x = moe(), torch.randn(2, 4, 32)
    made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made(x)
    assert calls == [torch.float32] * 4  # a product for gate and up, one for down; on a CPU always in float32
    assert not STAGE6.can_use_grouped_mm(torch.zeros(1, 8, device="meta"), torch.zeros(1, 8, 8))
    for name in ("for expert", "nonzero", ".item()", ".tolist()", "bincount", ".cpu()"):
        assert name not in Path(STAGE6.__file__).read_text()  # no loop over experts, no waiting for the GPU


@pytest.mark.parametrize("router", ROUTERS)
def test_an_expert_without_tokens_answers_nothing_and_gets_no_gradient(router):
    made, x = moe(router=router, n_shared_experts=0), torch.randn(1, 1, 32)
    results = with_gradients(made, made, x)
    assert all(result.isfinite().all() for result in results)
    _, indices = made.gate(x.flatten(0, 1))
    by_expert = torch.autograd.grad(made(x).square().sum(), made.experts.down_proj)[0].abs().sum((1, 2))
    assert (by_expert > 0).nonzero().flatten().tolist() == sorted(indices.flatten().tolist())
    assert_close(results, with_gradients(lambda x: loop(made, x), made, x))


@pytest.mark.parametrize("router", ROUTERS)
def test_bfloat16_and_autocast_agree_with_float32(router):
    made, x = moe(router=router), torch.randn(3, 11, 32)
    exact = made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made(x).float(), exact, atol=0.15, rtol=0.05)
    whole = copy.deepcopy(made).bfloat16()
    rounded = copy.deepcopy(whole).float()  # a rounded router chooses for itself
    torch.testing.assert_close(
        whole(x.bfloat16()).float(), rounded(x.bfloat16().float()), atol=0.15, rtol=0.05
    )


@pytest.mark.parametrize("router", ROUTERS)
def test_a_compiled_model_agrees_with_eager_in_both_precisions(router):
    torch.manual_seed(0)
    model = STAGE6.GPT(config(router=router)).train()
    compiled = torch.compile(model, backend="aot_eager")
    idx = torch.randint(65, (2, 16))
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for run in (model, compiled):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                _, losses = run(idx, targets=idx.roll(-1, 1))
            gradients = torch.autograd.grad(sum(losses.values()), list(model.parameters()))
            results.append([*losses.values(), *gradients])
        assert_close(*results, tolerance=1e-5 if dtype == torch.float32 else 2e-3)
        tokens = model.after_step()["expert_tokens"]
        assert tokens.sum().item() == 2 * 2 * 2 * 2 * 16  # both runs were counted


# The routers


def test_the_default_router_is_that_of_stage_7():
    assert STAGE6.GPTConfig().router == stages.load("stage7_mla_mtp").GPTConfig().router == "sigmoid"


def test_one_expert_without_a_choice_is_the_dense_mlp():
    sizes = {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_shared_experts": 0}
    made = moe(**sizes, moe_intermediate_size=88)
    dense = STAGE5.MLP(STAGE5.GPTConfig(**SIZES, intermediate_size=88))
    gate, up = made.experts.gate_up_proj[0].chunk(2)
    weights = {"gate_proj": gate, "up_proj": up, "down_proj": made.experts.down_proj[0]}
    dense.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(made(x), dense(x))


def test_a_dense_layer_first_is_stage_5s():
    torch.manual_seed(0)
    model = STAGE6.GPT(config(first_k_dense_replace=1))
    assert isinstance(model.model.layers[0].mlp, STAGE6.MLP)
    assert isinstance(model.model.layers[1].mlp, STAGE6.MoE)
    assert len(model.routers()) == 1


def test_softmax_weights_are_those_of_the_indices_alone():
    router = moe().gate
    x = torch.randn(20, 32)
    logits = x @ router.weight.T
    best, expected = logits.topk(2, dim=-1)
    weights, indices = router(x)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(weights, best.softmax(-1))


def test_the_sigmoid_routers_bias_chooses_but_does_not_weigh():
    router = moe(router="sigmoid", routed_scaling_factor=2.5).gate
    x = torch.randn(200, 32)
    scores = (x @ router.weight.T).sigmoid()
    weights, indices = router(x)
    assert torch.equal(indices, (scores + router.e_score_correction_bias).topk(2, dim=-1).indices)
    assert not torch.equal(indices, scores.topk(2, dim=-1).indices)
    picked = scores.gather(1, indices)
    torch.testing.assert_close(weights, 2.5 * picked / picked.sum(-1, keepdim=True))


@pytest.mark.parametrize("router", ROUTERS)
def test_the_router_learns_from_a_single_expert_a_token_too(router):
    made = moe(router=router, num_experts_per_tok=1)
    (gradient,) = torch.autograd.grad(made(torch.randn(2, 8, 32)).square().sum(), made.gate.weight)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("router", ROUTERS)
def test_rounding_does_not_change_the_choice(router):
    made = moe(router=router)
    x = torch.randn(500, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rounded = made.gate(x)
    assert torch.equal(rounded, made.gate(x)[1])


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must be at most n_routed_experts \(8\)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be at least 1, not 0"),
        ({"n_routed_experts": 0}, r"n_routed_experts \(0\)"),
        ({"num_experts_per_tok": 1, "n_shared_experts": -1}, "n_shared_experts must be 0 or more, not -1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be at least 1, not 0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be 0 or more, not -1"),
        ({"first_k_dense_replace": 2}, r"first_k_dense_replace \(2\) .* n_layer \(2\)"),
        ({"router": "random"}, "router must be softmax or sigmoid, not 'random'"),
    ],
)
def test_impossible_mixtures_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        config(**sizes)


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_active_parameters_are_those_of_stage_5(preset):
    """Within 2 %."""
    vocab_size = 50304 if preset == "gpt2" else 65
    counts = []
    for stage in (STAGE5, STAGE6):
        with torch.device("meta"):
            model = stage.GPT(stage.GPTConfig(vocab_size=vocab_size, **presets.PRESETS[preset]["model"]))
        counts.append(cost.active_parameters(model))
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


@needs_grouped_mm
def test_the_flops_of_the_experts_are_counted():
    """Those of a dense MLP as wide as the active experts, and the router's."""
    sizes = SIZES | {"n_embd": 64, "intermediate_size": 96}
    dense = cost.flops_per_token(STAGE5.GPT(STAGE5.GPTConfig(**sizes)))
    mixture = cost.flops_per_token(STAGE6.GPT(STAGE6.GPTConfig(**sizes, moe_intermediate_size=32)))
    assert mixture == dense + 2 * 6 * 64 * 8


# Balance


def train_step(model, idx):
    model.train()
    _, losses = model(idx, targets=idx.roll(-1, 1))
    sum(losses.values()).backward()
    return losses


def test_the_balance_loss_is_alpha_when_balanced_and_larger_when_not():
    model = STAGE6.GPT(config(router_aux_loss_coef=0.01))
    for router in model.routers():
        torch.nn.init.zeros_(router.weight)  # every expert is as probable
    assert train_step(model, torch.randint(65, (8, 16)))["balance"].item() == pytest.approx(0.01)
    router = moe().train().gate
    router.weight.data.zero_()[:2] = 1.0  # the same two for all tokens: each 1/2 of them, and of the scores
    router(torch.ones(10, 32))
    assert router.balance_loss.item() == pytest.approx(8 * (0.5 * 0.5 + 0.5 * 0.5))


def test_the_balance_loss_is_that_of_switch_by_layer():
    model = STAGE6.GPT(config()).train()
    torch.nn.init.normal_(model.routers()[0].weight)
    seen = []
    for router in model.routers():
        router.register_forward_hook(lambda module, inputs, _: seen.append((module, inputs[0])))
    _, losses = model(torch.randint(65, (4, 16)), targets=torch.randint(65, (4, 16)))
    expected = []
    for router, x in seen:
        probs = (x @ router.weight.T).softmax(-1)
        counts = torch.bincount(probs.topk(2).indices.flatten(), minlength=8)
        expected.append(8 * (counts / counts.sum() * probs.mean(0)).sum())
    torch.testing.assert_close(losses["balance"], 0.01 * (expected[0] + expected[1]) / 2)


def test_the_balance_loss_teaches_the_router_alone_to_spread():
    made = moe().train()
    x = torch.randn(4, 16, 32)
    x[..., 0] = 3.0
    made.gate.weight.data[3, 0] = 1.0  # the favourite
    optimizer = torch.optim.SGD([made.gate.weight], lr=0.5)
    busiest = []
    for _ in range(60):
        made(x)
        busiest.append((made.gate.tokens_per_expert.max() / made.gate.tokens_per_expert.sum()).item())
        made.gate.tokens_per_expert.zero_()
        optimizer.zero_grad()
        made.gate.balance_loss.backward()
        optimizer.step()
    assert busiest[-1] < busiest[0] - 0.1


def test_evaluation_has_no_balance_loss_and_counts_nothing():
    model = STAGE6.GPT(config()).eval()
    idx = torch.randint(65, (2, 16))
    assert set(model(idx, targets=idx)[1]) == {"next_token"}
    assert not any(router.tokens_per_expert.any() or router.entropy for router in model.routers())
    assert set(model.train()(idx, targets=idx)[1]) == {"next_token", "balance"}
    assert set(STAGE6.GPT(config(router="sigmoid")).train()(idx, targets=idx)[1]) == {"next_token"}


def test_no_graph_is_kept_after_the_step():
    model = STAGE6.GPT(config())
    train_step(model, torch.randint(65, (2, 16)))
    held = [value for module in model.modules() for value in vars(module).values()]
    assert not [value for value in held if isinstance(value, torch.Tensor) and value.grad_fn is not None]
    assert not [buffer for buffer in model.buffers() if buffer.grad_fn is not None]


def test_the_bias_moves_towards_balance_once_a_step_by_its_speed():
    model = STAGE6.GPT(config(router="sigmoid"))
    idx = torch.randint(65, (4, 16))
    for part in idx.split(2):  # two micro-batches, one step
        train_step(model, part)
    model.eval()(idx)  # an evaluation between is not counted
    counts = torch.stack([router.tokens_per_expert for router in model.routers()]).clone()
    assert counts.sum().item() == 2 * 4 * 16 * 2
    statistics = model.after_step()
    assert torch.equal(statistics["expert_tokens"], counts)
    for router, n in zip(model.routers(), counts, strict=True):
        torch.testing.assert_close(router.e_score_correction_bias, 0.001 * (n.mean() - n).sign())
        assert not router.tokens_per_expert.any() and not router.entropy


def test_the_bias_balances_where_no_loss_does():
    made = moe(router="sigmoid").train()
    made.gate.e_score_correction_bias.zero_()
    x = torch.randn(8, 16, 32)
    x[..., 0] = 3.0
    made.gate.weight.data[3, 0] = 1.0
    model = STAGE6.GPT(config(router="sigmoid", bias_update_speed=0.02, n_layer=1))
    model.model.layers[0].mlp = made
    shares = []
    for _ in range(60):
        made(x)
        tokens = model.after_step()["expert_tokens"][0]
        shares.append((tokens.max() / tokens.sum()).item())
    assert shares[0] > 0.25 and shares[-1] < 0.2


def test_accumulation_moves_the_bias_as_one_batch_does():
    idx = torch.randint(65, (4, 16))
    biases = []
    for micro_batch in (4, 1):
        torch.manual_seed(0)
        model = STAGE6.GPT(config(router="sigmoid")).train()
        optim.accumulate_gradients(
            model, idx, idx.roll(-1, 1), micro_batch, torch.autocast("cpu", enabled=False)
        )
        model.after_step()
        biases.append([router.e_score_correction_bias for router in model.routers()])
    assert all(torch.equal(*pair) for pair in zip(*biases, strict=True))


def test_the_entropy_is_that_of_the_scores():
    model = STAGE6.GPT(config())
    for router in model.routers():
        torch.nn.init.zeros_(router.weight)
    train_step(model, torch.randint(65, (2, 16)))
    torch.testing.assert_close(model.after_step()["router_entropy"], torch.full((2,), math.log(8)))


# In the trainer


@pytest.mark.parametrize("router", ROUTERS)
def test_a_run_resumes_with_its_biases(run_train, workshop, monkeypatch, router):
    flags = (
        "--stage",
        "6",
        "--model.router",
        router,
        "--steps",
        "12",
        "--eval-every",
        "4",
        "--log-every",
        "1",
    )
    assert run_train(*flags, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert run_train(*flags, "--out", "stopped") == 128 + 15
    assert run_train("--resume", "--out", "stopped") == 0
    assert metrics("stopped") == metrics("whole")


def test_what_the_routers_do_is_in_the_metrics_and_in_a_picture(run_train, workshop, capsys):
    flags = ("--stage", "6", "--model.router", "softmax", "--steps", "6", "--log-every", "2")
    assert run_train(*flags, "--out", "run", report=True) == 0
    for record in metrics("run"):
        assert [sum(layer) for layer in record["expert_tokens"]] == [2 * 4 * 8] * 2
        assert len(record["router_entropy"]) == 2 and 0 < record["router_entropy"][0] <= math.log(8) + 1e-4
        shares = [max(layer) / sum(layer) for layer in record["expert_tokens"]]
        assert record["busiest_expert"] == pytest.approx(max(shares))
        assert record["balance"] >= 0.009
    assert (workshop / "run" / "experts.png").stat().st_size > 10_000
    assert "experts.png" in capsys.readouterr().out
