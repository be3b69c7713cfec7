"""Datasets and batches: the reference's lengths, errors that name what is wrong, and exact
order.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.personalized import PersonalizedBase
from ldm.errors import UserError
from ldm.training.prepare import prepare
from ldm.training.stages import Stages
from tests.support.photos import folder

PERSONALIZED = "ldm.data.personalized.PersonalizedBase"


def test_lengths_equal_the_reference(one, meta):
    lengths = {
        "train_default": len(PersonalizedBase(one, size=64)),
        "val": len(PersonalizedBase(one, size=64, set="val", repeats=10)),
        "repeats10": len(PersonalizedBase(one, size=64, repeats=10)),
    }
    assert lengths == meta["data_len"]


# what a user gets wrong


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("checked", [True, False])
def test_broken_image_stops_a_run_with_its_name(tmp_path, checked, workers):
    root = folder(tmp_path / "a", 3)
    (root / "bad.jpg").write_text("not an image")
    data = module(root, num_workers=workers)
    with pytest.raises(UserError, match=r"bad\.jpg") as error:
        if checked:
            data.setup("fit")
        list(data.train_dataloader())  # of a file that broke since
    message = str(error.value)
    # its traceback holds the loader: workers that the garbage collector finds stop after five
    # seconds
    del error
    assert message.startswith(str(root)) and "\n" not in message


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"set": "test"}, "set: expected train or val"),
        ({"repeats": 0}, "repeats"),
        ({"size": 0}, "size"),
        ({"flip_p": 2}, "flip_p"),
        ({"interpolation": "cubic"}, "interpolation: .*bicubic"),
        ({"resize": "stretch"}, "resize: .*squash"),
        ({"resize": "random_crop", "center_crop": True}, "center_crop"),
        ({"placeholder_token": None}, "--class_word"),
    ],
)
def test_bad_parameters(one, params, words):
    with pytest.raises(UserError, match=words):
        PersonalizedBase(one, **params)


def test_config_errors_name_the_key(one):
    with pytest.raises(UserError, match=r"train\.params\.repeat: .*'repeats'"):
        module(one, train={"repeat": 3})
    with pytest.raises(UserError, match="batch_size: expected at least 1"):
        module(one, batch_size=0)
    with pytest.raises(UserError, match="seed: expected 0 or more, got -1"):
        module(one, seed=-1)
    with pytest.raises(UserError, match=r"needs data\.params\.reg"):
        module(one, num_class_images=3)
    with pytest.raises(
        UserError, match=r"class_images\.unconditional: expected a share below 1, got 1"
    ):
        module(one, one, class_images={"unconditional": 1})


# batches


def module(subject, prior=None, train=None, **params) -> DataModuleFromConfig:
    def config(root, **more):
        return {"target": PERSONALIZED, "params": {"data_root": str(root), "size": 4, **more}}

    params = {"batch_size": 1, "num_workers": 0, **params}
    reg = None if prior is None else config(prior, reg=True)
    return DataModuleFromConfig(train=config(subject, **(train or {})), reg=reg, **params)


def as_rank(
    data: DataModuleFromConfig, rank: int, world_size: int, batches_done: int = 0
) -> DataModuleFromConfig:
    progress = SimpleNamespace(total=SimpleNamespace(processed=batches_done))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, fit_loop=loop)
    return data


def examples(batches) -> list:
    """A loader's examples one by one, comparable."""
    result = []
    for halves in batches:
        rows = [
            [
                (half["image"][i].sum().item(), half["caption"][i], int(half["noise_seed"][i]))
                for half in halves
            ]
            for i in range(len(halves[0]["caption"]))
        ]
        result += rows
    return result


@pytest.fixture
def folders(tmp_path):
    return folder(tmp_path / "subject", 3), folder(tmp_path / "prior", 7, first=3)


def test_batches(folders):
    subject, prior = folders
    alone = next(iter(module(subject, batch_size=2).train_dataloader()))
    assert alone["image"].shape == (2, 4, 4, 3) and alone["image"].dtype == torch.float32
    assert alone["caption"] == ["photo of a sks dog"] * 2
    assert alone["noise_seed"].dtype == torch.int64 and alone["noise_seed"].shape == (2,)
    pair = next(iter(module(subject, prior, batch_size=2).train_dataloader()))
    assert isinstance(pair, tuple) and [half["image"].shape[0] for half in pair] == [2, 2]
    assert [half["caption"][0] for half in pair] == ["photo of a sks dog", "photo of a dog"]
    assert not set(pair[0]["noise_seed"].tolist()) & set(pair[1]["noise_seed"].tolist())
    assert torch.equal(
        pair[0]["image"], alone["image"]
    )  # a prior does not change what the subject sees


