"""What an installed package needs: its requirements, and the files that a checkout has beside
it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
KEYS = "model.diffusion_model.input_blocks"


def test_the_requirements_leave_out_what_was_malicious():
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = {requirement.name: requirement for requirement in map(Requirement, listed)}
    assert "lightning" not in found
    specifier = found["pytorch-lightning"].specifier
    assert not {"2.5.9", "2.6.2", "2.6.3"} & set(
        specifier.filter(["2.5.9", "2.6.0", "2.6.2", "2.6.3", "2.6.4"])
    )
    assert {"2.6.0", "2.6.4"} <= set(specifier.filter(["2.6.0", "2.6.4"]))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Python with the wheel installed: an environment of its own, which sees this one's
    dependencies alone.
    """
    folder = tmp_path_factory.mktemp("wheel")
    build = (
        "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    )
    source = folder / "source"  # a build writes beside its source
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True
    )
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but its own .pth files, as of an editable install,
    # are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    return folder / "venv/bin/python"


def run(python, *arguments, cwd):
    """What a command of that Python prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(python), *map(str, arguments)]
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


FACTS = """
from ldm.checkpoints.families import config_for
from ldm.checkpoints.reading import read_checkpoint
from ldm.config import load_config, to_plain
from ldm.util import get_obj_from_str
path = config_for(read_checkpoint("foreign.safetensors"), "foreign.safetensors")
print(path, to_plain(load_config([path]))["model"]["target"], get_obj_from_str("main.DataModuleFromConfig").__module__)
"""


def test_a_wheel_knows_the_families_and_what_yamls_name_in_main(installed, tmp_path):
    state = {f"{KEYS}.0.0.weight": torch.zeros(320, 4, 3, 3)}
    state[f"{KEYS}.1.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(320, 768)
    save_file(state, tmp_path / "foreign.safetensors")
    path, target, module = run(installed, "-c", FACTS, cwd=tmp_path).split()
    assert Path(path).name == "v1-inference.yaml" and not Path(path).is_relative_to(ROOT)
    assert (target, module) == ("ldm.models.diffusion.ddpm.LatentDiffusion", "ldm.data.datamodule")


def test_a_wheel_samples_the_miniature_outside_of_the_checkout(installed, tmp_path):
    (weights,) = installed.parents[1].glob(
        "lib/python*/site-packages/ldm/project/models/tiny/sd-tiny.safetensors"
    )
    flags = [
        "--ckpt",
        weights,
        "--prompt",
        "photo of a dog",
        "--ddim_steps",
        2,
        "--n_samples",
        1,
        "--n_iter",
        1,
    ]
    run(
        installed,
        "-c",
        "from ldm.commands import txt2img; txt2img()",
        *flags,
        "--H",
        64,
        "--W",
        64,
        cwd=tmp_path,
    )
    (picture,) = tmp_path.rglob("samples/*.png")
    assert Image.open(picture).size == (64, 64)
