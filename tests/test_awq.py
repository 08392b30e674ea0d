"""AWQ: folding scales changes no output, and the searches for scales and ranges find what they promise."""

import pytest
import torch
import torch.nn as nn

from deploy.quantization import awq
from deploy.quantization.calibration import first_inputs, hessian_of, quantize_layer
from deploy.quantization.grid import dequantize
from deploy.quantization.rtn import rtn
from lab import stages
from lab.errors import UserError


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def uneven(model):
    """The model with norms whose channels differ, and no bias of 0."""
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data = parameter + 0.3 * torch.randn_like(parameter)
    return model


def fold(model, idx, bits=3, dtype=torch.float32):
    """Folds scales into every layer of the model, MTP blocks included; returns each layer's α."""
    x, *rest = first_inputs(model, idx)
    alphas = []
    for number, layer in enumerate(model.model.layers):
        args = (x, *rest)
        if number == model.config.n_layer:  # the first MTP block
            args = (model.model.norm(x), model.model.embed_tokens(idx.roll(-1, 1)), *rest)
        alphas.append(awq.fold_layer(layer, args, bits, 16, dtype))
        x = layer(*args)
    return alphas


def small(stage, **sizes):
    """A tiny model of a stage by name, with uneven norms."""
    module = stages.load(stage)
    sizes = {"vocab_size": 65, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32} | sizes
    return uneven(module.GPT(module.GPTConfig(**sizes)).eval())


def test_folding_changes_neither_logits_nor_routing(make_model):
    model, idx = uneven(make_model()), torch.randint(65, (32, 17))
    routed = []
    for module in model.modules():
        if type(module).__name__ == "Router":
            module.register_forward_hook(lambda module, inputs, output: routed.append(output[1]))
    idx, targets = idx[:, :-1], idx[:, 1:]
    before, losses = model(idx, targets)
    chosen = list(routed)
    alphas = fold(model, idx)
    assert max(max(each.values()) for each in alphas) > 0  # something was scaled
    routed.clear()
    after, losses_after = model(idx, targets)
    assert torch.allclose(after, before, atol=2e-5)
    assert all(torch.equal(a, b) for a, b in zip(routed, chosen, strict=True))
    for name, loss in losses.items():  # "mtp" depends on the MTP block
        assert torch.allclose(loss, losses_after[name], atol=1e-5)


@pytest.mark.parametrize("stage", ["stage7_mla_mtp", "deepseek_v3"])
def test_the_latents_of_mla_and_both_norms_of_an_mtp_block_take_scales(stage):
    sizes = {"q_lora_rank": 24} if stage == "deepseek_v3" else {}
    model, idx = small(stage, **sizes), torch.randint(65, (32, 16))
    before = model(idx)[0]
    alphas = fold(model, idx)
    assert torch.allclose(model(idx)[0], before, atol=2e-5)
    latents = {"self_attn.kv_b_proj"} | ({"self_attn.q_b_proj"} if sizes else set())
    assert all(latents | {"mlp.experts", "mlp.shared_experts.down_proj"} <= each.keys() for each in alphas)
    assert "eh_proj" in alphas[-1]


def test_only_what_commutes_is_folded():
    """v → o needs a row of v for each column of o. GELU does not commute with a scale, SwiGLU does."""
    into = {}
    for stage in ("stage0_gpt", "stage3_swiglu", "stage4_gqa", "stage6_moe"):
        into[stage] = {fold.inspected for fold in awq.folds(small(stage).model.layers[0])}
    assert into["stage0_gpt"] == {"self_attn", "self_attn.o_proj", "mlp"}
    assert into["stage3_swiglu"] == {"self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"}
    assert into["stage4_gqa"] == {"self_attn", "mlp", "mlp.down_proj"}
    assert into["stage6_moe"] == {"self_attn", "mlp", "mlp.shared_experts.down_proj"}


