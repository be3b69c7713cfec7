"""Whatever people have is read, and what is truncated or no checkpoint is refused in one line."""

import argparse
import collections
import json
import os
import pathlib
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoints.loading import load_into
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.checkpoints.unpickle import Stub
from ldm.errors import UserError
from ldm.files import save_checkpoint
from tests.support.pickles import WEIGHTS, pickled, same, save_legacy, save_zip

# What can be read


@pickled
@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_pickled_files(save, name, tmp_path):
    save({"state_dict": WEIGHTS, "global_step": 3}, tmp_path / name)
    content = read_checkpoint(tmp_path / name)
    assert content["global_step"] == 3
    assert same(state_dict_of(content, "x"), WEIGHTS)
    assert same(state_dict_of(read_checkpoint(str(tmp_path / name)), "x"), WEIGHTS)


def test_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert same(read_checkpoint(tmp_path / "model.safetensors"), WEIGHTS)


@pickled
def test_weights_without_a_state_dict_around_them(save, tmp_path):
    save(WEIGHTS, tmp_path / "model.ckpt")
    assert same(state_dict_of(read_checkpoint(tmp_path / "model.ckpt"), "x"), WEIGHTS)


DTYPES = (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)


@pickled
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(save, dtype, tmp_path):
    weights = {"w": torch.tensor([[0.0, 1.0], [1.0, 1.0]]).to(dtype), "half": torch.ones(4)[1:3]}
    weights["transposed"] = weights["w"].t()
    save(weights, tmp_path / "model.ckpt")
    read = read_checkpoint(tmp_path / "model.ckpt")
    assert all(read[key].dtype == value.dtype for key, value in weights.items())
    assert all(torch.equal(read[key].float(), value.float()) for key, value in weights.items())


