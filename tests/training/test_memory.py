"""The memory that a training will need, and what it says when there is not enough."""

import logging
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn

from ldm import host
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules import layers
from ldm.training import memory
from tests.support import runs
from tests.support.models import build
from tests.support.runs import Workspace


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
    return sum(
        value.untyped_storage().nbytes() for key, value in kept.items() if key not in weights
    )


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
    stages, recomputed = memory.forward_stages(model, 2, 8)
    assert (
        sum(stage.activations for stage in stages) == pytest.approx(real, rel=0.01)
        and recomputed == 0
    )
    assert sum(stage.gradients for stage in stages) == sum(
        parameter.nbytes for parameter in unet.parameters()
    )


def test_what_needs_less():
    model = build(cond_stage_trainable=True)
    recompute(model, False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    plain = memory.estimate(model, "adamw", 2, 64)
    assert plain.gradients == 4 * trained and plain.optimizer == 8 * trained
    assert plain.weights == sum(v.nbytes for v in [*model.parameters(), *model.buffers()])
    in_backward, eight_bit = (
        memory.estimate(model, name, 2, 64) for name in ("adamw_in_backward", "adamw8bit")
    )
    assert (
        in_backward.gradients == max(p.nbytes for p in model.parameters())
        and eight_bit.optimizer == 2 * trained
    )
    assert memory.estimate(model, "adamw", 4, 64).activations > 1.5 * plain.activations
    recompute(model, True)
    assert memory.estimate(model, "adamw", 2, 64).activations < 0.8 * plain.activations
    frozen = memory.estimate(build(cond_stage_trainable=False), "adamw", 2, 64)
    assert frozen.total < plain.total and frozen.weights == plain.weights


def test_copies_of_weights_are_counted_where_they_are_kept(monkeypatch):
    monkeypatch.setattr(layers, "CAST_AGAIN", 1)
    model = build()
    recompute(model, False)
    unet = sum(p.numel() for p in model.model.parameters() if p.dim() > 1)
    on_gpu, on_cpu = (
        memory.estimate(model, "adamw", 2, 64, torch.bfloat16, device=kind).activations
        for kind in ("cuda", "cpu")
    )
    assert on_gpu - on_cpu == pytest.approx(2 * unet, rel=0.1)


MEASURE = """
import os, resource, torch
from ldm.host import give_back_free_pages, keep_freed_memory

def faults_of_allocating(keep):
    if keep:
        assert keep_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(12):
        torch.zeros(2**24).add_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def bytes_given_back():
    assert keep_freed_memory()
    freed, used = ([torch.zeros(2**20) for _ in range(64)] for _ in range(2))
    full = resident_bytes()
    freed.clear()
    kept = resident_bytes()
    assert give_back_free_pages()
    others = sum(float(x.sum()) for x in used)
    print(full - kept, kept - resident_bytes(), others, flush=True)

# What a process has said to glibc stays said.
for measure, *more in ((faults_of_allocating, True), (faults_of_allocating, False), (bytes_given_back,)):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    try:
        measure(*more)
        os._exit(0)
    finally:
        os._exit(1)
"""


@pytest.fixture(scope="module")
def measured():
    """What new processes measured of their memory: a line of numbers each."""
    run = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True)
    return [[float(number) for number in line.split()] for line in run.stdout.splitlines()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's setting")
def test_freed_memory_is_kept_for_the_next_step(measured):
    """64 MB are 16384 pages, which the system need not fill each time (but may a few times, as
    the heap is cut).
    """
    (kept,), (given_back,), _ = measured
    assert kept < 7 * 16384 < 11 * 16384 < given_back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's setting")
def test_pages_that_nothing_uses_are_given_back(measured):
    """64 tensors of 4 MB, below others, which keep them from the heap's end."""
    at_once, when_asked, others = measured[2]
    assert at_once < 2**24 < 15 * 2**24 < when_asked and others == 0


def called(monkeypatch, *names):
    """The calls of functions of `ldm.callbacks.host_memory`, in place of which nothing happens."""
    calls = []
    for name in names:
        monkeypatch.setattr(
            f"ldm.callbacks.host_memory.{name}", lambda name=name: calls.append(name)
        )
    return calls


def test_a_training_on_the_cpu_keeps_freed_memory(tmp_path, monkeypatch):
    calls = called(monkeypatch, "keep_freed_memory", "give_back_free_pages")
    workspace = Workspace(tmp_path)
    workspace.train("kept", "--max_steps", "3")
    workspace.train("given-back", "--max_steps", "1", "lightning.callbacks.host_memory=null")
    assert calls == ["keep_freed_memory"]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_each_step_of_a_large_model_starts_without_free_pages(tmp_path, monkeypatch, accumulated):
    """From the second on, and not between the batches of one."""
    calls = called(monkeypatch, "keep_freed_memory", "give_back_free_pages")
    monkeypatch.setattr("ldm.callbacks.host_memory.LARGE_MODEL", 0)
    step = LatentDiffusion.optimizer_step
    monkeypatch.setattr(
        LatentDiffusion, "optimizer_step", lambda *a, **k: calls.append("step") or step(*a, **k)
    )
    more = ["--max_steps", "3", f"lightning.trainer.accumulate_grad_batches={accumulated}"]
    Workspace(tmp_path).train("large", *more)
    assert calls == [
        "step",
        "keep_freed_memory",
        "give_back_free_pages",
        "step",
        "give_back_free_pages",
        "step",
    ]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_no_gradient_outlives_its_step(tmp_path, monkeypatch, accumulated):
    seen = []
    forward = LatentDiffusion.training_step

    def training_step(self, *args):
        seen.append(any(parameter.grad is not None for parameter in self.parameters()))
        return forward(self, *args)

    monkeypatch.setattr(LatentDiffusion, "training_step", training_step)
    more = ["--max_steps", "2", f"lightning.trainer.accumulate_grad_batches={accumulated}"]
    Workspace(tmp_path).train("gradients", *more)
    assert seen == {1: [False, False], 2: [False, True, False, True]}[accumulated]


HUGE = """
import resource, sys, types
import main

def train(*_, **__):
    import torch

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return types.SimpleNamespace(interrupted=False)

sys.modules["ldm.training.train"] = types.SimpleNamespace(train=train, Start=lambda *_: None)
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.skipif(
    not host.HUGE_PAGES.exists() or "[never]" in host.HUGE_PAGES.read_text(),
    reason="the system has none",
)
def test_a_training_has_huge_pages(tmp_path):
    """64 MB are 16384 pages of 4 KB, but a few dozen of 2 MB; where memory is in pieces, some of
    both.
    """
    command = [sys.executable, "-c", HUGE, *Workspace(tmp_path).arguments("huge")]
    environment = {
        name: value for name, value in os.environ.items() if name != host.HUGE_PAGES_VARIABLE
    }
    run = subprocess.run(command, check=True, capture_output=True, cwd=runs.ROOT, env=environment)
    assert int(run.stdout) < 12000


@pytest.mark.skipif(not host.HUGE_PAGES.exists(), reason="the system has none")
@pytest.mark.parametrize(
    "more, asked", [([], "1"), (["lightning.callbacks.host_memory=null"], None)]
)
def test_a_training_that_gives_memory_back_asks_for_no_huge_pages(
    tmp_path, monkeypatch, more, asked
):
    """That torch takes none unasked is the system's part."""
    monkeypatch.delenv(host.HUGE_PAGES_VARIABLE, raising=False)
    seen = []
    monkeypatch.setattr(
        "ldm.training.train.train",
        lambda *_, **__: seen.append(os.environ.get(host.HUGE_PAGES_VARIABLE)),
    )
    assert runs.main.main(Workspace(tmp_path).arguments("huge", *more)) == 0
    assert seen == [asked]


def test_what_ran_before_has_its_environment_back(monkeypatch):
    """And what the user has said goes first."""
    monkeypatch.delenv(host.HUGE_PAGES_VARIABLE, raising=False)
    with host.environment_with({host.HUGE_PAGES_VARIABLE: "1"}):
        assert os.environ[host.HUGE_PAGES_VARIABLE] == "1"
    assert host.HUGE_PAGES_VARIABLE not in os.environ
    monkeypatch.setenv(host.HUGE_PAGES_VARIABLE, "0")
    with host.environment_with({host.HUGE_PAGES_VARIABLE: "1"}):
        assert os.environ[host.HUGE_PAGES_VARIABLE] == "0"
    assert os.environ[host.HUGE_PAGES_VARIABLE] == "0"


def test_autocast_keeps_no_copies_of_the_weights(tmp_path, monkeypatch):
    """They would stay until the forward pass ends, also where activations are recomputed."""
    seen = []
    forward = nn.GroupNorm.forward
    monkeypatch.setattr(
        nn.GroupNorm,
        "forward",
        lambda self, x: seen.append(torch.is_autocast_cache_enabled()) or forward(self, x),
    )
    Workspace(tmp_path).train("cache", "--max_steps", "1", "--precision", "bf16-mixed")
    assert seen and not any(seen) and torch.is_autocast_cache_enabled()


@pytest.fixture
def workspace(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(memory, "CONCERNS", 0)
    return Workspace(tmp_path)


@pytest.mark.parametrize("free, fits", [(10**12, True), (10**6, False)])
def test_the_summary_says_what_it_takes_and_what_to_turn(
    workspace, caplog, monkeypatch, free, fits
):
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    monkeypatch.setattr(memory, "default_precision", lambda device: "32-true")
    workspace.train("summary", "--max_steps", "1")
    (line,) = (line for line in caplog.text.splitlines() if line.strip().startswith("memory"))
    assert "about 0.0" in line and "optimizer 0.0" in line
    assert ("it will not fit. To need less: " in line) is not fits
    assert ("model.params.optimizer=adamw_in_backward" in line) is not fits
    assert "bf16" not in line, "this device does not compute in it"


def test_weights_that_are_on_the_device_need_no_more_room(workspace, caplog, monkeypatch):
    """The summary is made when the weights are there."""
    found = memory.estimate(build(cond_stage_trainable=True), "adamw", 2, runs.SIZE)
    monkeypatch.setattr(
        memory, "available_bytes", lambda device: found.total - found.weights + 10**6
    )
    base = runs.golden_config(workspace.path)
    workspace.train("fits", "--max_steps", "1", base=base)
    monkeypatch.setattr(
        memory, "available_bytes", lambda device: found.total - found.weights - 10**6
    )
    workspace.train("too-large", "--max_steps", "1", base=base)
    lines = [line for line in caplog.text.splitlines() if line.strip().startswith("memory")]
    assert ["it will not fit" in line for line in lines] == [False, True]


def advised(model, **trainer):
    """The switches for a trainer with these settings beside those of a plain one."""
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    plain = {
        "accumulate_grad_batches": 1,
        "gradient_clip_val": None,
        "precision": "bf16-mixed",
        "world_size": 1,
    }
    return "; ".join(
        memory.switches(SimpleNamespace(**{**plain, "strategy": strategy, **trainer}), model)
    )


def test_no_switch_is_advised_that_the_trainer_refuses(monkeypatch):
    model = build(cond_stage_trainable=True)
    assert (
        "adamw_in_backward" in advised(model)
        and "adamw8bit" in advised(model)
        and "lora" in advised(model)
    )
    for more in (
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 1.0},
        {"precision": "16-mixed"},
    ):
        assert "in_backward" not in advised(model, **more)
    monkeypatch.setattr(memory, "is_sharded", lambda trainer: True)
    sharded = advised(model, world_size=2)
    assert "in_backward" not in sharded and "adamw8bit" not in sharded and "lora" not in sharded


def test_gradients_and_activations_take_turns():
    """Where the UNet's first blocks have the activations and its last the gradients, both are there
    at once.
    """
    first, last = memory.Stage(100, 1), memory.Stage(1, 100)
    assert memory._most_at_once([first, last]) == 201 and memory._most_at_once([last, first]) == 102


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
    assert not host.is_out_of_memory(RuntimeError("shapes do not match"))
    assert host.is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    )
