"""What only a CUDA device can show: make test-gpu. The quick ones first; those that compile come last."""

import signal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_flash import assert_same_function, check_kernels, sdpa
from test_moe import loop
from test_quantized_storage import near, quantized, rounded, with_dense_weights
from test_training import metrics, stop_at
from torch.nn.parallel import DistributedDataParallel

from deploy.quantization import linear
from deploy.quantization.grid import dequantize
from lab import attention, device, stages
from lab.errors import UserError
from lab.sampling.compiled import CompiledStep
from lab.training import batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = ["--device", "cuda", "--steps", "14", "--eval-every", "5", "--log-every", "1", "--no-compile"]
# What is compiled draws other random numbers: two ways to compute are only equal without dropout.
CUDA += ["--model.dropout", "0"]
SIZES = {"vocab_size": 65, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 128}
STAGES = stages.course()


@pytest.fixture
def one_config(monkeypatch):
    """Triton's kernels with one of their configurations (by default the last), which need not be chosen."""
    from stage5_flash import kernel

    def choose(number=-1):
        for function in (kernel.forward_kernel, kernel.keys_kernel, kernel.queries_kernel):
            monkeypatch.setattr(function, "configs", [kernel.CONFIGS[number]])
            monkeypatch.setattr(function, "cache", {})

    choose()
    return choose


def test_bfloat16_is_chosen_where_the_hardware_has_it():
    major, _ = torch.cuda.get_device_capability()
    chosen = device.choose_dtype("auto", torch.device("cuda"))
    assert chosen == (torch.bfloat16 if major >= 8 else torch.float32)


def test_too_little_memory_is_said_in_two_lines():
    said = r"there is not enough memory for \d+\.\d+ GiB more\nbuy some"
    with pytest.raises(UserError, match=said), device.memory_errors("buy some"):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_triton_kernels_are_attention_on_a_gpu(dtype, one_config):
    check_kernels(dtype, "cuda")


def test_every_configuration_of_the_triton_kernels_is_attention(one_config):
    from stage5_flash.kernel import CONFIGS, triton_attention

    for number in range(len(CONFIGS)):
        one_config(number)
        try:
            assert_same_function(triton_attention, sdpa, (2, 4, 2, 200, 300, 64), torch.bfloat16, "cuda")
        except Exception as error:
            if "out of resource" not in str(error):  # what exceeds a GPU's shared memory is never chosen
                raise


def test_the_triton_kernels_agree_with_flash_attn_and_sdpa_on_a_gpu(one_config):
    from stage5_flash.kernel import triton_attention

    shape = (2, 8, 2, 1024, 1024, 64)
    assert_same_function(triton_attention, sdpa, shape, torch.bfloat16, "cuda")
    flash_attn = pytest.importorskip("flash_attn")

    def theirs(q, k, v):
        return flash_attn.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(
            1, 2
        )

    assert_same_function(triton_attention, theirs, shape, torch.bfloat16, "cuda")


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "explicit", "triton"])
def test_every_attention_of_stage_5_has_the_loss_of_stage_4(kernel, one_config, monkeypatch):
    stage4, stage5 = stages.load("stage4_gqa"), stages.load("stage5_flash")
    torch.manual_seed(0)
    four = stage4.GPT(stage4.GPTConfig(**SIZES)).cuda()
    five = stage5.GPT(stage5.GPTConfig(**SIZES)).cuda()
    monkeypatch.setattr(stage5, "attention", stage5.attention)  # restores it
    attention.use(kernel, stage5, five.config, torch.device("cuda"))
    five.load_state_dict(four.state_dict())
    idx = torch.randint(65, (4, 64), device="cuda")
    losses, gradients = [], []
    for model in (four, five):
        with device.autocast(torch.device("cuda"), torch.bfloat16):
            losses.append(model(idx, targets=idx.roll(-1, 1))[1]["next_token"])
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=5e-3)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("n_experts, per_token", [(8, 2), (64, 6)])
def test_grouped_experts_in_bfloat16_are_the_loop_over_experts(n_experts, per_token, compiled, monkeypatch):
    """64 experts and 40 tokens: some experts get none."""
    stage = stages.load("stage6_moe")
    sizes = {"n_routed_experts": n_experts, "num_experts_per_tok": per_token, "moe_intermediate_size": 64}
    torch.manual_seed(0)
    made = stage.MoE(stage.GPTConfig(**SIZES, **sizes)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made.cuda()
    x = torch.randn(2, 20, 128, device="cuda", requires_grad=True)
    d_out = torch.randn_like(x)
    leaves = [x, *made.parameters()]
    exact = loop(made, x)
    exact = [exact, *torch.autograd.grad(exact, leaves, d_out)]
    with device.autocast(torch.device("cuda"), torch.bfloat16):
        found = (torch.compile(made) if compiled else made)(x)
    found = [found, *torch.autograd.grad(found, leaves, d_out.to(found.dtype))]
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 32), (4, 64), (4, 256), (4, None)])
@pytest.mark.parametrize("shape", [(43, 344), (576, 1536), (7, 20)])
def test_the_4_bit_kernel_on_a_gpu_gives_what_the_dequantized_weights_give(bits, group_size, shape):
    q = quantized(torch.randn(shape, device="cuda"), bits, group_size)
    with torch.device("cuda"):
        module = linear.QuantizedLinear(q, torch.randn(shape[0]).bfloat16()).bfloat16()
    module.prepare()
    assert module.kernel is not None
    for n_rows in (1, 6, 17, 64, 100):  # 100 rows are too many for the kernel
        x = torch.randn(n_rows, shape[1], device="cuda").bfloat16()
        exact = F.linear(x.double(), dequantize(q).double(), module.bias.double())
        found = module(x)
        assert found.shape == (n_rows, shape[0]) and near(found, exact, 0.01)
    assert torch.equal(module.codes(slice(None)), q.codes)


