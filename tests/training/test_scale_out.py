"""Several processes: one run folder, one writer, and under FSDP the checkpoints of a run that is
not sharded.

The processes are forks that have what torchrun or SLURM's srun would tell them.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import main
from ldm import distributed as cluster
from ldm.checkpoints.reading import read_checkpoint
from ldm.config import RunConfig
from ldm.errors import UserError
from ldm.sampling.text_to_image import load_model
from ldm.training import run, sharding
from ldm.training.build_trainer import build_trainer
from ldm.util import instantiate_from_config
from tests.support import golden
from tests.support.runs import Workspace, checkpoint, config, csv_rows
from tests.support.together import of_slurm, of_torchrun, together

CPU = ["--accelerator", "cpu", "--devices", "2"]
CLIPPED = ["--gradient_clip_val", "0.01", "model.base_learning_rate=1e-4"]
WATCHED = [
    "lightning.callbacks.image_logger.target=ldm.callbacks.image_logger.ImageLogger",
    "lightning.callbacks.image_logger.params={batch_frequency: 2, increase_log_steps: false, "
    "log_images_kwargs: {ddim_steps: 1}, panel: {prompts: [a dog], images: 1, steps: 1}}",
    "lightning.callbacks.fixed.target=ldm.callbacks.fixed_loss.FixedLoss",
    "lightning.callbacks.fixed.params={every_n_steps: 2, examples: 1, time_steps: 2}",
]


class CountReductions(pl.Callback):
    """Writes how often the gradients were averaged over the processes."""

    count = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(None, self._reduce)

    def _reduce(self, state, bucket):
        self.count += bucket.is_last()
        return allreduce_hook(None, bucket)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Path(f"reductions{trainer.global_rank}").write_text(str(self.count))


class CountWeights(pl.Callback):
    """Writes how many numbers of the UNet's weights this process has, and by how many units they
    are gathered.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        numbers = sum(parameter.numel() for parameter in pl_module.model.parameters())
        gathered = sum(isinstance(module, FSDP) for module in pl_module.model.modules())
        Path(f"weights{trainer.global_rank}").write_text(json.dumps([numbers, gathered]))


