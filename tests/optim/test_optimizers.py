"""Optimizers that need less memory: AdamW in the backward pass, and with a state of 8 bits."""

import sys
from types import SimpleNamespace

import pytest
import torch

from ldm.config import RunConfig
from ldm.errors import UserError
from ldm.optim.in_backward import AdamWInBackward
from ldm.optim.registry import make_optimizer
from ldm.training.build_trainer import check_optimizer
from tests.support import runs
from tests.support.models import build
from tests.support.runs import Workspace, checkpoint, metrics, same


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("optimizers"))


@pytest.fixture(scope="module")
def with_adamw(workspace):
    return workspace.train("adamw", "--max_steps", "3")


def test_in_backward_is_adamw(workspace, with_adamw):
    run = workspace.train(
        "in-backward", "--max_steps", "3", "model.params.optimizer=adamw_in_backward"
    )
    ours, theirs = checkpoint(run), checkpoint(with_adamw)
    assert same(ours["state_dict"], theirs["state_dict"])
    assert same(ours["optimizer_states"], theirs["optimizer_states"])


def test_eight_bits_in_backward_are_eight_bits(workspace):
    runs_ = [
        checkpoint(workspace.train(name, "--max_steps", "3", f"model.params.optimizer={name}"))
        for name in ("adamw8bit", "adamw8bit_in_backward")
    ]
    assert same(runs_[0]["state_dict"], runs_[1]["state_dict"])
    assert same(runs_[0]["optimizer_states"], runs_[1]["optimizer_states"])


def test_each_resumes_the_others_run(workspace, with_adamw):
    straight = workspace.train("straight", "--max_steps", "4")
    for optimizer in ("adamw_in_backward", "adamw8bit", "adamw8bit_in_backward"):
        parts = workspace.train(
            f"parts-{optimizer}", "--max_steps", "2", f"model.params.optimizer={optimizer}"
        )
        workspace.resume(parts, "--max_steps", "4")
        whole = workspace.train(
            f"whole-{optimizer}", "--max_steps", "4", f"model.params.optimizer={optimizer}"
        )
        assert same(checkpoint(parts)["state_dict"], checkpoint(whole)["state_dict"])
        assert same(checkpoint(parts)["optimizer_states"], checkpoint(whole)["optimizer_states"])
        as_adamw = same(checkpoint(whole)["state_dict"], checkpoint(straight)["state_dict"])
        assert as_adamw is (optimizer == "adamw_in_backward")


def test_no_gradient_is_left_and_few_are_there_at_once():
    torch.manual_seed(0)
    network = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(6)))
    optimizer = make_optimizer("adamw_in_backward", [network], lr=1e-3)
    assert isinstance(optimizer, AdamWInBackward)
    most = [0]
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(p.grad is not None for p in network.parameters()))
        )

    def closure():
        loss = network(torch.ones(2, 8)).square().mean()
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    assert max(most) <= 2 and all(p.grad is None for p in network.parameters())
    assert float(closure().detach()) < first
    # Outside of a step nothing is updated: the gradients are there, as anybody expects.
    assert all(p.grad is not None for p in network.parameters())


LAYOUTS = [torch.contiguous_format, torch.channels_last]


def after_steps(name, layout, options=None, state_layout=None):
    """Return weights and state after four steps of a convolution in a layout, the last two of them
    with a state that was saved and loaded.
    """
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 8, 3).to(memory_format=layout)

    def make():
        return make_optimizer(name, [layer], lr=1e-2, **(options or {}))

    optimizer = make()
    for number in range(4):
        if number == 2:
            saved = optimizer.state_dict()
            moments = saved["state"][0]
            for moment in ("exp_avg", "exp_avg_sq"):
                as_saved = moments[moment].contiguous(memory_format=state_layout or layout)
                moments[moment] = as_saved
            for parameter in layer.parameters():
                parameter._post_accumulate_grad_hooks = None
            optimizer = make()
            optimizer.load_state_dict(saved)
        x = torch.randn(2, 6, 5, 5)

        def closure(x=x):
            layer.zero_grad()
            layer(x).square().mean().backward()

        optimizer.step(closure)
    return [*layer.state_dict().values(), *optimizer.state_dict()["state"][0].values()]