@pickled
def test_weights_of_a_gpu_come_to_the_cpu(save, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        save(WEIGHTS, tmp_path / "model.ckpt")
    assert b"cuda:0" in (tmp_path / "model.ckpt").read_bytes()
    assert same(read_checkpoint(tmp_path / "model.ckpt"), WEIGHTS)


@pickled
def test_parameters_and_shared_tensors(save, tmp_path):
    parameter = nn.Parameter(torch.ones(3))
    save(
        {"first": parameter, "second": parameter, "frozen": nn.Parameter(torch.zeros(2), False)},
        tmp_path / "x.ckpt",
    )
    read = read_checkpoint(tmp_path / "x.ckpt")
    assert isinstance(read["first"], nn.Parameter) and read["first"].requires_grad
    assert read["first"] is read["second"]
    assert not read["frozen"].requires_grad


@pickled
def test_plain_values_come_back_as_they_were(save, tmp_path):
    plain = {
        "none": None, "flag": True, "int": 10**30, "float": 0.5, "complex": 1j, "text": "grüße", "bytes": b"\x00\xff",
        "array": bytearray(b"ab"), "list": [1, [2]], "tuple": (1, (2,)), "set": {1, 2}, "frozen": frozenset({3}),
        "ordered": collections.OrderedDict(b=1, a=2), "size": torch.Size([1, 2]), "dtype": torch.bfloat16,
        "no bytes": b"", "device": torch.device("cpu"), 3: "integer key",
    }  # fmt: skip
    save(plain, tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt") == plain


class Custom:
    def __init__(self):
        self.value = 1


class CustomDict(dict):
    pass


class CustomList(list):
    pass


Pair = collections.namedtuple("Pair", "left right")


FOREIGN = {
    "namespace": argparse.Namespace(lr=1.0),
    "config": OmegaConf.create({"a": [1, {"b": "${a}"}]}),
    "path": pathlib.PurePosixPath("/a/b"),
    "object": Custom(),
    "class": Custom,
    "function": os.path.join,
    "method": Custom.__init__,
    "builtin": print,
    "dict": CustomDict(a=1),
    "list": CustomList([1, 2]),
    "pair": Pair(1, 2),
    "counter": collections.Counter("abca"),
    "default": collections.defaultdict(list, a=[1]),
    "deque": collections.deque([1], maxlen=3),
    "number": np.float64(1.5),
    "numbers": np.arange(3),
    "module": nn.Linear(2, 2),
    "error": UserError("x"),
    "slice": slice(1, 2),
    "range": range(3),
}


@pickled
@pytest.mark.parametrize("name", FOREIGN)
def test_objects_of_other_classes_do_not_hide_the_weights(save, name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against saving modules whole
        save(
            {"before": FOREIGN[name], "state_dict": WEIGHTS, "after": [FOREIGN[name]]},
            tmp_path / "x.ckpt",
        )
    content = read_checkpoint(tmp_path / "x.ckpt")
    assert same(state_dict_of(content, "x"), WEIGHTS)
    found = content["before"]
    assert isinstance(found, Stub) or (isinstance(found, type) and issubclass(found, Stub))


def test_stubs_keep_what_the_pickle_says(tmp_path):
    save_zip(
        {name: FOREIGN[name] for name in ("object", "path", "dict", "list", "pair")},
        tmp_path / "x.ckpt",
    )
    read = read_checkpoint(tmp_path / "x.ckpt")
    assert read["object"].state == {"value": 1}
    assert read["path"].args == ("/", "a", "b")
    assert read["dict"].items == [("a", 1)]
    assert read["list"].items == [1, 2]
    assert read["pair"].args == (1, 2)
    assert type(read["object"]).__name__ == "Custom" and type(read["object"]) is not Custom


def test_stubs_can_be_keys_and_members(tmp_path):
    save_zip({FOREIGN["path"]: 1, "set": {FOREIGN["pair"], FOREIGN["path"]}}, tmp_path / "x.ckpt")
    read = read_checkpoint(tmp_path / "x.ckpt")
    assert len(read) == 2 and len(read["set"]) == 2


class Module(pl.LightningModule):
    """As small as a module can be that Lightning trains; its hyperparameters hold all sorts of
    things.
    """

    def __init__(self, config, options, folder, custom):
        super().__init__()
        self.save_hyperparameters()
        self.a = nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        loss = self.a(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["odd"] = [
            CustomDict(a=torch.ones(1)),
            np.float64(2),
            pathlib.Path("x"),
            Custom(),
        ]


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_lightning_wrote(tmp_path):
    module = Module(
        OmegaConf.create({"a": {"b": [1]}}),
        argparse.Namespace(x=1),
        pathlib.Path("/data"),
        collections.Counter("ab"),
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[
            pl.callbacks.ModelCheckpoint(tmp_path, monitor="loss", save_last=True, every_n_train_steps=1),
            pl.callbacks.EarlyStopping("loss", check_on_train_epoch_end=True),
            pl.callbacks.Timer(),
        ],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 3), batch_size=2))
    content = read_checkpoint(tmp_path / "last.ckpt")
    assert same(state_dict_of(content, "x"), module.state_dict())
    assert content["global_step"] == 2 and content["pytorch-lightning_version"] == pl.__version__
    assert any(key.startswith("ModelCheckpoint") for key in content["callbacks"])
    (states,) = content["optimizer_states"]
    assert torch.equal(
        states["state"][0]["exp_avg"], trainer.optimizers[0].state[module.a.weight]["exp_avg"]
    )
    # A fresh module, as Lightning itself would fill it
    report = load_into(other := Module(None, None, None, None), tmp_path / "last.ckpt")
    assert (
        same(other.state_dict(), module.state_dict())
        and not report.missing
        and not report.unexpected
    )


def test_what_we_write_we_read(tmp_path):
    save_checkpoint(
        {"state_dict": WEIGHTS, "config": {"model": {"target": "x"}}},
        tmp_path / "a" / "b" / "x.ckpt",
    )
    content = read_checkpoint(tmp_path / "a" / "b" / "x.ckpt")
    assert content["config"] == {"model": {"target": "x"}}
    assert same(content["state_dict"], WEIGHTS)
    assert same(
        torch.load(tmp_path / "a" / "b" / "x.ckpt", weights_only=True)["state_dict"], WEIGHTS
    )


# What cannot be read


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "legacy"])
def test_truncated_files(suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    {"ckpt": save_zip, "safetensors": save_file, "legacy": save_legacy}[suffix](WEIGHTS, path)
    whole = path.read_bytes()
    for length in (
        0,
        1,
        4,
        10,
        100,
        len(whole) // 3,
        len(whole) // 2,
        len(whole) - 30,
        len(whole) - 1,
    ):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"model\.{suffix}: truncated or not a") as refusal:
            read_checkpoint(path)
    assert "it ends too early: download it again" in str(refusal.value)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "legacy"])
