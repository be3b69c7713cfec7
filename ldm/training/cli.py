"""The training command line: flags as the reference has them, with errors for what it would swallow."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from ldm.config import load_config, to_plain
from ldm.errors import UserError, nearest
from ldm.training.defaults import EXPORTS, SEED, TRAINER_KEYS, WEIGHTS
from ldm.training.run import Run, new_run, resumed_run

if TYPE_CHECKING:
    from ldm.training.train import Start

DESCRIPTION = """\
Train a model from YAML: DreamBooth on Stable Diffusion, or whatever the config names.

  python main.py --base configs/stable-diffusion/v1-finetune_unfrozen.yaml -t --actual_resume sd-v1-4.ckpt \\
      -n my-dog --gpus 0, --data_root photos/ --reg_data_root class_images/ --class_word dog
"""
EPILOG = """\
Any key of the YAML can be set behind the flags: model.params.reg_weight=0.5 data.params.batch_size=2.
Every argument of Lightning's Trainer is a key of lightning.trainer and also a flag: --max_steps 800.
"""


OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)+=")  # key.path=value


def str2bool(text: str) -> bool:
    """yes/true/1 and no/false/0 in any case."""
    value = {"yes": True, "true": True, "t": True, "y": True, "1": True}.get(text.lower())
    if value is None and text.lower() not in ("no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")
    return bool(value)


def trainer_value(text: str) -> Any:
    """The value of one of Lightning's flags, as YAML would have it."""
    if ":" in text:  # a duration such as 00:12:00:00, which YAML takes for a number to the base of 60
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a YAML value") from error
    return _number(value) if isinstance(value, str) else value


