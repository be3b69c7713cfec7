"""The exponential moving average of weights."""

import pytest
import torch

from ldm.modules.ema import LitEma
from tests.support import golden
from tests.support.models import averaged, batch, build, loader, small_trainer, unet_of


@pytest.fixture
def averaged_model():
    """A model whose UNet is 1 away from its EMA weights."""
    return averaged(build(use_ema=True))


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [None, Boom])
def test_ema_scope_swaps_and_restores(averaged_model, error):
    own = unet_of(averaged_model)

    def inside():
        with averaged_model.ema_scope("test"):
            for name, parameter in averaged_model.model.named_parameters():
                torch.testing.assert_close(parameter.detach(), own[name] - 1, rtol=0, atol=1e-5)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            inside()
    else:
        inside()
    assert all(
        torch.equal(parameter, own[name]) for name, parameter in unet_of(averaged_model).items()
    )


def test_ema_lives_in_the_state_dict(averaged_model):
    state = averaged_model.state_dict()
    averages = {key for key in state if key.startswith("model_ema.")}
    expected = {f"model_ema.{name.replace('.', '')}" for name in unet_of(averaged_model)}
    assert averages == expected | {"model_ema.decay", "model_ema.num_updates"}
    other = build(use_ema=True)
    other.load_state_dict(state)
    for name, buffer in averaged_model.model_ema.named_buffers():
        assert torch.equal(other.model_ema.get_buffer(name), buffer)


def test_without_an_ema_the_scope_changes_nothing(golden_model):
    assert not any(key.startswith("model_ema") for key in golden_model.state_dict())
    before = golden_model.model.diffusion_model.out[2].weight
    value = before.detach().clone()
    with golden_model.ema_scope():
        assert golden_model.model.diffusion_model.out[2].weight is before and torch.equal(
            before, value
        )


def test_ema_converges_to_constant_weights_and_starts_with_a_short_memory():
    layer = torch.nn.Linear(2, 2, bias=False)
    ema = LitEma(layer, decay=0.9)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    ema(layer)
    torch.testing.assert_close(
        ema.weight - start, torch.full((2, 2), 1 - 2 / 11)
    )  # (1 + n) / (10 + n)
    for _ in range(200):
        ema(layer)
    torch.testing.assert_close(ema.weight, layer.weight.detach(), rtol=0, atol=1e-5)
    assert ema.num_updates == 201


def test_ema_without_counting_has_its_full_memory_from_the_start():
    layer = torch.nn.Linear(1, 1, bias=False)
    ema = LitEma(layer, decay=0.75, use_num_updates=False)
    start = layer.weight.item()
    with torch.no_grad():
        layer.weight += 1
    ema(layer)
    assert ema.weight.item() == pytest.approx(start + 0.25, abs=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_ema_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=str(decay)):
        LitEma(torch.nn.Linear(1, 1), decay)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*treespec.*")
def test_the_average_moves_once_for_each_step_and_is_evaluated():
    model = build(use_ema=True)
    before = unet_of(model)
    trainer = small_trainer(max_steps=2, accumulate_grad_batches=2)
    trainer.fit(model, loader(*[batch(i) for i in range(4)]), loader(batch(9)))
    assert trainer.global_step == 2 and model.model_ema.num_updates == 2
    assert any(not torch.equal(before[name], after) for name, after in unet_of(model).items())
    names = {
        f"val/{name}{ema}"
        for name in ("loss", "loss_simple", "loss_vlb", "loss_total")
        for ema in ("", "_ema")
    }
    assert names <= set(trainer.callback_metrics)
    assert golden.CONFIG["monitor"] in names
    plain, average = (trainer.callback_metrics[f"val/loss_simple{ema}"] for ema in ("", "_ema"))
    assert plain != average


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*treespec.*")
def test_without_an_average_the_monitored_metric_is_there_too(golden_model):
    trainer = small_trainer()
    (metrics,) = trainer.validate(golden_model, loader(batch(9)), verbose=False)
    assert metrics["val/loss_simple_ema"] == metrics["val/loss_simple"] > 0
    golden_model.train()
