"""Where `scripts/convert.py` writes to, by the name that it is given."""

import pytest

from scripts import convert


@pytest.mark.parametrize("name, message", [
    # a folder, with a dot in its name: what is wrong is the rest
    ("my.folder/", "no such checkpoint"),
    ("my.folder", "end its name with a slash"),
    ("model.safetensor", "expected a .safetensors or .ckpt file"),
])  # fmt: skip
def test_a_slash_makes_a_name_with_a_dot_a_folder(tmp_path, caplog, name, message):
    assert (
        convert.main(["--ckpt", str(tmp_path / "none.ckpt"), "--output", f"{tmp_path}/{name}"]) == 1
    )
    assert message in caplog.text
