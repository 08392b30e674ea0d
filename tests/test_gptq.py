"""GPTQ: reductions to simpler methods, the order of columns, and the passes through a model's layers."""

import pytest
import torch

from deploy.quantization.calibration import RARE, first_inputs, hessian_of, quantize_layer, relative_error
from deploy.quantization.gptq import gptq
from deploy.quantization.grid import dequantize, find_grid, to_codes
from deploy.quantization.rtn import rtn

BITS = [2, 3, 4]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def correlated(tokens, n_in):
    """Inputs (tokens, n_in) whose channels are correlated, and of different sizes."""
    return torch.randn(tokens, n_in // 4) @ torch.randn(n_in // 4, n_in) + 0.3 * torch.randn(tokens, n_in)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, None])
def test_with_a_diagonal_hessian_gptq_is_round_to_nearest(act_order, bits, group_size):
    """Uncorrelated inputs cannot make up for each other's errors. The last group is ragged."""
    weight, hessian = torch.randn(24, 40), torch.diag(torch.rand(40) + 0.1)
    assert same(gptq(weight, hessian, bits, group_size, act_order), rtn(weight, bits, group_size))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [8, 12, None])
def test_the_block_size_changes_nothing(act_order, group_size):
    """Also if a group begins inside a block and ends in another one."""
    weight, hessian = torch.randn(16, 52), hessian_of(correlated(400, 52), "")
    whole = gptq(weight, hessian, 3, group_size, act_order, block=52)
    for block in (1, 5, 8, 16):
        other = gptq(weight, hessian, 3, group_size, act_order, block=block)
        assert (other.codes != whole.codes).float().mean() < 0.01  # ties, decided by the last bit
        error, expected = (relative_error(weight, q, hessian) for q in (other, whole))
        assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [*BITS, 8])
def test_the_error_is_never_above_that_of_round_to_nearest(act_order, bits):
    for seed in range(5):
        torch.manual_seed(seed)
        weight, hessian = torch.randn(32, 64), hessian_of(correlated(300, 64), "")
        for group_size in (16, 48, None):
            ours = relative_error(weight, gptq(weight, hessian, bits, group_size, act_order), hessian)
            assert ours < relative_error(weight, rtn(weight, bits, group_size), hessian)


def optimal_brain_quantizer(weight, hessian, bits, group_size, order, ridge):
    """The same by brute force, in float64: after each column, the best values of all columns that are left.

    It inverts the Hessian of those columns anew each time (arXiv 2208.11580, equation 2). Static groups.
    """
    scale, zero = find_grid(weight, bits, group_size)
    weight, left = weight.double().clone(), list(order)
    hessian = hessian.double() + ridge * torch.eye(len(hessian), dtype=torch.float64)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for column in order:
        inverse = hessian[left][:, left].inverse()
        group = column // group_size
        grid = scale[:, group, None], zero[:, group, None]
        codes[:, column] = to_codes(weight[:, column, None], *grid, bits, None)[:, 0]
        error = weight[:, column] - (codes[:, column] - grid[1][:, 0]) * grid[0][:, 0]
        here = left.index(column)
        weight[:, left] -= error[:, None] * inverse[here] / inverse[here, here]
        left.remove(column)
    return codes


@pytest.mark.parametrize("act_order", [False, True])
def test_it_equals_a_brute_force_optimal_brain_quantizer(act_order):
    """On several blocks and groups: an index within the block is not one in the matrix."""
    for seed in range(5):
        torch.manual_seed(seed)
        n_in, group_size = 24, 8 if act_order else 24
        weight, hessian = torch.randn(6, n_in), hessian_of(correlated(200, n_in), "")
        order = list(range(n_in))
        if act_order:
            order = hessian.diagonal().argsort(descending=True).tolist()
        ridge = 0.01 * hessian.diagonal().mean().item()
        expected = optimal_brain_quantizer(weight, hessian, 3, group_size, order, ridge)
        assert torch.equal(gptq(weight, hessian, 3, group_size, act_order, block=5).codes, expected)


def test_each_group_in_each_block_has_its_own_grid():
    """A public bug: by a column's index in its block, groups of later blocks get the first ones' grids."""
    sizes = torch.logspace(-2, 2, 8).repeat_interleave(8)  # from group to group, weights grow 3.7 times
    weight, hessian = torch.randn(16, 64) * sizes, hessian_of(correlated(300, 64), "")
    q = gptq(weight, hessian, 4, 8, act_order=False, block=16)
    assert (q.scale[:, -1] / q.scale[:, 0]).min() > 1000
    by_group = ((dequantize(q) - weight).abs() / sizes).unflatten(1, (8, 8)).amax((0, 2))
    assert by_group.max() < 2


def test_the_order_of_act_order_is_undone():
    """The codes are in the order of the input channels, whatever the order in which they were found."""
    weight, hessian = torch.randn(16, 48), hessian_of(correlated(300, 48), "")
    there = torch.randperm(48)
    q = gptq(weight, hessian, 4, None)
    shuffled = gptq(weight[:, there], hessian[there][:, there], 4, None)
    assert (shuffled.codes != q.codes[:, there]).float().mean() < 0.01
    assert (dequantize(q) - weight).abs().max() < 2 * q.scale.max()