def test_every_pass_holds_every_image_once(folders):
    data = module(*folders, train={"repeats": 14, "flip_p": 0})
    rows = examples(data.train_dataloader())
    assert len(rows) == 3 * 14
    passes = [tuple(row[0][0] for row in rows[i : i + 3]) for i in range(0, 42, 3)]
    assert all(len(set(one_pass)) == 3 for one_pass in passes)
    assert len(set(passes)) > 2  # their orders differ
    prior_passes = [{row[1][0] for row in rows[i : i + 7]} for i in range(0, 42, 7)]
    assert all(len(one_pass) == 7 for one_pass in prior_passes)
    assert len({row[0][2] for row in rows}) == len(rows)


def test_order_depends_on_the_seed(folders):
    first, again, other = (
        examples(module(*folders, seed=seed).train_dataloader()) for seed in (23, 23, 24)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_batch_size_share_one_order(folders, workers):
    train = {"repeats": 4, "templates": ["a {}", "one {}"], "resize": "random_crop"}
    whole = examples(module(*folders, train, batch_size=4).train_dataloader())
    assert examples(module(*folders, train).train_dataloader()) == whole
    ranks = [
        as_rank(module(*folders, train, batch_size=2, num_workers=workers), rank, 2)
        for rank in (0, 1)
    ]
    loaders = [data.train_dataloader() for data in ranks]
    assert [len(loader) for loader in loaders] == [3, 3]
    split = [[examples([batch]) for batch in loader] for loader in loaders]
    assert [row for step in zip(*split) for rows in step for row in rows] == whole


def test_small_set_still_gives_one_full_batch(folders):
    loader = module(folders[0], train={"repeats": 1}, batch_size=5).train_dataloader()
    assert [batch["image"].shape[0] for batch in loader] == [5]


def test_epochs_continue_the_positions(folders):
    data = module(*folders, train={"repeats": 8})
    whole = examples(data.train_dataloader())
    data = as_rank(module(*folders, train={"repeats": 4}), 0, 1)
    loader = data.train_dataloader()
    first = examples(loader)
    data.trainer.fit_loop.epoch_loop.batch_progress.total.processed = len(first)
    assert first + examples(loader) == whole


def test_validation_is_the_same_in_every_epoch_and_on_every_rank(folders):
    config = {
        "target": PERSONALIZED,
        "params": {"data_root": str(folders[0]), "size": 4, "set": "val"},
    }
    data = module(*folders, validation=config, batch_size=2)
    batches = list(data.val_dataloader())
    assert [len(batch["caption"]) for batch in batches] == [2, 1]
    rows = examples([[batch] for batch in batches])
    assert len({row[0][2] for row in rows}) == 3
    assert (
        examples([[batch] for batch in as_rank(data, 1, 2, batches_done=5).val_dataloader()])
        == rows
    )


class NoisyDataset(torch.utils.data.Dataset):
    """Someone's own dataset, which augments with torch's global generator."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.rand(2, 2, 3), "caption": str(index)}


def test_foreign_datasets_are_exact_too():
    data = DataModuleFromConfig(1, train={"target": f"{__name__}.NoisyDataset"}, num_workers=0)
    torch.manual_seed(0)
    first = examples([batch] for batch in data.train_dataloader())
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == after  # the loader left the global generator alone
    assert examples([batch] for batch in data.train_dataloader()) == first
    assert sorted(row[0][1] for row in first) == ["0", "1", "2", "3"]


def test_images_of_different_sizes_need_a_size(tmp_path):
    root = folder(tmp_path / "a", 1)
    folder(root / "b", 1, shape=(6, 6, 3))
    with pytest.raises(UserError, match="'size'"):
        list(module(root, train={"size": None}, batch_size=2).train_dataloader())


def test_workers_default_to_none_for_what_fits_in_memory(folders):
    assert module(*folders, num_workers=None).train_dataloader().num_workers == 0
    loader = module(*folders, train={"cache_images": 0}, num_workers=None).train_dataloader()
    assert loader.num_workers > 0 and loader.persistent_workers


def test_summary(folders):
    assert module(*folders).summary() == {
        "subject_images": 3,
        "class_images": 7,
        "class_images_to_make": 0,
        "subject_prompts": ["photo of a sks dog"],
        "unnamed_prompts": [],
        "class_prompts": ["photo of a dog"],
    }


# with Lightning


class Recorder(pl.LightningModule):
    """Notes what each training step gets."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps: list = []

    def training_step(self, batch, batch_idx):
        self.steps.append((self.current_epoch, batch_idx, examples([batch])))
        return (self.weight * batch[0]["image"].mean()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(pl.Callback):
    def __init__(self, path: Path, step: int):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(data, accumulate=1, callbacks=(), ckpt_path=None, **limits) -> Recorder:
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        **limits,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    return model


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 9}], ids=["epochs", "steps"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_order_is_the_uninterrupted_one(
    folders, tmp_path, limits, workers, accumulate, recwarn
):
    def data():  # 9 batches an epoch: with two accumulated, its last step has one only
        return module(*folders, train={"repeats": 6}, batch_size=2, num_workers=workers)

    straight = fit(data(), accumulate, **limits).steps
    if "max_epochs" in limits:
        assert [(epoch, batch) for epoch, batch, _ in straight] == [
            (e, b) for e in range(3) for b in range(9)
        ]
    positions = examples(module(*folders, train={"repeats": 18}).train_dataloader())
    assert [row for *_, rows in straight for row in rows] == positions[
        : 2 * len(straight)
    ]  # none left out
    steps_an_epoch = 9 if accumulate == 1 else 5
    ends = [2, steps_an_epoch, steps_an_epoch + 3] if workers == 0 else [steps_an_epoch + 1]
    for at in [
        end for end in ends if end < limits.get("max_steps", 99)
    ]:  # mid-epoch, at its end, in the next
        path = tmp_path / f"{at}.ckpt"
        fit(data(), accumulate, [SaveAt(path, at)], max_steps=at)
        resumed = fit(data(), accumulate, ckpt_path=path, **limits).steps
        epochs, rest = divmod(at, steps_an_epoch)
        assert resumed == straight[epochs * 9 + rest * accumulate :]
        assert resumed
    assert not [w for w in recwarn if "not resumable" in str(w.message)]


def test_resuming_with_another_batch_size_warns(folders, tmp_path, caplog):
    path = tmp_path / "a.ckpt"
    fit(module(*folders), callbacks=[SaveAt(path, 2)], max_steps=2)
    fit(module(*folders, batch_size=2), ckpt_path=path, max_steps=3)
    assert "resumed with 2 examples a step instead of 1" in caplog.text


def test_missing_class_images_are_made_by_the_model(tmp_path, monkeypatch):
    subject, prior = folder(tmp_path / "subject", 2), tmp_path / "class" / "dog"
    calls = []

    def make_class_images(model, folder, prompts, count, size, seed, device):
        calls.append((type(model), prompts, count, size, seed, device))
        folder.mkdir(parents=True, exist_ok=True)
        start = len(list(folder.glob("*.png")))  # a hidden file says that a process works here
        for i in range(start, start + count):
            Image.new("RGB", (size, size)).save(folder / f"{i}.png")

    monkeypatch.setattr("ldm.training.prepare.make_class_images", make_class_images)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    data = module(subject, prior, num_class_images=3, seed=5)
    assert data.summary()["class_images_to_make"] == 3
    assert data.summary()["class_prompts"] == ["photo of a dog"]
    prepare(Recorder(), data, trainer, Stages())
    assert calls == [(Recorder, ["photo of a dog"], 3, 4, 5, torch.device("cpu"))]
    assert data.summary()["class_images"] == 3
    (prior / "2.png").unlink()
    prepare(
        Recorder(), module(subject, prior, num_class_images=2), trainer, Stages()
    )  # enough are left
    assert len(calls) == 1
    prepare(Recorder(), module(subject, prior, num_class_images=4), trainer, Stages())
    assert calls[1][2] == 2


def test_out_of_memory_for_class_images_names_their_batch_size(tmp_path, monkeypatch):
    def make_class_images(**_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("ldm.training.prepare.make_class_images", make_class_images)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    data = module(folder(tmp_path / "subject", 1), tmp_path / "class", num_class_images=1)
    with pytest.raises(UserError, match=r"out of memory .*data\.params\.class_images\.batch_size"):
        prepare(Recorder(), data, trainer, Stages())


def test_class_image_config_is_checked_before_anything_runs(tmp_path):
    subject = folder(tmp_path / "subject", 1)
    with pytest.raises(UserError, match="--reg_data_root"):
        module(subject, "", num_class_images=3)
    with pytest.raises(UserError, match="is a file"):
        module(subject, subject / "00.png", num_class_images=3)
    with pytest.raises(UserError, match="no such folder"):
        module(subject, tmp_path / "missing")