@pytest.mark.parametrize("name", ["adamw", "adamw_in_backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state_layout", LAYOUTS)
def test_the_layout_of_weights_and_of_their_state_changes_nothing(name, layout, state_layout):
    plain = after_steps("adamw", torch.contiguous_format, {"fused": False})
    found = after_steps(name, layout, state_layout=state_layout)
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_backward_is_adamw_in_each_layout(layout):
    found, plain = (after_steps(name, layout) for name in ("adamw_in_backward", "adamw"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))


def test_rare_options_are_left_to_torch():
    options = {"amsgrad": True}
    found, plain = (
        after_steps(name, torch.contiguous_format, options)
        for name in ("adamw_in_backward", "adamw")
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))


@pytest.mark.parametrize(
    "more", [["--accumulate_grad_batches", "2"], ["--gradient_clip_val", "1.0"]]
)
def test_what_needs_all_gradients_is_refused(workspace, caplog, more):
    arguments = workspace.arguments("refused", "model.params.optimizer=adamw_in_backward", *more)
    assert runs.main.main(arguments) == 1
    assert (
        f"adamw_in_backward keeps no gradients, so not with lightning.trainer.{more[0][2:]}"
        in caplog.text
    )
    assert not list(workspace.logs.glob("*_refused"))


def test_eight_bits_are_close_to_adamw_and_a_quarter_of_its_state(workspace, with_adamw):
    run = workspace.train("8bit", "--max_steps", "3", "model.params.optimizer=adamw8bit")
    ours, theirs = (
        [float(row["train/loss_total"]) for row in metrics(r)] for r in (run, with_adamw)
    )
    assert ours == pytest.approx(theirs, rel=0.05)
    sizes = []
    for folder in (run, with_adamw):
        (state,) = checkpoint(folder)["optimizer_states"]
        large = [s for s in state["state"].values() if sum(tensor_bytes(s)) > 2**16]
        sizes.append(sum(sum(tensor_bytes(s)) for s in large))
    assert 0 < sizes[0] < 0.4 * sizes[1]


def tensor_bytes(state):
    for value in state.values():
        if isinstance(value, dict):
            yield from tensor_bytes(value)
        elif isinstance(value, torch.Tensor):
            yield value.numel() * value.element_size()


def test_without_bitsandbytes_one_line_says_what_to_install(workspace, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    assert runs.main.main(workspace.arguments("missing", "model.params.optimizer=adamw8bit")) == 1
    assert "pip install -e '.[low-memory]'" in caplog.text


@pytest.mark.parametrize(
    "precision, clip", [("16-mixed", 1.0), ("16-mixed", None), ("bf16-mixed", 1.0)]
)
def test_clipping_fp16_needs_an_optimizer_that_leaves_unscaling_to_lightning(precision, clip):
    model = build()
    model._trainer = SimpleNamespace(precision=precision, gradient_clip_val=clip, max_steps=3)
    fused = model.configure_optimizers().param_groups[0]["fused"]
    assert bool(fused) is not (precision == "16-mixed" and clip is not None)


def test_fp16_in_backward_is_refused():
    trainer = SimpleNamespace(
        precision="16-mixed", gradient_clip_val=None, accumulate_grad_batches=1, world_size=2
    )
    with pytest.raises(UserError, match="precision: 16-mixed, several processes"):
        check_optimizer(
            RunConfig({"model": {"params": {"optimizer": "adamw_in_backward"}}}), trainer
        )
    check_optimizer(RunConfig({"model": {"params": {"optimizer": "adamw"}}}), trainer)
