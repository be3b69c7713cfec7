"""Files of weights as `torch.save` writes them, and pickles that do more than that."""

import io
import pickle
import types

import pytest
import torch

WEIGHTS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.ones(2),
    "steps": torch.tensor(7),
}


def save_zip(content, path):
    torch.save(content, path)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


pickled = pytest.mark.parametrize("save", [save_zip, save_legacy])


def same(first, second):
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key])
        for key in second
    )


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


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
