"""Stage 0 is GPT-2: the same logits as transformers' GPT2LMHeadModel on the same weights."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from stage0_gpt import model as gpt


def from_gpt2(theirs):
    """Stage 0 with the weights of a GPT2LMHeadModel, whose Conv1D matrices are transposed."""
    c = theirs.config
    ours = gpt.GPT(
        gpt.GPTConfig(
            vocab_size=c.vocab_size,
            block_size=c.n_positions,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            norm_eps=c.layer_norm_epsilon,
            tie_word_embeddings=c.tie_word_embeddings,
        )
    )
    source, target = theirs.state_dict(), ours.state_dict()
    names = {
        "model.embed_tokens.weight": "transformer.wte.weight",
        "model.embed_positions.weight": "transformer.wpe.weight",
        "model.norm.weight": "transformer.ln_f.weight",
        "model.norm.bias": "transformer.ln_f.bias",
        "lm_head.weight": "lm_head.weight",
    }
    for ours_name, theirs_name in names.items():
        target[ours_name].copy_(source[theirs_name])
    for i in range(c.n_layer):
        for kind in ("weight", "bias"):
            here, there = f"model.layers.{i}", f"transformer.h.{i}"
            target[f"{here}.input_layernorm.{kind}"].copy_(source[f"{there}.ln_1.{kind}"])
            target[f"{here}.post_attention_layernorm.{kind}"].copy_(source[f"{there}.ln_2.{kind}"])
            for name, part in zip("qkv", source[f"{there}.attn.c_attn.{kind}"].chunk(3, dim=-1), strict=True):
                target[f"{here}.self_attn.{name}_proj.{kind}"].copy_(part.t())
            target[f"{here}.self_attn.o_proj.{kind}"].copy_(source[f"{there}.attn.c_proj.{kind}"].t())
            target[f"{here}.mlp.up_proj.{kind}"].copy_(source[f"{there}.mlp.c_fc.{kind}"].t())
            target[f"{here}.mlp.down_proj.{kind}"].copy_(source[f"{there}.mlp.c_proj.{kind}"].t())
    return ours.eval()


@pytest.mark.parametrize(
    "n_layer, n_head, tied, eps", [(1, 2, True, 1e-5), (3, 4, False, 1e-6), (2, 1, True, 1e-3)]
)
def test_stage_0_has_the_logits_of_gpt2(n_layer, n_head, tied, eps):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97,
        n_positions=20,
        n_embd=32,
        n_layer=n_layer,
        n_head=n_head,
        layer_norm_epsilon=eps,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    theirs = GPT2LMHeadModel(config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):  # zero would hide a bias that is lost
            torch.nn.init.normal_(parameter, std=0.1)
    idx = torch.randint(97, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(from_gpt2(theirs)(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)
