"""The first steps of a run are looked at: what should train does, and nothing else."""

import re
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

import main
from ldm.callbacks.first_step import FirstStepCheck, checksum
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.support.spies import errors, spy


@pytest.fixture(scope="module")
def weights(workspace):
    """`--actual_resume` with weights through which gradients flow: a new UNet's last layers are
    zero.
    """
    return ["--actual_resume", str(workspace.train("weights") / "checkpoints/last.ckpt")]


class Rate:
    """A schedule: no learning rate for the first `zeros` steps."""

    def __init__(self, zeros):
        self.zeros = zeros

    def __call__(self, step):
        return float(step >= self.zeros)


class Touch(pl.Callback):
    """Something changes a tensor that it should leave alone."""

    def __init__(self, name, step=1):
        self.name, self.step = name, step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step - 1:
            with torch.no_grad():
                pl_module.state_dict()[self.name].view(-1)[0].add_(1e-3)


class Detached(LatentDiffusion):
    """No gradient reaches the text encoder."""

    def get_learned_conditioning(self, c):
        return super().get_learned_conditioning(c).detach()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (7, 5), (40, 64), (3, 1001, 4)])
def test_a_checksum_changes_with_any_value(dtype, shape):
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    before = checksum(values)
    assert torch.equal(checksum(values.clone()), before)
    flat = values.view(-1)
    for place in {0, flat.numel() // 2, flat.numel() - 1} if flat.numel() else ():
        own = flat[place].clone()
        flat[place] = ~own if dtype == torch.bool else own + own.abs() / 64 + 1
        assert not torch.equal(checksum(values), before)
        flat[place] = own
    assert torch.equal(checksum(values), before)


@pytest.mark.parametrize(
    "places", [(0, 1), (0, 1024), (2, 4096), (5, 4101), (0, 5000), (4998, 5001)]
)
def test_a_checksum_sees_changes_that_cancel_in_a_sum(places):
    bits = torch.arange(5002, dtype=torch.int32).view(torch.float32)
    before, integers = checksum(bits), bits.view(torch.int32)
    first, second = places
    integers[first] += 2
    integers[second] -= 2
    assert not torch.equal(checksum(bits), before)
    integers[first], integers[second] = second, first
    assert not torch.equal(checksum(bits), before), "exchanged"


def test_parts_of_a_transposed_tensor_count():
    values = torch.arange(12.0).view(3, 4)
    assert not torch.equal(checksum(values.T[1:]), checksum(values.T[:-1]))


@pytest.mark.parametrize("more", [
    ["--accumulate_grad_batches", "2", "model.params.use_ema=true"],
    ["model.params.lora.rank=2", "model.params.use_ema=false"],
    ["model.params.cond_stage_trainable=false"],
], ids=["accumulated", "lora", "unet"])  # fmt: skip
def test_a_sound_run_passes(workspace, weights, caplog, more):
    run = workspace.train(f"sound{len(more)}{more[0][-4:]}", "--max_steps", "2", *weights, *more)
    assert "step 1: what should train has moved, and nothing else has" in caplog.text
    workspace.resume(run, "--max_steps", "3")
    assert "step 3: what should train has moved, and nothing else has" in caplog.text


def test_a_new_model_is_looked_at_until_its_zero_layers_pass_gradients(workspace, caplog):
    workspace.train("new", "model.base_learning_rate=1e-6")
    found = re.search(
        r"step (\d+): (what should train has moved|\d+ of \d+ trained tensors)", caplog.text
    )
    assert found and found.group(1) == "4"


@pytest.mark.parametrize("name, words", [
    ("first_stage_model.decoder.conv_out.bias", ["(autoencoder) is frozen"]),
    ("betas", ["betas is frozen"]),
    ("cond_stage_model.transformer.text_model.final_layer_norm.weight", ["(text encoder) is frozen"]),
])  # fmt: skip
def test_something_frozen_that_changes_ends_the_run(workspace, caplog, name, words):
    more = ["model.params.cond_stage_trainable=false", spy(Touch, name=name)]
    assert main.main(workspace.arguments(f"touched-{name}", *more)) == 1
    (error,) = errors(caplog)
    assert all(word in error for word in ["step 1", name, *words]), error


def test_it_can_be_switched_off(workspace):
    workspace.train(
        "off", "--max_steps", "1", spy(Touch, name="betas"), "lightning.callbacks.first_step=null"
    )


def test_the_frozen_layers_under_adapters_have_to_stay(workspace, caplog):
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.base_layer.weight"
    more = ["model.params.lora.rank=2", "model.params.use_ema=false", spy(Touch, name=name)]
    assert main.main(workspace.arguments("touched-base", *more)) == 1
    assert f"step 1: {name} (UNet) is frozen, but has changed" in caplog.text


def test_it_waits_for_a_learning_rate_and_then_looks(workspace, caplog):
    schedule = f"model.params.scheduler_config={{target: {__name__}.Rate, params: {{zeros: 2}}}}"
    assert main.main(workspace.arguments("waits", schedule, spy(Touch, name="betas", step=2))) == 1
    assert "error: step 3: betas is frozen" in caplog.text


def test_a_learning_rate_that_stays_zero_is_an_error(workspace, caplog):
    schedule = f"model.params.scheduler_config={{target: {__name__}.Rate, params: {{zeros: 100}}}}"
    more = [schedule, "lightning.callbacks.first_step.params.patience=2"]
    assert main.main(workspace.arguments("zero-rate", *more)) == 1
    assert (
        "step 2: the UNet and the text encoder should train, but no weight has moved" in caplog.text
    )
    assert "at a learning rate of 0" in caplog.text


def test_a_part_that_no_gradient_reaches_is_an_error(workspace, caplog):
    more = [f"model.target={__name__}.Detached", "lightning.callbacks.first_step.params.patience=2"]
    assert main.main(workspace.arguments("detached", *more)) == 1
    assert (
        "step 2: the text encoder should train" in caplog.text
        and "no gradient arrives there" in caplog.text
    )


def test_a_learning_rate_that_rounding_swallows_is_said(workspace, weights, caplog):
    workspace.train("rounded", "--max_steps", "1", *weights, "model.base_learning_rate=1e-10")
    (warning,) = [
        record.getMessage() for record in caplog.records if "did not move" in record.getMessage()
    ]
    assert "trained tensors had a gradient" in warning and "1e-10" in warning


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_in_backward"])
def test_one_that_it_swallows_altogether_is_an_error(workspace, weights, caplog, optimizer):
    """Also where the gradients that came are freed already."""
    more = ["model.base_learning_rate=1e-20", f"model.params.optimizer={optimizer}"]
    assert main.main(workspace.arguments("swallowed", *weights, *more)) == 1
    (error,) = errors(caplog)
    assert (
        "the UNet and the text encoder should train" in error
        and "1e-20, which is too small" in error
    )


def test_a_step_that_the_gradient_scaler_skipped_does_not_count():
    module = torch.nn.Linear(2, 2)
    module.automatic_optimization = True
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    trainer = SimpleNamespace(
        strategy=SingleDeviceStrategy("cpu"), precision_plugin=SimpleNamespace(scaler=object()), optimizers=[optimizer],
        accumulate_grad_batches=1, num_training_batches=9, global_step=0, is_global_zero=True,
    )  # fmt: skip
    check = FirstStepCheck(patience=0)
    check.on_train_start(trainer, module)

    def step(gradient):
        module.weight.grad, module.bias.grad = torch.full((2, 2), gradient), torch.ones(2)
        trainer.global_step += 1
        check.on_before_optimizer_step(trainer, module, optimizer)
        check.on_train_batch_end(trainer, module, None, None, 0)

    step(torch.inf)
    step(torch.inf)
    with pytest.raises(UserError, match=r"step 3: the bias and the weight should train"):
        step(1.0)
