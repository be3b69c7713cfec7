"""What a run has when its config does not say otherwise, as data."""

from __future__ import annotations

from typing import Any

# The arguments of Lightning's Trainer, as the keys of lightning.trainer. Written down, because
# importing Lightning takes seconds that `--help` and a mistyped flag need not wait for; a test
# compares.
TRAINER_KEYS: tuple[str, ...] = (
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "logger",
    "callbacks",
    "fast_dev_run",
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "max_time",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "log_every_n_steps",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "deterministic",
    "benchmark",
    "inference_mode",
    "use_distributed_sampler",
    "profiler",
    "detect_anomaly",
    "barebones",
    "plugins",
    "sync_batchnorm",
    "reload_dataloaders_every_n_epochs",
    "default_root_dir",
    "enable_autolog_hparams",
    "model_registry",
)

# Of the flag --weights, for the same reason: the room of checkpoints imports torch.
WEIGHTS = ("trained", "ema")

# Of the names of model.params.preservation, those that take no class images. The same reason.
WITHOUT_CLASS_IMAGES = ("dop", "blank", "none")

TRAINER: dict[str, Any] = {
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_model_summary": False,  # the start summary says more
    # The datamodule shares the samples out itself, as a function of their position in the run.
    "use_distributed_sampler": False,
}

# Lightning refuses a barebones Trainer together with any argument about logging or validation.
BAREBONES_TRAINER: dict[str, Any] = {"use_distributed_sampler": False}

# Merged under lightning.callbacks; a config changes the params of one by its name. In this order,
# and before what writes checkpoints: a loss that is not finite stops the run before anything else
# is done with it.
CALLBACKS: dict[str, Any] = {
    "non_finite": {"target": "ldm.callbacks.non_finite.StopOnNonFinite"},
    "first_step": {"target": "ldm.callbacks.first_step.FirstStepCheck"},
    "learning_rate_logger": {
        "target": "pytorch_lightning.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "progress": {"target": "ldm.callbacks.progress.StepProgress"},
    "host_memory": {"target": "ldm.callbacks.host_memory.KeepHostMemory"},
    "timing": {"target": "ldm.callbacks.timing.TimingCallback"},
    "run_page": {"target": "ldm.callbacks.run_page.RunPage"},
}

MODELCHECKPOINT: dict[str, Any] = {
    "target": "ldm.callbacks.checkpoints.CheckpointKeeper",
    "params": {"filename": "{epoch:06}-{step:09}", "save_top_k": -1, "save_last": True},
}
