"""Files are written whole or not at all, and what was there is never lost."""

import errno
import itertools
import multiprocessing
import os
import shutil
import threading
import time
import types

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from ldm.checkpoints.reading import read_checkpoint
from ldm.errors import UserError
from ldm.files import LOCK, alone_in, save_checkpoint, tensor_bytes, write_atomically
from tests.support.pickles import WEIGHTS, same


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] . unexpected pos 64\nmore"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
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

    told = isinstance(error, (OSError, RuntimeError, SafetensorError))
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
    with pytest.raises(
        UserError,
        match=r"last\.ckpt: not written: it needs 40 bytes and the disk has 39 bytes free",
    ):
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
        save_checkpoint(
            {"state_dict": {str(n): torch.full((100_000,), float(number)) for n in range(10)}}, path
        )


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
        values = {
            value.item()
            for tensor in read_checkpoint(path)["state_dict"].values()
            for value in tensor.unique()
        }
        assert len(values) == 1  # all of one save
        seen |= values
        assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["last.ckpt"]
    assert len(seen) > 1  # saving went on


def test_tensor_bytes():
    assert (
        tensor_bytes(
            {"a": [torch.ones(3), (torch.ones(2, dtype=torch.float16),)], "b": {"c": 1}, "d": "x"}
        )
        == 16
    )


def test_one_at_a_time_works_on_a_folder(tmp_path, caplog):
    """The others wait, also where the one before has removed the lock that they wait for."""
    caplog.set_level("INFO")
    folder, inside, most = tmp_path / "folder", [], []
    folder.mkdir()

    def work(number):
        with alone_in(folder):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1] * 8 and "waiting for it" in caplog.text
    assert list(folder.iterdir()) == []

    # What a kill has left is no lock. A new folder goes again where nothing came into it.
    (folder / LOCK).touch()
    with alone_in(folder), alone_in(tmp_path / "new/empty"), alone_in(tmp_path / "other/new"):
        (tmp_path / "other/new/picture").touch()
    assert contents(folder) == {} and not (tmp_path / "new").exists()
    assert contents(tmp_path / "other/new") == {"picture": b""}
