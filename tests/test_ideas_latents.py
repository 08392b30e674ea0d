"""Where latent attention pays: what is compared is what the page says."""

import json

import pytest
import torch
from conftest import call

from benchmarks import ideas
from benchmarks.ideas import latents
from lab import stages
from lab.pages import lessons
from lab.training import cost

TINY = {
    "n_embd": 32,
    "n_head": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
TINY_GQA = {"n_embd": 32, "n_head": 4, "n_kv_head": 2, "head_dim": 8}
CONTEXT = 24


@pytest.fixture
def tiny_layers(monkeypatch):
    """The layers of both kinds at tiny sizes, as `layer_steps` returns them."""
    monkeypatch.setattr(latents, "DEEPSEEK_V3", TINY)
    monkeypatch.setattr(latents, "GQA_8", TINY_GQA)
    return latents.layer_steps(CONTEXT)


def cache_bytes(name):
    stage, _, sizes = latents.VARIANTS[name]
    return latents.make_model(stage, sizes, 64).new_cache(1, 1).nbytes


@pytest.mark.parametrize("name, other", latents.PAIRS.items())
def test_variants_that_are_compared_cache_equally_many_bytes(name, other):
    assert cache_bytes(name) == cache_bytes(other)


def test_the_runs_have_the_sizes_of_the_models_that_decode(monkeypatch):
    asked = []

    def trained(name, flags):
        asked.append((name, flags))
        return None, [{"val_loss": 2.0}, {"val_loss": 1.5}]

    monkeypatch.setattr(ideas, "trained", trained)
    assert latents.final_losses(*latents.VARIANTS["MLA, latent 48"], seeds=2) == [1.5, 1.5]
    assert [name for name, _ in asked] == ["latents-mla-64-seed0", "latents-mla-64-seed1"]
    flags = asked[1][1]
    assert dict(zip(flags[::2], flags[1::2], strict=True)) == {
        "--stage": "7a",
        "--model.kv-lora-rank": "48",
        "--model.qk-rope-head-dim": "16",
        "--model.qk-nope-head-dim": "32",
        "--seed": "1",
    }


def test_the_layer_has_as_many_weights_as_deepseek_v3s():
    v3 = stages.load("deepseek_v3")
    with torch.device("meta"):
        layer = v3.Attention(v3.GPTConfig(n_layer=1, **latents.DEEPSEEK_V3), 0)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 187_107_328


def test_both_forms_of_the_layer_agree_and_only_one_expands(tiny_layers):
    expanded, outputs = [], {}
    for name in ("MLA, absorbed", "MLA, expanded"):
        step, attention, _ = tiny_layers[name]
        hook = attention.kv_b_proj.register_forward_hook(lambda *_, name=name: expanded.append(name))
        with torch.inference_mode():
            outputs[name] = step(CONTEXT).float()
        hook.remove()
    assert expanded == ["MLA, expanded"]
    scale = outputs["MLA, expanded"].abs().max()
    torch.testing.assert_close(*outputs.values(), atol=0.03 * scale.item(), rtol=0)  # bfloat16


def test_every_step_sees_the_whole_context_and_only_it(tiny_layers):
    for step, _, cache in tiny_layers.values():
        with torch.inference_mode():
            for slot in (0, CONTEXT - 1):
                before = step(CONTEXT)
                assert torch.equal(step(CONTEXT), before)  # a step leaves the cache as long as it was
                cache.keys[..., slot, :] += 5
                assert not torch.equal(step(CONTEXT), before)
            before = step(CONTEXT - 2)
            cache.keys[..., CONTEXT - 1 :, :] += 5
            assert torch.equal(step(CONTEXT - 2), before)


def test_moved_bytes_are_those_of_the_tensors(tiny_layers, monkeypatch):
    v3, made = stages.load("deepseek_v3"), []
    plain = v3.attention

    def attention(q, k, v, mask, dropout):
        made.append(k.nbytes + v.nbytes)
        return plain(q, k, v, mask, dropout)

    monkeypatch.setattr(v3, "attention", attention)
    step, layer, cache = tiny_layers["MLA, expanded"]
    with torch.inference_mode():
        step(CONTEXT - 1)  # and the new token: as many keys as the context is long
    moved = {
        name: latents.bytes_moved(name, layer, cache, CONTEXT) for name in ("MLA, absorbed", "MLA, expanded")
    }
    weights = sum(parameter.nbytes for parameter in layer.parameters())
    assert moved["MLA, absorbed"] == weights + cache.nbytes * CONTEXT // (CONTEXT + 1)
    assert moved["MLA, expanded"] - moved["MLA, absorbed"] == 2 * made[0]


def test_one_command_writes_both_tables_and_pictures(tiny_layers, monkeypatch, tmp_path):
    losses = iter(range(1000))
    monkeypatch.setattr(ideas, "trained", lambda *_: (None, [{"val_loss": 1.7 + next(losses) / 1000}]))
    monkeypatch.setattr(lessons, "IDEAS", tmp_path)
    monkeypatch.setattr(latents, "TOKENS", 2)
    monkeypatch.setattr(cost, "flops_per_token", lambda model: 1e6)  # it takes seconds
    assert call(monkeypatch, latents, "--contexts", "8", "--rounds", "1", "--seeds", "2") == 0
    for name in ("latents", "latents-deepseek"):
        table = json.loads((tmp_path / f"{name}.json").read_text())["table"]
        assert all(len(row) == len(table["heads"]) for row in table["rows"])
        assert f"../results/ideas/{name}-dark.png" in lessons.where_it_pays(name)
        assert (tmp_path / f"{name}.png").exists() and (tmp_path / f"{name}-dark.png").exists()
    variants = json.loads((tmp_path / "latents.json").read_text())["variants"]
    assert variants["MLA, latent 112"]["val_loss"]["values"] == pytest.approx([1.702, 1.703])
    assert variants["MQA"]["tokens_per_second"].keys() == {"8"}
