"""The memory that a training will need, and what it says when there is not enough."""

import logging
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from ldm.training import memory
from tests import runs
from tests.runs import Workspace
from tests.test_diffusion import build


def really_kept(unet, inputs):
    """Bytes that a forward pass on real tensors keeps, beside the weights."""
    weights = {parameter.data_ptr() for parameter in unet.parameters()}
    kept = {}

    def pack(value):
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = unet(*inputs)
    kept[output.untyped_storage().data_ptr()] = output
    return sum(value.untyped_storage().nbytes() for key, value in kept.items() if key not in weights)


def recompute(network, on):
    for module in network.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = on


def test_activations_are_those_of_a_real_pass():
    model = build(cond_stage_trainable=False)
    unet = model.model.diffusion_model
    recompute(unet, False)
    width = model.cond_stage_model.token_embedding.weight.shape[1]
    context = torch.randn(2, model.cond_stage_model.max_length, width)
    real = really_kept(unet, (torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.long), context))
    assert memory.activation_bytes(model, 2, 8) == pytest.approx(real, rel=0.01)


def test_what_needs_less():
    model = build(cond_stage_trainable=True)
    recompute(model, False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    plain = memory.estimate(model, "adamw", 2, 64)
    assert plain.gradients == 4 * trained and plain.optimizer == 8 * trained
    assert plain.weights == sum(v.nbytes for v in [*model.parameters(), *model.buffers()])
    in_backward, eight_bit = (memory.estimate(model, name, 2, 64) for name in ("adamw_in_backward", "adamw8bit"))
    assert in_backward.gradients == max(p.nbytes for p in model.parameters()) and eight_bit.optimizer == 2 * trained
    assert memory.estimate(model, "adamw", 4, 64).activations > 1.5 * plain.activations
    recompute(model, True)
    assert memory.estimate(model, "adamw", 2, 64).activations < 0.8 * plain.activations
    frozen = memory.estimate(build(cond_stage_trainable=False), "adamw", 2, 64)
    assert frozen.total < plain.total and frozen.weights == plain.weights


ALLOCATE = """
import resource, sys, torch
from ldm.callbacks.host_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1:]:
    assert keep_freed_memory()
before = faults()
for _ in range(12):
    torch.zeros(2**24).add_(1)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's setting")
def test_freed_memory_is_kept_for_the_next_step():
    """64 MB are 16384 pages, which the system need not fill each time (but may twice or thrice, as the heap is cut)."""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", ALLOCATE, *more], check=True, capture_output=True).stdout)
        for more in (["keep"], [])
    )
    assert kept < 5 * 16384 < 11 * 16384 < given_back


def test_a_training_on_the_cpu_keeps_it(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("ldm.callbacks.host_memory.keep_freed_memory", lambda: calls.append(1))
    workspace = Workspace(tmp_path)
    workspace.train("kept", "--max_steps", "1")
    workspace.train("given-back", "--max_steps", "1", "lightning.callbacks.host_memory=null")
    assert calls == [1]


def test_autocast_keeps_no_copies_of_the_weights(tmp_path, monkeypatch):
    """They would stay until the forward pass ends, also where activations are recomputed."""
    seen = []
    forward = nn.GroupNorm.forward
    monkeypatch.setattr(
        nn.GroupNorm, "forward", lambda self, x: seen.append(torch.is_autocast_cache_enabled()) or forward(self, x)
    )
    Workspace(tmp_path).train("cache", "--max_steps", "1", "--precision", "bf16-mixed")
    assert seen and not any(seen) and torch.is_autocast_cache_enabled()


@pytest.fixture
def workspace(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(memory, "CONCERNS", 0)
    return Workspace(tmp_path)


@pytest.mark.parametrize("free, fits", [(10**12, True), (10**6, False)])
def test_the_summary_says_what_it_takes_and_what_to_turn(workspace, caplog, monkeypatch, free, fits):
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    workspace.train("summary", "--max_steps", "1")
    (line,) = (line for line in caplog.text.splitlines() if line.strip().startswith("memory"))
    assert "about 0.0" in line and "optimizer 0.0" in line
    assert ("it will not fit. To need less: " in line) is not fits
    assert ("model.params.optimizer=adamw_in_backward" in line) is not fits


def test_out_of_memory_ends_in_advice_with_the_last_checkpoint_kept(workspace, caplog, monkeypatch):
    calls = [0]
    forward = nn.GroupNorm.forward

    def failing(self, x):
        calls[0] += self.training
        if calls[0] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, x)

    monkeypatch.setattr(nn.GroupNorm, "forward", failing)
    assert runs.main.main(workspace.arguments("oom", "--max_steps", "100")) == 1
    last = workspace.run("oom") / "checkpoints/last.ckpt"
    (line,) = (line for line in caplog.text.splitlines() if "out of memory in step" in line)
    assert str(last) in line and "To need less: " in line
    assert runs.checkpoint(workspace.run("oom"))["global_step"] >= 2


def test_other_errors_stay_what_they_are():
    assert not memory.is_out_of_memory(RuntimeError("shapes do not match"))
    assert memory.is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