def test_damaged_files_raise_nothing_else(suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    {"ckpt": save_zip, "safetensors": save_file, "legacy": save_legacy}[suffix](WEIGHTS, path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        # Near the beginning, where the pickle or the header is
        for position in random.integers(0, min(len(whole), 700), 4):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 20


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("content", [b"\0" * 9, b"\0" * 5000, bytes(range(255, 0, -1)) * 20])
def test_bytes_of_nothing_that_is_known(suffix, content, tmp_path):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"model\.{suffix}: truncated or not a"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", [".", "no.ckpt", "no.safetensors"])
def test_no_file(name, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / name)


@pickled
@pytest.mark.parametrize("content", [[1], torch.ones(1), "text", Custom()])
def test_not_a_mapping(save, content, tmp_path):
    save(content, tmp_path / "x.ckpt")
    with pytest.raises(
        UserError, match=r"x\.ckpt: not a checkpoint: it holds a (list|Tensor|str|Custom)"
    ):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 1, 2: "x"}, {"state_dict": {}}, {"state_dict": [1]}]
)
def test_no_weights(content):
    with pytest.raises(
        UserError, match=r"x\.ckpt: no weights in it; its keys are (none|epoch, 2|state_dict)$"
    ):
        state_dict_of(content, "x.ckpt")


def test_only_tensors_are_weights():
    assert set(state_dict_of({"state_dict": {"w": torch.ones(1), "n": 3}}, "x")) == {"w"}
    assert set(state_dict_of({"w": torch.ones(1), "epoch": 3}, "x")) == {"w"}


# Sharded files


def save_shards(folder, weight_map=None):
    """`WEIGHTS` in two files; the index."""
    folder.mkdir(exist_ok=True)
    parts = {
        f"model-{n + 1:05}-of-00002.safetensors": part
        for n, part in enumerate((["a.weight"], ["a.bias", "steps"]))
    }
    for name, keys in parts.items():
        save_file({key: WEIGHTS[key] for key in keys}, folder / name)
    index = folder / "model.safetensors.index.json"
    weight_map = weight_map or {key: name for name, keys in parts.items() for key in keys}
    index.write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))
    return index


def test_sharded_safetensors(tmp_path):
    assert same(state_dict_of(read_checkpoint(save_shards(tmp_path)), "x"), WEIGHTS)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "model.ckpt", 3]
)
def test_an_index_names_only_its_neighbours(name, tmp_path):
    save_file(WEIGHTS, tmp_path / "secret.safetensors")
    with pytest.raises(UserError, match=r"which is not a \.safetensors file beside it"):
        read_checkpoint(save_shards(tmp_path / "shards", {"a.weight": name}))


def test_an_index_that_lacks_something(tmp_path):
    index = save_shards(tmp_path, {"b": "model-00001-of-00002.safetensors"})
    with pytest.raises(UserError, match="1 tensors are not in the files that it names, first 'b'"):
        read_checkpoint(index)
    index = save_shards(tmp_path, {"b": "model-00003-of-00002.safetensors"})
    with pytest.raises(UserError, match=r"model-00003-of-00002\.safetensors: no such checkpoint"):
        read_checkpoint(index)
    index.write_text("{}")
    with pytest.raises(UserError, match="not an index of sharded safetensors"):
        read_checkpoint(index)
