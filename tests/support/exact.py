"""Whether two runs are the same run: their checkpoints bit for bit, and the numbers that they
logged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from tests.support.runs import Workspace, checkpoint, config, csv_rows, same

EMA = "model.params.use_ema=true"
SCHEDULE = "model.params.scheduler_config={target: ldm.optim.schedules.WarmupDecay, params: {steps: 200, shape: cosine}}"


def smallest(workspace: Workspace, steps: int) -> Path:
    """Return the config of `runs` with smaller pictures: what is tested are the steps. An epoch has
    six batches.
    """
    size = {"params": {"size": 8}}
    smaller = {
        "data": {"params": {"train": size, "reg": size}},
        "lightning": {
            "modelcheckpoint": {"params": {"every_n_train_steps": 4, "save_top_k": 1}},
            "trainer": {"max_steps": steps},
        },
    }
    path = workspace.path / "smallest.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(config(workspace.path)), smaller), path)
    return path


def tensors(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors in nested containers, by their path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    return {
        name: tensor
        for key, inner in items
        for name, tensor in tensors(inner, f"{path}/{key}").items()
    }


def logged(run: Path) -> dict[tuple[str, str], str]:
    """Return the numbers of each step; where two starts logged one, those of the later start."""
    numbers = {}
    for row in csv_rows(run):
        for key, value in row.items():
            if key != "step" and value:
                numbers[row["step"], key] = value
    return numbers


def assert_same_end(run: Path, straight: Path, steps: int, whole: bool = True) -> None:
    """Compare two runs' last checkpoints and logs; of the `whole` model, or of new words alone."""
    ours, theirs = checkpoint(run), checkpoint(straight)
    assert ours["global_step"] == theirs["global_step"] == steps
    expected = tensors(theirs)
    # Of the whole model, every tensor of the UNet has its average. LDM leaves the dots out.
    unet, average = "/state_dict/model.", "/state_dict/model_ema."
    of_unet = {name[len(unet) :].replace(".", "") for name in expected if name.startswith(unet)}
    averaged = {name[len(average) :] for name in expected if name.startswith(average)}
    assert averaged - {"decay", "num_updates"} == (of_unet if whole else set())
    assert sum("/optimizer_states/" in name for name in expected) > 2 * len(averaged)
    found = tensors(ours)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    assert same(ours["optimizer_states"], theirs["optimizer_states"])
    assert logged(run) == logged(straight)