def _record_writes(logs: Path, record: Path) -> None:
    """From here on, list what this process opens to write, makes, renames and links in the logs."""

    def hook(event: str, arguments: tuple) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.link", "os.remove")
        writes |= event == "open" and bool(
            (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if writes and str(logs) in os.path.abspath(str(arguments[0])):
            with open(record, "a") as file:
                file.write(f"{event} {arguments[0]}\n")

    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """One in which two processes have trained: with DDP, accumulating, and with FSDP in two
    goes.
    """
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    base = config(workspace.path)
    counted, weighed = (
        [f"lightning.callbacks.count.target=tests.training.test_scale_out.{name}"]
        for name in ("CountReductions", "CountWeights")
    )

    def job(rank: int) -> None:
        _record_writes(workspace.logs, workspace.path / f"writes{rank}")
        ddp, fsdp = ([*CPU, *CLIPPED, "--strategy", name] for name in ("ddp", "fsdp"))
        for arguments in (
            workspace.arguments("ddp", *ddp, "--max_steps=3", base=base),
            workspace.arguments(
                "few", *ddp, "--max_steps=1", "--accumulate_grad_batches=2", *counted, base=base
            ),
            workspace.arguments(
                "fsdp", *fsdp, "--max_steps=2", *WATCHED, *weighed, "--export", "fp32", base=base
            ),
        ):
            assert main.main(arguments) == 0
        assert main.main(["-r", str(workspace.run("fsdp")), "--max_steps", "3"]) == 0
        logging.getLogger("ldm").info("for all to hear")

    together(workspace.path, job, of_torchrun)
    return workspace


def test_processes_of_torchrun_share_a_run_folder_and_one_writes(workspace):
    assert len(list(workspace.logs.iterdir())) == 3, "one folder for each run, not for each process"
    assert (workspace.path / "writes0").exists()
    assert not (workspace.path / "writes1").exists(), (workspace.path / "writes1").read_text()


def test_one_process_tells(workspace):
    first, second = ((workspace.path / f"log{rank}").read_text() for rank in (0, 1))
    assert first.count("Done\n") == 4
    assert "for all to hear" in first
    assert not {"Training\n", "Done\n", "for all to hear\n"} & set(second.splitlines(keepends=True))


def test_accumulated_gradients_are_averaged_once_a_step(workspace):
    assert [(workspace.path / f"reductions{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_sharded_training_writes_the_checkpoints_of_ddp_and_resumes_from_them(workspace):
    ours, theirs = (checkpoint(workspace.run(name)) for name in ("fsdp", "ddp"))
    assert ours["global_step"] == theirs["global_step"] == 3
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    for key, value in theirs["state_dict"].items():
        assert ours["state_dict"][key].dtype == value.dtype
        torch.testing.assert_close(ours["state_dict"][key], value, rtol=1e-4, atol=1e-6)
    ours, theirs = (content["optimizer_states"][0] for content in (ours, theirs))
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        scale = max(state[kind].abs().max() for state in theirs["state"].values())
        for number, state in theirs["state"].items():
            assert (ours["state"][number][kind] - state[kind]).abs().max() <= 1e-4 * scale, (
                kind,
                number,
            )


def test_every_process_has_a_part_of_the_weights(workspace):
    (first, units), (second, _) = (
        json.loads((workspace.path / f"weights{rank}").read_text()) for rank in (0, 1)
    )
    unet = {
        k: v
        for k, v in checkpoint(workspace.run("fsdp"))["state_dict"].items()
        if k.startswith("model.")
    }
    total = sum(value.numel() for value in unet.values())
    assert first + second == total and 0.4 * total < first < 0.6 * total
    blocks = {tuple(key.split(".")[2:4]) for key in unet if "put_blocks" in key}
    assert units == len(blocks) + 2, (
        "a unit for each block, for the middle one, and for what is around them"
    )


def test_sharded_weights_are_read_and_exported_as_any_others(workspace):
    run = workspace.run("fsdp")
    state = checkpoint(run)["state_dict"]
    model = load_model(run / "checkpoints" / "last.ckpt")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    (exported,) = (run / "checkpoints").glob("*-fp32.safetensors")
    weights = read_checkpoint(exported)
    assert all(
        torch.equal(weights[key], value)
        for key, value in state.items()
        if key.startswith("model.diffusion")
    )


def test_pictures_and_fixed_losses_come_of_sharded_weights(workspace):
    run = workspace.run("fsdp")
    names = {path.name.partition("_gs-")[0] for path in run.glob("images/*/*_gs-000002*.png")}
    assert names == {"inputs", "reconstruction", "samples", "panel"}
    assert list(run.glob("images/panel/panel_gs-000000.png"))
    fixed = [
        float(row["val/loss_subject_fixed"])
        for row in csv_rows(run)
        if row.get("val/loss_subject_fixed")
    ]
    assert len(fixed) >= 2 and all(0 < value < 10 for value in fixed)


def test_slurm_processes_agree_and_lightning_knows_them(tmp_path):
    def job(rank: int) -> None:
        stamp = run.time_stamp(lambda stamp: True)
        second = cluster.agreed(lambda: f"of rank {rank}")
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "num_nodes": 2,
            "strategy": "ddp",
            "logger": False,
        }
        plain = {"lightning": {"trainer": settings}, "model": {"params": {}}}
        trainer = build_trainer(RunConfig(plain), run.Run(tmp_path / "run", stamp))
        environment = type(trainer._accelerator_connector.cluster_environment).__name__
        facts = [
            stamp,
            second,
            environment,
            trainer.world_size,
            trainer.global_rank,
            cluster.is_first(),
        ]
        (tmp_path / f"facts{rank}").write_text(json.dumps(facts))
        while not (tmp_path / "facts1").exists():  # the first process holds what both agree by
            time.sleep(0.05)

    together(tmp_path, job, of_slurm)
    first, second = (json.loads((tmp_path / f"facts{rank}").read_text()) for rank in (0, 1))
    assert first[:4] == second[:4]
    assert first[1:] == ["of rank 0", "SLURMEnvironment", 2, 0, True]
    assert second[4:] == [1, False]


def test_a_process_alone_asks_nobody(monkeypatch):
    for name in (*cluster.RANKS, "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert cluster.is_first()
    assert cluster.agreed(lambda: "own") == "own"


@pytest.mark.parametrize(
    "name", ["deepspeed", "deepspeed_stage_2", "deepspeed_stage_3_offload", "fsdp_cpu_offload"]
)
def test_strategies_with_other_checkpoints_are_refused(name):
    with pytest.raises(UserError, match=rf"strategy: {name}: .*use fsdp"):
        sharding.make_strategy(name)


def test_several_devices_train_with_ddp_by_default(tmp_path):
    plain = {
        "lightning": {"trainer": {"accelerator": "cpu", "devices": 2, "logger": False}},
        "model": {},
    }
    assert (
        type(build_trainer(RunConfig(plain), run.Run(tmp_path / "run", "stamp")).strategy)
        is pl.strategies.DDPStrategy
    )


def test_strategies_have_options():
    target = {
        "target": "ldm.training.sharding.FullySharded",
        "params": {"sharding_strategy": "SHARD_GRAD_OP"},
    }
    assert sharding.make_strategy(target).sharding_strategy.name == "SHARD_GRAD_OP"
    with pytest.raises(UserError, match="unknown sharding_strategy 'HALF'; accepted: FULL_SHARD"):
        sharding.make_strategy({**target, "params": {"sharding_strategy": "HALF"}})
    assert sharding.make_strategy("ddp") == "ddp"


WORDS = {
    "target": "ldm.modules.embedding_manager.EmbeddingManager",
    "params": {"placeholder_strings": ["*"], "initializer_words": ["dog"]},
}


@pytest.mark.parametrize(
    "params",
    [
        {"use_ema": True},
        {"lora": {"rank": 2}},
        {"text_encoder_stop": 1},
        {"optimizer": "muon"},
        {"preservation": "dop"},
        {"personalization_config": WORDS},
    ],
)
def test_what_needs_whole_weights_is_not_sharded(params):
    text = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"text_config": golden.TEXT_CONFIG},
    }
    given = {**golden.CONFIG, "cond_stage_config": text}
    build = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": given}
    sharding.check_shardable(instantiate_from_config(build))
    model = instantiate_from_config({**build, "params": {**given, **params}})
    with pytest.raises(UserError, match=rf"fsdp: not with model\.params\.{next(iter(params))}"):
        sharding.check_shardable(model)
