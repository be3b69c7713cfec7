"""No code of a file runs, and no file can ask for endless memory."""

import builtins
import codecs
import contextlib
import io
import os
import pathlib
import pickle
import shutil
import tarfile
import zipfile

import pytest
import torch
from torch import nn

from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.errors import UserError
from ldm.files import save_checkpoint
from tests.support.pickles import WEIGHTS, Call, HandMade, legacy_file, same, save_zip, short

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
        Call(Call(getattr, Call(getattr, builtins, "__dict__"), "get"), "exec"),
        CANARY.format(canary),
    ),
    "import": lambda canary: Call(
        Call(getattr, Call(__import__, "os"), "system"), f"touch {canary}"
    ),
    "torch.save": lambda canary: Call(torch.save, 1, canary),
    "copyfile": lambda canary: Call(shutil.copyfile, __file__, canary),
    "from_file": lambda canary: Call(torch.from_file, canary, True, 16),
    "storage from_file": lambda canary: Call(torch.UntypedStorage.from_file, canary, True, 16),
    "save_checkpoint": lambda canary: Call(save_checkpoint, {}, canary),
    "pickle.loads": lambda canary: Call(
        pickle.loads, pickle.dumps(Call(os.system, f"touch {canary}"))
    ),
}


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
            assert str(path) in str(
                error
            )  # a call of something that is a stub fails the whole file
        assert os.listdir(tmp_path) == ["evil.ckpt"], where


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_works_on_a_reader_that_runs_pickles(name, tmp_path):
    canary, file = tmp_path / "canary", io.BytesIO()
    HandMade.dump({"x": ATTACKS[name](str(canary))}, file)
    pickle.loads(file.getvalue())
    assert canary.exists()


def test_a_record_of_a_class_with_its_source_writes_no_patch(tmp_path, monkeypatch):
    """torch compares such a source with its own and writes the difference to `{name}.patch`."""
    monkeypatch.chdir(tmp_path)
    name = torch._utils._rebuild_tensor_v2.__name__
    attributes = (
        b"}("
        + short("dump_patches")
        + b"\x88"
        + short("__name__")
        + short(str(tmp_path / "canary"))
        + b"u"
    )
    function = b"ctorch._utils\n_rebuild_tensor_v2\n(N" + attributes + b"tb"
    for record in ("module", "storage"):
        saved_id = b"(" + short(record) + function + short("file.py") + short("source") + b"tQ"
        (tmp_path / "evil.ckpt").write_bytes(legacy_file(saved_id))
        with pytest.raises(UserError, match=r"evil\.ckpt"):
            read_checkpoint(tmp_path / "evil.ckpt")
        assert os.listdir(tmp_path) == ["evil.ckpt"]
    assert torch._utils._rebuild_tensor_v2.__name__ == name


@pytest.mark.parametrize("named", [
    "torch._utils "
    "_rebuild_tensor_v2", "torch UntypedStorage", "torch FloatStorage", "collections OrderedDict",
    "torch.nn Linear", "ldm.checkpoints.unpickle "
                       "Stub", "torch Size", "torch float32", "builtins dict",
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
    torch.save(
        content,
        tmp_path / "bomb.ckpt",
        pickle_module=HandMade,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(
        UserError, match=r"bomb\.ckpt: truncated or not a checkpoint: (bytes|text|encoding)"
    ):
        read_checkpoint(tmp_path / "bomb.ckpt")


def test_compressed_records_are_not_inflated(tmp_path):
    """As a zip bomb has them: a thousand times larger than the file."""
    save_zip({"x": torch.zeros(1 << 22)}, tmp_path / "x.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "x.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w") as bomb,
    ):
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
