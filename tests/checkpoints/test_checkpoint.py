"""Checkpoints: read whatever people have without running it, load with a report, never lose what was there."""

import argparse
import builtins
import codecs
import collections
import contextlib
import errno
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
import tarfile
import time
import types
import warnings
import zipfile

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoints import loading as checkpoint
from ldm.checkpoints.ema import weights_to_sample_from, weights_to_train
from ldm.checkpoints.loading import EmptyInit, adopt_state, compare, describe, instantiate_filled, load_into, load_state
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.checkpoints.unpickle import Stub
from ldm.errors import UserError
from ldm.files import save_checkpoint, tensor_bytes, write_atomically
from tests.support import golden

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "steps": torch.tensor(7)}


def save_zip(content, path):
    torch.save(content, path)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


pickled = pytest.mark.parametrize("save", [save_zip, save_legacy])


def same(first, second):
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in second
    )


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


DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)


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
    save({"first": parameter, "second": parameter, "frozen": nn.Parameter(torch.zeros(2), False)}, tmp_path / "x.ckpt")
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
        save({"before": FOREIGN[name], "state_dict": WEIGHTS, "after": [FOREIGN[name]]}, tmp_path / "x.ckpt")
    content = read_checkpoint(tmp_path / "x.ckpt")
    assert same(state_dict_of(content, "x"), WEIGHTS)
    found = content["before"]
    assert isinstance(found, Stub) or (isinstance(found, type) and issubclass(found, Stub))


def test_stubs_keep_what_the_pickle_says(tmp_path):
    save_zip({name: FOREIGN[name] for name in ("object", "path", "dict", "list", "pair")}, tmp_path / "x.ckpt")
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
    """As small as a module can be that Lightning trains; its hyperparameters hold all sorts of things."""

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
        checkpoint["odd"] = [CustomDict(a=torch.ones(1)), np.float64(2), pathlib.Path("x"), Custom()]


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_lightning_wrote(tmp_path):
    module = Module(
        OmegaConf.create({"a": {"b": [1]}}), argparse.Namespace(x=1), pathlib.Path("/data"), collections.Counter("ab")
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
    assert torch.equal(states["state"][0]["exp_avg"], trainer.optimizers[0].state[module.a.weight]["exp_avg"])
    # A fresh module, as Lightning itself would fill it
    report = load_into(other := Module(None, None, None, None), tmp_path / "last.ckpt")
    assert same(other.state_dict(), module.state_dict()) and not report.missing and not report.unexpected


def test_what_we_write_we_read(tmp_path):
    save_checkpoint({"state_dict": WEIGHTS, "config": {"model": {"target": "x"}}}, tmp_path / "a" / "b" / "x.ckpt")
    content = read_checkpoint(tmp_path / "a" / "b" / "x.ckpt")
    assert content["config"] == {"model": {"target": "x"}}
    assert same(content["state_dict"], WEIGHTS)
    assert same(torch.load(tmp_path / "a" / "b" / "x.ckpt", weights_only=True)["state_dict"], WEIGHTS)


# What must not run


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


CANARY = "import pathlib; pathlib.Path({!r}).touch()"
ATTACKS = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "eval": lambda canary: Call(eval, f"open({canary!r}, 'w')"),
    "exec": lambda canary: Call(exec, CANARY.format(canary)),
    "open": lambda canary: Call(open, canary, "w"),
    "Path.touch": lambda canary: Call(pathlib.Path.touch, pathlib.Path(canary)),
    "bound method": lambda canary: Call(pathlib.Path(canary).touch),
    "getattr": lambda canary: Call(Call(getattr, os, "system"), f"touch {canary}"),
    "getattr chain": lambda canary: Call(
        Call(Call(getattr, Call(getattr, builtins, "__dict__"), "get"), "exec"), CANARY.format(canary)
    ),
    "import": lambda canary: Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {canary}"),
    "torch.save": lambda canary: Call(torch.save, 1, canary),
    "copyfile": lambda canary: Call(shutil.copyfile, __file__, canary),
    "from_file": lambda canary: Call(torch.from_file, canary, True, 16),
    "storage from_file": lambda canary: Call(torch.UntypedStorage.from_file, canary, True, 16),
    "save_checkpoint": lambda canary: Call(save_checkpoint, {}, canary),
    "pickle.loads": lambda canary: Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {canary}"))),
}


