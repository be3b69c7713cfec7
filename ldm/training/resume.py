"""What may change when a run goes on: what its checkpoint decides is refused, the rest is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.checkpoints.reading import read_checkpoint
from ldm.config import RunConfig
from ldm.errors import UserError
from ldm.optim.registry import shares_state
from ldm.training.run import Run
from ldm.training.saved import first_config, saved_config
from ldm.util import accepted_parameters, get_obj_from_str

INSTEAD = "leave it as it was, or start a new run from the weights with --actual_resume"

SCHEDULE = "the noise schedule is part of the checkpoint"
TENSORS = "the checkpoint's optimizer is of other tensors"
# The model's params that cannot change when a run goes on, and why.
FIXED: dict[str, str] = {
    "timesteps": SCHEDULE,
    "beta_schedule": SCHEDULE,
    "linear_start": SCHEDULE,
    "linear_end": SCHEDULE,
    "cosine_s": SCHEDULE,
    "zero_terminal_snr": SCHEDULE,
    "use_ema": "EMA weights are averaged from the first step on",
    "cond_stage_trainable": TENSORS,
    "freeze": TENSORS,
    "lora": "the adapters are part of the checkpoint",
    "personalization_config": "the new words are part of the checkpoint",
}

# Keys that say where a run was started and from what: they change without anybody's wish.
NOT_SHOWN = ("run.base_model", "run.working_folder", "run.chosen")


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on, and what of its config is not as it was.

    Args:
        step: optimizer steps that are done.
        changed: what this command changes, as `key old -> new`.
        still_changed: what an earlier command has changed, which holds on.
    """

    step: int
    changed: list[str]
    still_changed: list[str]


def check_resume(config: RunConfig, run: Run) -> Resumed:
    """Compare what a run is to do with what it has done, before anything is built or written.

    Raises:
        UserError: names a change that would have no effect, or would not fit the checkpoint.
    """
    assert run.resume_from is not None
    checkpoint = read_checkpoint(run.resume_from)  # mapped: its tensors are not read
    if "optimizer_states" not in checkpoint:
        problem = "has weights alone, and no run goes on from these: use --actual_resume"
        raise UserError(f"{run.resume_from}: {problem}")
    step, epoch = int(checkpoint.get("global_step") or 0), int(checkpoint.get("epoch") or 0)
    _check_lengths(config, step, epoch)
    saved = saved_config(run)
    _check_fixed(RunConfig(checkpoint.get("config") or saved.content), config)
    changed = _differences(saved, config)
    earlier = _differences(first_config(run), saved)
    still_changed = [text for path, text in earlier.items() if path not in changed]
    return Resumed(step, list(changed.values()), still_changed)


def _check_lengths(config: RunConfig, step: int, epoch: int) -> None:
    """Raise a `UserError` if a run has done more already than it is to do."""
    for key, done, name in (("max_steps", step, "steps"), ("max_epochs", epoch, "epochs")):
        limit = config.get(f"lightning.trainer.{key}", -1)
        if 0 < limit < done:
            raise UserError(
                f"lightning.trainer.{key}: {limit}, but the run has done {done} {name}: give more"
            )


def _check_fixed(before: RunConfig, now: RunConfig) -> None:
    """Raise a `UserError` for the first change that a checkpoint does not allow."""
    old, new = before.get("model.target"), now.get("model.target")
    model = get_obj_from_str(new, "model.target")
    if old is not None and get_obj_from_str(old, "model.target") is not model:
        raise UserError(f"model.target: {old} in the run, now {new}: {INSTEAD}")
    for key, parameter in accepted_parameters(model).items():
        path = f"model.params.{key}"
        was, given = before.get(path, parameter.default), now.get(path, parameter.default)
        reason = _refusal(key, was, given)
        if reason:
            raise UserError(f"{path}: {was} in the run, now {given}: {reason}: {INSTEAD}")


def _refusal(key: str, was: object, now: object) -> str:
    """Return why a param cannot change to another value; an empty text if it can, or has not."""
    if (was or None) == (now or None):
        return ""
    if key == "optimizer" and not shares_state(str(was), str(now)):
        return "it cannot go on from the other's state"
    if key == "text_encoder_lr" and None in (was, now):
        return (
            "a text encoder with its own rate is a group of its own in the checkpoint's optimizer"
        )
    return FIXED.get(key, "")


def _differences(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """Return what differs between two configs: its path, and a text that shows both values."""
    old, new = dict(_leaves(before.content)), dict(_leaves(now.content))
    found = {}
    for path, value in new.items():
        if (path not in old or old[path] != value) and path not in NOT_SHOWN:
            was = _shown(old[path]) if path in old else "as by default"
            found[path] = f"{path} {was} -> {_shown(value)}"
    for path, was in old.items():
        # What is inside a section that is now null is said by the section.
        inside = any(path.startswith(f"{changed}.") for changed in found)
        if path not in new and not inside and path not in NOT_SHOWN:
            found[path] = f"{path} {_shown(was)} -> as by default"
    return found


def _leaves(content: Mapping[str, object], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of everything in nested mappings that is no mapping itself."""
    for key, value in content.items():
        below = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, below)
        else:
            yield below, value


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
