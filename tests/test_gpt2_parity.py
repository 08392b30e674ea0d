"""Stage 0 is GPT-2: the same logits as transformers' GPT2LMHeadModel on the same weights."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from deploy import gpt2
from stage0_gpt import model as gpt


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
    _, sizes = gpt2.from_config(config.to_dict())
    ours = gpt.GPT(gpt.GPTConfig(**sizes)).eval()
    ours.load_state_dict(gpt2.from_tensors(theirs.state_dict(), sizes))
    idx = torch.randint(97, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)