# Modules do not pickle; a call that imports them does.
class _Pickler(pickle._Pickler):
    def save(self, obj, *args, **kwargs):
        if isinstance(obj, types.ModuleType):
            obj = Call(__import__, obj.__name__)
        if isinstance(obj, Call) and isinstance(obj.call[0], Call):
            # REDUCE with a computed callable, which the standard pickler refuses to write
            self.save(obj.call[0])
            self.save(obj.call[1])
            self.write(pickle.REDUCE)
            return
        super().save(obj, *args, **kwargs)


class HandMade:
    """The pickle module with `_Pickler`, for torch.save."""

    Pickler = _Pickler

    @staticmethod
    def dump(obj, file, protocol=2):
        _Pickler(file, protocol).dump(obj)


def hidden(attack):
    """The attack where a reader may come across it."""
    return {
        "top": attack,
        "beside the weights": {"state_dict": WEIGHTS, "x": attack},
        "in the weights": {"state_dict": {**WEIGHTS, "x": attack}},
        "deep": {"state_dict": WEIGHTS, "x": [({"y": (attack,)},)]},
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_code_in_a_pickle_does_not_run(name, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    for where, content in hidden(ATTACKS[name](str(canary))).items():
        path = tmp_path / "evil.ckpt"
        torch.save(content, path, pickle_module=HandMade, _use_new_zipfile_serialization=not legacy)
        try:
            read = read_checkpoint(path)
            assert where == "top" or "state_dict" in read
        except UserError as error:
            assert str(path) in str(error)  # a call of something that is a stub fails the whole file
        assert os.listdir(tmp_path) == ["evil.ckpt"], where


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_works_on_a_reader_that_runs_pickles(name, tmp_path):
    canary, file = tmp_path / "canary", io.BytesIO()
    HandMade.dump({"x": ATTACKS[name](str(canary))}, file)
    pickle.loads(file.getvalue())
    assert canary.exists()


def short(text):
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def legacy_file(instructions):
    """A file in the format before zip, with these instructions as its content."""
    file = io.BytesIO()
    sizes = {"short": 2, "int": 4, "long": 4}
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes}
    for header in (0x1950A86A20F9469CFC6C, 1001, system):
        pickle.dump(header, file, 2)
    file.write(b"\x80\x02" + instructions + b".")
    pickle.dump([], file, 2)
    return file.getvalue()


def test_a_record_of_a_class_with_its_source_writes_no_patch(tmp_path, monkeypatch):
    """torch compares such a source with its own and writes the difference to `{name}.patch`."""
    monkeypatch.chdir(tmp_path)
    name = torch._utils._rebuild_tensor_v2.__name__
    attributes = b"}(" + short("dump_patches") + b"\x88" + short("__name__") + short(str(tmp_path / "canary")) + b"u"
    function = b"ctorch._utils\n_rebuild_tensor_v2\n(N" + attributes + b"tb"
    for record in ("module", "storage"):
        saved_id = b"(" + short(record) + function + short("file.py") + short("source") + b"tQ"
        (tmp_path / "evil.ckpt").write_bytes(legacy_file(saved_id))
        with pytest.raises(UserError, match=r"evil\.ckpt"):
            read_checkpoint(tmp_path / "evil.ckpt")
        assert os.listdir(tmp_path) == ["evil.ckpt"]
    assert torch._utils._rebuild_tensor_v2.__name__ == name


@pytest.mark.parametrize("named", [
    "torch._utils _rebuild_tensor_v2", "torch UntypedStorage", "torch FloatStorage", "collections OrderedDict",
    "torch.nn Linear", "ldm.checkpoints.unpickle Stub", "torch Size", "torch float32", "builtins dict",
])  # fmt: skip
def test_a_pickle_cannot_set_attributes_of_what_it_names(named, tmp_path):
    module, name = named.split()
    instructions = f"c{module}\n{name}\n".encode() + b"(N}" + short("canary") + b"\x88stb"
    (tmp_path / "evil.ckpt").write_bytes(legacy_file(b"}" + short("x") + instructions + b"s"))
    with contextlib.suppress(UserError):
        read_checkpoint(tmp_path / "evil.ckpt")
    target = getattr(__import__(module, fromlist=[name]), name)
    assert not hasattr(target, "canary")


class Script(nn.Module):
    """TorchScript runs this when it loads it."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.training = torch.from_file(state[0], shared=True, size=16).numel() > 0
        self.path = state[0]


@pytest.mark.filterwarnings("ignore")
def test_torchscript_does_not_run(tmp_path):
    canary = tmp_path / "canary"
    torch.jit.save(torch.jit.script(Script(str(canary))), tmp_path / "evil.ckpt")
    canary.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"evil\.ckpt: not a checkpoint: a TorchScript archive"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not canary.exists()
    torch.jit.load(tmp_path / "evil.ckpt")
    assert canary.exists()


def test_tar_archives_are_not_extracted(tmp_path):
    with tarfile.open(tmp_path / "x.ckpt", "w") as archive:
        archive.add(__file__, "storages")
    with pytest.raises(UserError, match=r"x\.ckpt: not a checkpoint: a tar archive"):
        read_checkpoint(tmp_path / "x.ckpt")


# What cannot be read


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "legacy"])
def test_truncated_files(suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    {"ckpt": save_zip, "safetensors": save_file, "legacy": save_legacy}[suffix](WEIGHTS, path)
    whole = path.read_bytes()
    for length in (0, 1, 4, 10, 100, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"model\.{suffix}: truncated or not a"):
            read_checkpoint(path)


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
    with pytest.raises(UserError, match=r"x\.ckpt: not a checkpoint: it holds a (list|Tensor|str|Custom)"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("content", [{}, {"epoch": 1, 2: "x"}, {"state_dict": {}}, {"state_dict": [1]}])
def test_no_weights(content):
    with pytest.raises(UserError, match=r"x\.ckpt: no weights in it; its keys are (none|epoch, 2|state_dict)$"):
        state_dict_of(content, "x.ckpt")


def test_only_tensors_are_weights():
    assert set(state_dict_of({"state_dict": {"w": torch.ones(1), "n": 3}}, "x")) == {"w"}
    assert set(state_dict_of({"w": torch.ones(1), "epoch": 3}, "x")) == {"w"}


BOMBS = {
    "bytes": lambda: Call(bytes, 1 << 46),
    "bytearray": lambda: Call(bytearray, 1 << 46),
    "list of bytes": lambda: Call(list, Call(bytes, 1 << 46)),
    "text of nested lists": lambda: Call(str, doubled(60)),
    "another codec": lambda: Call(codecs.encode, "x" * 100, "idna"),
}


def doubled(times):
    """A list whose text is of 2 to the power `times` characters."""
    value = ["x"]
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_cannot_ask_for_endless_memory(name, legacy, tmp_path):
    content = {"state_dict": WEIGHTS, "x": BOMBS[name]()}
    torch.save(content, tmp_path / "bomb.ckpt", pickle_module=HandMade, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"bomb\.ckpt: truncated or not a checkpoint: (bytes|text|encoding)"):
        read_checkpoint(tmp_path / "bomb.ckpt")


def test_compressed_records_are_not_inflated(tmp_path):
    """As a zip bomb has them: a thousand times larger than the file."""
    save_zip({"x": torch.zeros(1 << 22)}, tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as plain, zipfile.ZipFile(tmp_path / "bomb.ckpt", "w") as bomb:
        for record in plain.infolist():
            bomb.writestr(record.filename, plain.read(record), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.ckpt").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"bomb\.ckpt: not read: it has compressed records"):
        read_checkpoint(tmp_path / "bomb.ckpt")


@pytest.mark.parametrize("name", ["../canary", "/tmp/canary", "x/../../canary"])
def test_records_whose_path_escapes_are_written_nowhere(name, tmp_path):
    """torch refuses some of them and reads past the others."""
    (tmp_path / "inner").mkdir()
    save_zip({"state_dict": WEIGHTS}, path := tmp_path / "inner" / "x.ckpt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name.replace("/tmp", str(tmp_path)), b"!")
    with contextlib.suppress(UserError):
        assert same(state_dict_of(read_checkpoint(path), "x"), WEIGHTS)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["inner", "x.ckpt"]


# Sharded files


def save_shards(folder, weight_map=None):
    """`WEIGHTS` in two files; the index."""
    folder.mkdir(exist_ok=True)
    parts = {
        f"model-{n + 1:05}-of-00002.safetensors": part for n, part in enumerate((["a.weight"], ["a.bias", "steps"]))
    }
    for name, keys in parts.items():
        save_file({key: WEIGHTS[key] for key in keys}, folder / name)
    index = folder / "model.safetensors.index.json"
    weight_map = weight_map or {key: name for name, keys in parts.items() for key in keys}
    index.write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))
    return index


def test_sharded_safetensors(tmp_path):
    assert same(state_dict_of(read_checkpoint(save_shards(tmp_path)), "x"), WEIGHTS)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "model.ckpt", 3])
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


# Loading


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("position_ids", torch.arange(4))


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_load_reports_what_it_used():
    report = load_state(net := Net(), WEIGHTS | {"extra": torch.ones(1), "b.c": torch.ones(1)}, "x.ckpt")
    assert sorted(report.used) == ["a.bias", "a.weight", "steps"]
    assert report.missing == ["position_ids"]  # made anew with the model
    assert report.unexpected == ["extra", "b.c"]
    assert str(report) == "3 tensors used; 1 missing (position_ids); 2 unexpected (extra, b.c)"
    assert all(torch.equal(net.state_dict()[key], value) for key, value in WEIGHTS.items())


def test_a_long_report_is_cut():
    report = checkpoint.LoadReport([], [], [f"k{i}" for i in range(9)])
    assert str(report) == "0 tensors used; 9 unexpected (k0, k1, k2, ...)"


@pytest.mark.parametrize("change, message", [
    ({"a.weight": torch.ones(3, 2)}, r"x\.ckpt: 'a.weight' has shape \[3, 2\], the config's model has \[2, 3\]"),
    ({"a.bias": None}, r"x\.ckpt: 1 of the model's 4 tensors are missing, first 'a.bias' .the file has 2, first 'a.w"),
    ({"a.bias": None, "a.weight": None, "steps": None}, r"x\.ckpt: 3 of the model's 4 .*the file has 0"),
])  # fmt: skip
@pytest.mark.parametrize("check", [compare, load_state])
def test_what_does_not_fit_changes_nothing(check, change, message):
    state = {key: value for key, value in (WEIGHTS | change).items() if value is not None}
    before = snapshot(net := Net())
    with pytest.raises(UserError, match=message):
        check(net, state, "x.ckpt")
    assert same(net.state_dict(), before)


def test_compare_changes_nothing():
    before = snapshot(net := Net())
    assert compare(net, WEIGHTS, "x").missing == ["position_ids"]
    assert same(net.state_dict(), before)


def test_averages_are_optional():
    net = Net()
    net.model_ema = nn.Linear(1, 1)
    assert compare(net, WEIGHTS, "x").missing == ["position_ids", "model_ema.weight", "model_ema.bias"]


@pytest.mark.parametrize("stored, wanted", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
def test_dtypes_convert_to_the_models(stored, wanted):
    net = Net().to(wanted)
    state = {key: value.to(stored) if value.is_floating_point() else value for key, value in WEIGHTS.items()}
    load_state(net, state, "x")
    assert net.a.weight.dtype == wanted and torch.equal(net.a.weight.float(), WEIGHTS["a.weight"])
    assert net.steps.dtype == torch.int64 and net.steps == 7


def test_ignored_keys_stay(tmp_path):
    save_zip({"state_dict": WEIGHTS | {"steps": torch.ones(5)}}, tmp_path / "x.ckpt")
    net = Net()
    bias = net.a.bias.detach().clone()
    report = load_into(net, tmp_path / "x.ckpt", ignore_keys=["a.b", "steps"])
    assert report.used == ["a.weight"]
    assert torch.equal(net.a.weight, WEIGHTS["a.weight"]) and torch.equal(net.a.bias, bias) and net.steps == 0


def test_loading_does_not_tie_the_model_to_the_file(tmp_path):
    save_zip(WEIGHTS, tmp_path / "x.ckpt")
    load_into(net := Net(), tmp_path / "x.ckpt")
    with torch.no_grad():
        net.a.weight.zero_()
    assert same(read_checkpoint(tmp_path / "x.ckpt"), WEIGHTS)


def test_adopted_weights_are_the_files_own_and_not_tied_to_it(tmp_path):
    """No copy is made; what training then writes stays in memory."""
    for name, save in (("x.ckpt", save_zip), ("x.safetensors", save_file)):
        save(WEIGHTS, tmp_path / name)
        state = state_dict_of(read_checkpoint(tmp_path / name), name)
        adopt_state(net := Net(), state, name)
        assert net.a.weight.data_ptr() == state["a.weight"].data_ptr() and net.a.weight.requires_grad
        with torch.no_grad():
            net.a.weight.zero_()
        assert same(read_checkpoint(tmp_path / name), WEIGHTS)


def test_adopted_weights_in_half_precision():
    adopt_state(net := Net(), WEIGHTS, "x", torch.float16)
    assert net.a.weight.dtype == torch.float16 and net.a.bias.dtype == torch.float32  # vectors stay
    assert net.steps.dtype == torch.int64 and net.a.weight.tolist() == WEIGHTS["a.weight"].tolist()


BOTH = {
    "model.diffusion_model.out.weight": torch.zeros(2),
    "model_ema.diffusion_modeloutweight": torch.ones(2),
    "model_ema.decay": torch.tensor(0.9),
    "betas": torch.ones(3),
}


def test_sampling_takes_the_averages_and_training_does_not():
    key = "model.diffusion_model.out.weight"
    for weights, value in ((None, 1), ("ema", 1), ("trained", 0)):
        found = weights_to_sample_from(BOTH, "x", weights)
        assert sorted(found) == ["betas", key] and (found[key] == value).all()
    assert weights_to_train(BOTH, "x", None, averages=True).keys() == BOTH.keys()
    for weights, value in ((None, 0), ("trained", 0), ("ema", 1)):
        found = weights_to_train(BOTH, "x", weights, averages=False)
        assert sorted(found) == ["betas", key] and (found[key] == value).all()
    only = {key: BOTH[key]}
    assert weights_to_sample_from(only, "x", None) == only
    with pytest.raises(UserError, match="x: no averaged weights"):
        weights_to_train(only, "x", "ema", averages=True)


def test_what_a_checkpoint_holds_is_described():
    assert describe(BOTH) == "weights, 4 tensors (float32), averaged weights beside the trained ones"
    assert describe({"a": torch.ones(1, dtype=torch.float16)}) == "weights, 1 tensors (float16)"


def test_empty_init_skips_initialisation_only_inside():
    def constant():
        layer = nn.Linear(50, 50)
        with torch.no_grad():
            layer.weight.fill_(3.0)
        layer.reset_parameters()
        nn.init.kaiming_uniform_(layer.weight)
        nn.init.normal_(tensor=layer.weight)
        return bool((layer.weight == 3).all())

    with EmptyInit():
        assert constant()
    assert not constant()


def test_empty_init_also_skips_after_an_error_was_raised_inside():
    with pytest.raises(RuntimeError, match="inside"), EmptyInit():
        raise RuntimeError("inside")
    assert nn.init.ones_(torch.zeros(2)).sum() == 2


def model_config(**overrides):
    text = {"target": golden.CONFIG["cond_stage_config"]["target"], "params": {"text_config": golden.TEXT_CONFIG}}
    params = {**golden.CONFIG, "cond_stage_config": text, **overrides}
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


@pytest.mark.parametrize("without", [(), ("cond_stage_model.transformer.text_model.embeddings.position_ids",)])
def test_instantiate_filled_has_exactly_the_files_weights(golden_model, without):
    state = {key: value for key, value in golden_model.state_dict().items() if key not in without}
    model, report = instantiate_filled(model_config(), state, "x.ckpt")
    assert report.missing == list(without) and not report.unexpected
    assert same(model.state_dict(), golden_model.state_dict())
    assert torch.equal(model.lvlb_weights, golden_model.lvlb_weights)


def test_averages_that_a_file_lacks_start_from_its_weights(golden_model):
    model, report = instantiate_filled(model_config(use_ema=True), golden_model.state_dict(), "x.ckpt")
    assert report.missing and all(key.startswith("model_ema.") for key in report.missing)
    own = golden_model.model.state_dict()
    with model.ema_scope():
        assert same(model.model.state_dict(), own)


def test_instantiate_filled_refuses_before_it_fills(golden_model):
    state = golden_model.state_dict() | {"betas": torch.ones(10)}
    with pytest.raises(UserError, match=r"x\.ckpt: 'betas' has shape \[10\]"):
        instantiate_filled(model_config(), state, "x.ckpt")


# Writing


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] . unexpected pos 64\nmore"),
    KeyboardInterrupt(), KeyError("x"),
])  # fmt: skip
@pytest.mark.parametrize("after", [0, 4])
def test_a_writer_that_fails_keeps_the_old_file(error, after, tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")

    def write(temporary):
        if after:
            temporary.write_bytes(b"half")
        raise error

    told = isinstance(error, (OSError, RuntimeError))
    with pytest.raises(UserError if told else type(error)) as raised:
        write_atomically(path, write)
    if told:
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        assert raised.value.__cause__ is error
    assert contents(tmp_path) == {"last.ckpt": b"old"}


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")

    def write(temporary):
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path and path.read_bytes() == b"old"

    write_atomically(path, write)
    assert contents(tmp_path) == {"last.ckpt": b"new"}


def test_a_rename_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")

    def refuse(source, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"last\.ckpt: not written: .*Input/output error"):
        save_checkpoint(WEIGHTS, path)
    assert contents(tmp_path) == {"last.ckpt": b"old"}


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    usage = types.SimpleNamespace(total=10**9, used=10**9 - 39, free=39)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"last\.ckpt: not written: it needs 0\.00 GB and the disk has 0\.00 GB free"):
        save_checkpoint({"state_dict": WEIGHTS}, path)  # 24 + 8 + 8 bytes
    assert contents(tmp_path) == {"last.ckpt": b"old"}
    usage.free = 40
    save_checkpoint({"state_dict": WEIGHTS}, path)
    assert same(read_checkpoint(path)["state_dict"], WEIGHTS)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"x\.ckpt: not written"):
        save_checkpoint(WEIGHTS, tmp_path / "file" / "x.ckpt")


def save_for_ever(path):
    """Save, with the same number in every tensor of a file, until somebody kills this."""
    for number in itertools.count(1):
        save_checkpoint({"state_dict": {str(n): torch.full((100_000,), float(number)) for n in range(10)}}, path)


def test_a_kill_leaves_the_old_file_whole(tmp_path):
    """At twenty random moments of saving."""
    path, random = tmp_path / "last.ckpt", np.random.default_rng(0)
    save_checkpoint({"state_dict": {str(n): torch.zeros(100_000) for n in range(10)}}, path)
    seen = set()
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path,))
        process.start()
        time.sleep(0.02 + 0.1 * random.random())
        process.kill()
        process.join()
        values = {value.item() for tensor in read_checkpoint(path)["state_dict"].values() for value in tensor.unique()}
        assert len(values) == 1  # all of one save
        seen |= values
        assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["last.ckpt"]
    assert len(seen) > 1  # saving went on


def test_tensor_bytes():
    assert tensor_bytes({"a": [torch.ones(3), (torch.ones(2, dtype=torch.float16),)], "b": {"c": 1}, "d": "x"}) == 16