def _number(text: str) -> int | float | str:
    """1e4 and the like are text to YAML."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that every error of the command ends in the same way."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser without Lightning's own flags, which `parse_args` adds unseen."""
    parser = Parser(
        prog="main.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    boolean: dict[str, Any] = {"type": str2bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    what = parser.add_argument_group("what to run")
    what.add_argument("-b", "--base", nargs="*", default=[], metavar="YAML", help="configs, merged left to right")
    what.add_argument("-t", "--train", default=False, help="train", **boolean)
    what.add_argument("--no-test", default=False, help="skip the test set, where the config has one", **boolean)
    what.add_argument("-r", "--resume", metavar="RUN", help="go on with a run: its folder, or a .ckpt in it")
    what.add_argument("--actual_resume", metavar="CKPT", help="initial weights (.ckpt or .safetensors)")
    what.add_argument("--weights", choices=WEIGHTS, help="which of that file's, if it has both (default: trained)")
    data = parser.add_argument_group("images")
    data.add_argument("--data_root", metavar="DIR", help="photos of the subject")
    data.add_argument("--reg_data_root", metavar="DIR", help="images of the class, for prior preservation")
    data.add_argument("--class_word", metavar="WORD", help="the class noun, such as dog")
    data.add_argument("--init_word", metavar="WORD", help="give the identifier this word's embedding at the start")
    data.add_argument("--embedding_manager_ckpt", metavar="FILE", help="textual-inversion embeddings to start from")
    run = parser.add_argument_group("the run and its folder")
    run.add_argument("-n", "--name", default="", help="name of the run (default: the config's)")
    run.add_argument("-f", "--postfix", default="", help="appended to the name")
    run.add_argument("-l", "--logdir", default="logs", help="where run folders are made (default: logs)")
    run.add_argument("--datadir_in_name", default=True, help="begin the name with the data folder's", **boolean)
    run.add_argument("-p", "--project", help="the run folder's parent, instead of --logdir")
    run.add_argument("-s", "--seed", type=int, help="seed of everything random (default: 23)")
    run.add_argument("--export", choices=EXPORTS, help="also write the weights alone at the end, in this precision")
    run.add_argument("-d", "--debug", default=False, help="show the traceback of an error", **boolean)
    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--gpus", metavar="LIST", help="'0,' the first GPU, '0,1' two; without it the CPU or the YAML's"
    )
    machine.add_argument(
        "--scale_lr", default=None, help="learning rate x accumulated batches x devices x batch size", **boolean
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line; `trainer` holds what was given of Lightning's flags.

    Raises:
        UserError: an unknown flag (with the nearest valid one), a value that does not parse, or a stray word.
    """
    parser = build_parser()
    visible = {flag for action in parser._actions for flag in action.option_strings}
    for key in TRAINER_KEYS:
        parser.add_argument(f"--{key}", dest=f"trainer.{key}", type=trainer_value, help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    # Taken out first: behind a flag with an optional value, argparse would take an override for that value.
    overrides = [word for word in words if OVERRIDE.match(word)]
    args, rest = parser.parse_known_args([word for word in words if word not in overrides])
    args.overrides = overrides
    for word in rest:
        if not word.startswith("-"):
            raise UserError(f"'{word}' is neither a flag nor key.path=value; see --help")
        flag = word.partition("=")[0]
        raise UserError(
            f"unknown flag {flag}{nearest(flag, visible | {f'--{key}' for key in TRAINER_KEYS})}; see --help"
        )
    given = {key: value for key, value in vars(args).items() if key.startswith("trainer.")}
    for key in given:
        delattr(args, key)
    args.trainer = {key.removeprefix("trainer."): value for key, value in given.items() if value is not None}
    return args


def prepare(args: argparse.Namespace) -> tuple[dict[str, Any], Run]:
    """The config that the flags, the YAML files and a resumed run make together, and the run.

    Raises:
        UserError: nothing to do, no config, or a part of it that cannot be read.
    """
    if not args.train and not args.resume:
        raise UserError("nothing to do: give -t to train, or -r RUN to go on with a run")
    for flag in ("actual_resume", "weights", "init_word", "embedding_manager_ckpt", "name", "postfix", "project"):
        if args.resume and getattr(args, flag):
            raise UserError(f"--{flag}: not together with --resume, which takes it from the run")
    run = resumed_run(args.resume) if args.resume else new_run(args)
    paths = [*(run.saved_configs() if args.resume else []), *args.base]
    if not paths:
        raise UserError("no config: give one with --base, such as configs/stable-diffusion/v1-finetune_unfrozen.yaml")
    config = to_plain(load_config(paths, args.overrides))
    apply_flags(config, args)
    return config, run


def apply_flags(config: dict[str, Any], args: argparse.Namespace) -> None:
    """Write what the flags say to where the YAML says it."""
    settings = config.setdefault("run", {})
    settings["seed"] = args.seed if args.seed is not None else settings.get("seed", SEED)
    if args.scale_lr is not None:
        settings["scale_lr"] = args.scale_lr
    if args.export is not None:
        settings["export"] = args.export
    if settings.get("export") not in (None, *EXPORTS):
        raise UserError(f"run.export: unknown '{settings['export']}'; accepted: {', '.join(EXPORTS)}")
    lightning = _section(config, "lightning")
    trainer = _section(lightning, "trainer")
    trainer.update(args.trainer)
    if args.gpus is not None:
        from ldm.host import parse_gpus

        trainer.update(parse_gpus(args.gpus))
    elif "accelerator" not in trainer and "devices" not in trainer:
        trainer.update({"accelerator": "cpu", "devices": 1})
    if "precision" not in trainer and not trainer.get("barebones"):
        from ldm.host import default_precision

        trainer["precision"] = default_precision(trainer.get("accelerator", "auto"))
    data = _section(_section(config, "data"), "params")
    _apply_data_flags(data, args)
    reg_weight = ((config.get("model") or {}).get("params") or {}).get("reg_weight", 1.0)
    if data.get("reg") and not reg_weight and not _section(data["reg"], "params").get("data_root"):
        del data["reg"]  # a prior that weighs nothing needs no images
        data.pop("num_class_images", None)


def _apply_data_flags(data: dict[str, Any], args: argparse.Namespace) -> None:
    roots = {"train": args.data_root, "reg": args.reg_data_root, "validation": args.data_root}
    for name, root in roots.items():
        if not data.get(name):
            if name == "reg" and root:
                raise UserError("--reg_data_root: the config has no data.params.reg section")
            continue
        params = _section(data[name], "params")
        if root:
            params["data_root"] = root
        if args.class_word:
            params["placeholder_token"] = args.class_word


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping under a key, made if it is not there."""
    if not isinstance(config, dict) or not isinstance(config.get(key) or {}, dict):
        raise UserError(f"{key}: expected a mapping")
    config[key] = config.get(key) or {}
    return config[key]


def start_of(args: argparse.Namespace) -> Start:
    """The initial weights and embeddings that the flags name."""
    from ldm.training.train import Start

    files = {"--actual_resume": args.actual_resume, "--embedding_manager_ckpt": args.embedding_manager_ckpt}
    for flag, file in files.items():
        if file and not Path(file).is_file():
            raise UserError(f"{flag} {file}: no such file")
    weights, embeddings = (Path(file) if file else None for file in files.values())
    if args.weights and not weights:
        raise UserError("--weights: says which of the weights of --actual_resume, which is not given")
    return Start(weights, args.weights, embeddings, args.init_word)
