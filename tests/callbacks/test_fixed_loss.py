"""Losses at fixed time steps with fixed noise."""

import pytest
import torch

import main
from ldm.callbacks.fixed_loss import FixedLoss
from ldm.data.personalized import PersonalizedBase
from tests.support.runs import SIZE, checkpoint, csv_rows, metrics, same
from tests.support.spies import fixed


def fixed_losses(run, name):
    return {int(row["step"]): row[name] for row in csv_rows(run) if row.get(name)}


@pytest.fixture(scope="module")
def curve(workspace):
    return workspace.train("curve", fixed())


def test_fixed_losses_are_logged_also_before_the_first_step(curve):
    for name in ("val/loss_subject_fixed", "val/loss_prior_fixed"):
        assert list(fixed_losses(curve, name)) == [0, 2, 4]
        assert len(set(fixed_losses(curve, name).values())) == 3


def test_fixed_losses_change_nothing(curve, plain):
    ours, theirs = checkpoint(curve), checkpoint(plain)
    assert same(ours["state_dict"], theirs["state_dict"]) and same(
        ours["optimizer_states"], theirs["optimizer_states"]
    )
    assert [row["train/loss_total"] for row in metrics(curve)] == [
        row["train/loss_total"] for row in metrics(plain)
    ]


def test_fixed_losses_are_a_function_of_the_weights_alone(workspace, curve):
    """Resumed with other batches, in which the step's own losses differ."""
    first = workspace.train("same-weights", "--max_steps", "2", fixed(every_n_steps=50))
    workspace.resume(first, "--max_steps", "3", "data.params.batch_size=2", "-s", "5")
    for name in ("val/loss_subject_fixed", "val/loss_prior_fixed"):
        assert fixed_losses(first, name) == {
            step: fixed_losses(curve, name)[step] for step in (0, 2)
        }


def test_a_fixed_loss_is_the_mean_of_the_examples_losses(workspace, golden_model):
    """At the middles of three parts of the schedule, of the unaugmented first and second image."""
    data = PersonalizedBase(workspace.photos, SIZE, flip_p=1.0, resize="random_crop")
    callback = FixedLoss(examples=2, time_steps=3, batch_size=4)
    golden_model.eval()
    found = callback.losses(golden_model, {"train": data})
    assert list(found) == ["subject"]
    assert FixedLoss(examples=2, time_steps=3, batch_size=1).losses(
        golden_model, {"train": data}
    ) == pytest.approx(found)
    (half,) = (callback._fixed or {}).values()
    assert half.t.tolist() == [166, 500, 833] * 2
    plain = PersonalizedBase(workspace.photos, SIZE, flip_p=0.0, resize="center_crop")
    with torch.no_grad():
        losses = []
        for example in range(2):
            image = torch.from_numpy(plain[example]["image"].copy()).permute(2, 0, 1)[None]
            z = golden_model.get_first_stage_encoding(golden_model.encode_first_stage(image).mode())
            cond = golden_model.get_learned_conditioning([plain[example]["caption"]])
            for place in range(3):
                pair = 3 * example + place
                loss, _ = golden_model.p_losses(
                    z, cond, half.t[pair : pair + 1], half.noise[pair : pair + 1]
                )
                losses.append(float(loss))
    assert found["subject"] == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_fixed_losses_without_a_prior_and_of_latents(golden_model):
    class Latents(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            moments = torch.randn(
                2 * golden_model.latent_channels,
                8,
                8,
                generator=torch.Generator().manual_seed(index),
            )
            return {"moments": moments.half(), "caption": f"number {index}"}

    golden_model.eval()
    state = torch.get_rng_state()
    first, second = (
        FixedLoss(time_steps=2).losses(golden_model, {"train": Latents()}) for _ in range(2)
    )
    assert first == second and list(first) == ["subject"]
    assert torch.equal(torch.get_rng_state(), state)


def test_fixed_losses_of_another_kind_of_model(workspace, caplog):
    assert main.main(workspace.arguments("mistaken", fixed(time_steps=0))) == 1
    assert "fixed_loss.params.time_steps: expected 1 or more, got 0" in caplog.text