def test_with_act_order_the_groups_stay_those_of_neighbours_in_a_row():
    weight, hessian = torch.randn(16, 48), hessian_of(correlated(300, 48), "")
    q = gptq(weight, hessian, 4, 16)
    scale, zero = find_grid(weight, 4, 16)
    assert torch.equal(q.scale, scale) and torch.equal(q.zero, zero)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_dead_input_becomes_0_and_changes_no_other_column(act_order):
    x = correlated(300, 40)
    x[:, 7] = 0
    weight, hessian = torch.randn(16, 40), hessian_of(x, "")
    others = [i for i in range(40) if i != 7]
    q = gptq(weight, hessian, 3, None, act_order)
    without = gptq(weight[:, others], hessian[others][:, others], 3, None, act_order)
    assert not dequantize(q)[:, 7].any()
    assert (q.codes[:, others] != without.codes).float().mean() < 0.01


@pytest.mark.parametrize("act_order", [False, True])
def test_the_last_group_may_be_ragged(act_order):
    weight, hessian = torch.randn(16, 43), hessian_of(correlated(300, 43), "")
    q = gptq(weight, hessian, 4, 16, act_order)
    assert q.codes.shape == (16, 43) and q.scale.shape == (16, 3)
    assert relative_error(weight, q, hessian) < relative_error(weight, rtn(weight, 4, 16), hessian)


def test_calibration_text_given_twice_changes_nothing():
    x, weight = correlated(300, 40), torch.randn(16, 40)
    once, twice = (gptq(weight, hessian_of(given, ""), 3, 16) for given in (x, torch.cat((x, x))))
    assert (once.codes != twice.codes).float().mean() < 0.01
    assert torch.equal(once.scale, twice.scale)


def test_a_singular_hessian_is_damped_more_and_said_aloud(capsys):
    direction = torch.randn(1, 64) * 1e3
    q = gptq(torch.randn(8, 64), direction.T @ direction, 4, 16, damping=1e-10)
    assert "64 inputs is not positive definite: its damping is" in capsys.readouterr().err
    assert torch.isfinite(dequantize(q)).all()


# The passes through a model.


def by_gptq(name, weight, hessian, mean_diagonal):
    if hessian is None:
        return rtn(weight, 4, 16)
    return gptq(weight, hessian, 4, 16, mean_diagonal=mean_diagonal)


def quantized_layer(model, number=0, tokens=64 * 16):
    """A layer of the model quantized in place on random tokens: its input, the rest, its output, Done."""
    idx = torch.randint(model.config.vocab_size, (tokens // 16, 16))
    args = first_inputs(model, idx)
    output, done = quantize_layer(model.model.layers[number], args, by_gptq)
    return args, output, done


def test_every_matrix_of_a_layer_is_quantized_and_nothing_else(make_model):
    model = make_model()
    layer = model.model.layers[0]
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    args, output, done = quantized_layer(model)
    left = {"norm", "mlp.gate.weight", "bias", "correction"}
    for name, parameter in layer.named_parameters():
        module = name.removesuffix(".weight")
        if any(word in name for word in left):
            assert torch.equal(parameter, before[name]) and module not in done.quantized
        elif "experts." in name and not name.endswith(".weight"):
            stack = torch.stack([dequantize(q) for q in done.quantized[name]])
            assert torch.equal(parameter, stack)
        else:
            assert torch.equal(parameter, dequantize(done.quantized[module]))
    assert torch.allclose(output, layer(*args), atol=1e-6)  # what the next layer gets is already quantized
    assert done.quantized.keys() == done.errors.keys() and max(done.errors.values()) < 0.02


def test_a_matrix_sees_the_errors_of_those_before_it(make_model):
    """Its Hessian is that of the inputs which the quantized matrices before it make."""
    model, hessians = make_model(), {}

    def keep(name, weight, hessian, mean_diagonal):
        hessians[name] = hessian
        return rtn(weight, 2, None)

    args = first_inputs(model, torch.randint(65, (64, 16)))
    layer = model.model.layers[0]
    _, done = quantize_layer(layer, args, keep)
    for name, module in layer.named_modules():
        if name in done.quantized:
            module.weight.data = dequantize(done.quantized[name])
    seen = []
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer(*args)
    assert torch.allclose(hessians["self_attn.o_proj"], hessian_of(seen[0], ""), atol=1e-6)


@pytest.fixture
def moe():
    """A tiny stage 6."""
    from lab import stages

    stage = stages.load("stage6_moe")
    sizes = {"vocab_size": 65, "block_size": 16, "n_layer": 1, "n_head": 4, "n_embd": 32}
    return stage.GPT(stage.GPTConfig(**sizes)).eval()


def test_each_expert_is_quantized_on_the_tokens_routed_to_it(moe):
    """An expert's Hessian is damped like the others', however few tokens it gets."""
    layer = moe.model.layers[0]
    stack = layer.mlp.experts.gate_up_proj.data.clone()
    seen = []
    layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    _, _, done = quantized_layer(moe)
    x, _, indices = seen[0]
    for e, q in enumerate(done.quantized["mlp.experts.gate_up_proj"]):
        mine = (indices == e).any(-1)
        hessian = 2 * x[mine].T @ x[mine] / (indices.numel() / 8)
        mean = 2 * x.square().mean().item()
        assert (gptq(stack[e], hessian, 4, 16, mean_diagonal=mean).codes != q.codes).float().mean() < 0.01


def test_a_rarely_chosen_expert_is_rounded_to_nearest_and_reported(moe):
    layer = moe.model.layers[0]
    layer.mlp.gate.e_score_correction_bias[3] = -100  # never chosen
    stack = layer.mlp.experts.gate_up_proj.data.clone()
    _, _, done = quantized_layer(moe)
    assert done.rare == {f"mlp.experts.{name}_proj": [3] for name in ("gate_up", "down")}
    assert same(done.quantized["mlp.experts.gate_up_proj"][3], rtn(stack[3], 4, 16))
    assert RARE < 64 * 16 * 2 / 8  # the others get enough