@torch.inference_mode()
@pytest.mark.parametrize("name", STAGES)
def test_a_quantized_model_on_a_gpu_computes_with_the_dequantized_weights(name):
    """Also if the model was prepared for a CPU before. The head has 8 bits and is dequantized."""
    stage, models = stages.load(name), []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(stage.GPT(stage.GPTConfig(**SIZES)).eval())
    model, dense = models
    found = rounded(model, 4, 64, head=True)
    with_dense_weights(dense, found).cuda()
    linear.replace(model.bfloat16(), found)
    linear.prepare(model.cuda())
    named = {module.kernel[0] for module in model.modules() if getattr(module, "kernel", None)}
    assert "int4 on cuda" in named
    idx = torch.randint(65, (2, 9), device="cuda")
    cache = model.new_cache(2, 9)
    steps = [model(part, cache=cache)[0] for part in idx.split([5, 1, 2, 1], dim=1)]
    assert near(torch.cat(steps, dim=1), dense(idx)[0], 0.03)


@pytest.mark.parametrize("name", ["stage4_gqa", "stage7_mla_mtp"])
def test_ddp_over_nccl_has_the_gradients_of_one_process(name):
    """A group of one process: NCCL starts, and the routers' counts are added up on the GPU."""
    stage = stages.load(name)
    torch.manual_seed(0)
    model = stage.GPT(stage.GPTConfig(**SIZES)).cuda().train()
    idx = torch.randint(65, (4, 64), device="cuda")

    def gradients(joined):
        model.zero_grad()
        sum(joined(idx, targets=idx.roll(-1, 1))[1].values()).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    alone = gradients(model)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        together = gradients(DistributedDataParallel(model, device_ids=[0]))
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_optimizers_have_the_losses_of_the_cpu(optimizer, run_train, workshop):
    flags = ("--stage", "7", *CUDA, "--preset", "baby", "--optimizer", optimizer, "--dtype", "float32")
    for where in ("cuda", "cpu"):
        assert run_train(*flags, "--device", where, "--lr", "0.01", "--out", where) == 0
    losses = [[line["loss"] for line in metrics(folder)] for folder in ("cuda", "cpu")]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)


@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_equals_one_never_stopped_on_cuda(name, run_train, workshop, monkeypatch):
    flags = ("--stage", name, *CUDA, "--model.dropout", "0.1")
    assert run_train(*flags, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert run_train(*flags, "--out", "stopped") == 128 + signal.SIGTERM
    assert run_train("--resume", "--out", "stopped") == 0
    assert metrics("stopped") == metrics("whole")


def test_a_seed_gives_the_same_text_on_cuda_and_cpu(run_train, run_sample, workshop, capsys):
    assert run_train("--stage", "0", *CUDA, "--out", "run", report=True) == 0
    texts = []
    for where in ("cuda", "cpu"):
        capsys.readouterr()
        flags = ("--device", where, "--prompt", "a", "--temperature", "0", "--max-new-tokens", "60")
        assert run_sample("--run", "run", *flags) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


# Those that compile: half a minute each


@pytest.mark.parametrize("name, passes", [*((name, 1) for name in STAGES), ("stage4_gqa", 2)])
def test_compiled_training_on_cuda_agrees_with_eager(name, passes, run_train, workshop):
    """One pass a step is replayed by CUDA graphs; the gradients of two are added up without them."""
    flags = ("--stage", name, *CUDA, "--micro-batch-size", str(4 // passes))
    assert run_train(*flags, "--out", "eager") == 0
    assert run_train(*flags, "--compile", "--out", "compiled") == 0
    losses = [[line["loss"] for line in metrics(folder)] for folder in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.parametrize("name", STAGES)
def test_a_compiled_step_on_cuda_has_the_logits_of_a_plain_one(name):
    """Token by token; the third and later ones come out of a CUDA graph."""
    torch.manual_seed(0)
    stage = stages.load(name)
    model = stage.GPT(stage.GPTConfig(**SIZES)).cuda().eval()
    text, _ = batches.train_batch(torch.randint(65, (200,)).numpy(), 0, 1, 1, 12)
    text = text.cuda()
    step = CompiledStep(model)
    with torch.inference_mode():
        expected, _ = model(text)
        model(text[:, :4], cache=step.cache)
        found = [step(text[:, place : place + 1])[:, -1].clone() for place in range(4, 12)]
    torch.testing.assert_close(torch.stack(found, dim=1), expected[:, 4:], atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["stage0_gpt", "stage7_mla_mtp"])
def test_compiled_sampling_on_cuda_prints_the_same_text(name, run_train, run_sample, workshop, capsys):
    assert run_train("--stage", name, *CUDA, "--out", "run") == 0
    texts = []
    for more in ([], ["--compile"]):
        capsys.readouterr()
        flags = ("--device", "cuda", "--prompt", "a", "--temperature", "0", "--max-new-tokens", "40")
        assert run_sample("--run", "run", *flags, *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