@pytest.mark.parametrize("stage", ["stage3_swiglu", "stage7_mla_mtp"])
def test_with_an_alpha_of_0_awq_is_round_to_nearest(stage, monkeypatch):
    monkeypatch.setattr(awq, "N_ALPHA", 1)
    model, idx = small(stage), torch.randint(65, (32, 16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold(model, idx)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def outliers(n_in):
    """A linear layer and its inputs, a few of which are 30 times as large as the others."""
    reader = nn.Linear(n_in, 24, bias=False)
    x = torch.randn(256, n_in)
    x[:, 3::17] *= 30
    return reader, x


def test_the_best_scales_lower_the_error_where_channels_differ():
    reader, x = outliers(48)
    wanted, weight = reader(x), reader.weight.clone()
    scales, alpha = awq.best_scales(x.abs().mean(0), [(reader, "weight")], lambda: reader(x), 3, 16)
    assert torch.equal(reader.weight, weight)  # the search leaves the weights as they were

    def error(s):
        return (x @ (awq.round_to_nearest(weight * s, 3, 16) / s).T - wanted).square().mean()

    assert alpha > 0 and error(scales) < 0.5 * error(torch.ones(48))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, None])
def test_clipping_never_worsens_its_own_loss(bits, group_size):
    """In no row and group, the ragged last one included."""
    reader, x = outliers(43)
    weight, hessian = reader.weight.data, hessian_of(x, "")
    weight[:, 5] *= 10  # worth clipping
    losses = [
        awq.group_losses(weight - dequantize(q), hessian, group_size)
        for q in (awq.clip(weight, hessian, bits, group_size), rtn(weight, bits, group_size))
    ]
    assert (losses[0] <= losses[1]).all()
    assert bits == 8 or losses[0].sum() < 0.999 * losses[1].sum()


def test_a_groups_loss_is_that_of_its_part_of_the_output():
    _, x = outliers(43)
    change = torch.randn(24, 43)
    losses = awq.group_losses(change, hessian_of(x, ""), 16)
    assert losses.shape == (24, 3)
    expected = 2 * (x[:, 32:] @ change[:, 32:].T).square().mean(0)
    assert torch.allclose(losses[:, 2], expected, rtol=1e-3)


def test_projections_to_queries_and_keys_are_not_clipped():
    clipped = [
        name
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "kv_b_proj", "up_proj", "q_a_proj")
        if awq.may_clip(f"self_attn.{name}")
    ]
    assert clipped == ["v_proj", "o_proj", "up_proj"]


def test_a_channel_that_is_always_zero_does_no_harm():
    model, idx = small("stage3_swiglu"), torch.randint(65, (32, 16))
    for layer in model.model.layers:
        layer.input_layernorm.weight[5] = 0
        layer.self_attn.v_proj.weight[7] = 0
    before = model(idx)[0]
    fold(model, idx)
    assert torch.allclose(model(idx)[0], before, atol=2e-5)
    layer = model.model.layers[0]
    assert layer.input_layernorm.weight[5] == 0
    _, done = quantize_layer(
        layer, first_inputs(model, idx), lambda name, weight, hessian, _: awq.clip(weight, hessian, 3, 16)
    )
    assert all(dequantize(q).isfinite().all() for q in done.quantized.values())


def test_norms_that_are_stored_in_bfloat16_fold_without_a_rounding_error():
    model, idx = small("stage4_gqa"), torch.randint(65, (32, 16))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.bfloat16().float()
    before = model(idx)[0]
    fold(model, idx, dtype=torch.bfloat16)
    assert torch.allclose(model(idx)[0], before, atol=2e-5)
    norm = model.model.layers[0].input_layernorm.weight
    assert torch.equal(norm, norm.bfloat16().float())


def test_an_expert_that_no_token_chose_stays_as_it_is():
    model, idx = small("stage6_moe"), torch.randint(65, (32, 16))
    experts = model.model.layers[0].mlp.experts
    model.model.layers[0].mlp.gate.e_score_correction_bias[3] = -100
    before = experts.down_proj.clone()
    fold(model, idx)
    unchanged = [torch.equal(a, b) for a, b in zip(experts.down_proj, before, strict=True)]
    assert [e for e, same in enumerate(unchanged) if same] == [3]


def test_a_variant_whose_norm_is_read_elsewhere_is_refused():
    model, idx = small("stage4_gqa"), torch.randint(65, (32, 16))
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: output + module.input_layernorm(inputs[0]))
    with pytest.raises(UserError, match="something else reads a norm's output"):
        fold(model, idx)


def test_a_variant_without_the_courses_names_is_refused():
    model, idx = small("stage4_gqa"), torch.randint(65, (32, 16))
    args = first_inputs(model, idx)
    model.model.layers[0].self_attn.output = model.model.layers[0].self_attn.o_proj
    del model.model.layers[0].self_attn.o_proj
    with pytest.raises(UserError, match=r"self_attn\.o_proj"):
        awq.fold_layer(model.model.layers[0], args, 4, 16, torch.float32)
