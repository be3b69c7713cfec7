"""The training command line: the reference's flags, with errors for what it would swallow."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from ldm.config import EXPORTS, RunConfig, load_config, to_plain
from ldm.errors import UserError, nearest
from ldm.training.defaults import TRAINER_KEYS, WEIGHTS
from ldm.training.image_flags import images_of, needs_no_class_images, new_words_of
from ldm.training.run import Run, new_run, resumed_run
from ldm.training.saved import saved_config
from ldm.training.trainer_values import check_trainer_values

if TYPE_CHECKING:
    from ldm.training.initial_weights import Start

DESCRIPTION = """\
Train a model from YAML: DreamBooth on Stable Diffusion, or whatever the config names.

  python main.py --base configs/stable-diffusion/v1-finetune_unfrozen.yaml -t \\
      --actual_resume sd-v1-4.ckpt -n my-dog --gpus 0, \\
      --data_root photos/ --reg_data_root class_images/ --class_word dog
"""
EPILOG = """\
Any key of the YAML can be set behind the flags: model.params.reg_weight=0.5.
Every argument of Lightning's Trainer is a key of lightning.trainer, and a flag: --max_steps 800.
"""


log = logging.getLogger(__name__)

OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)+=")  # key.path=value

# Flags that name a run or what it starts from, which is settled when it goes on.
OF_A_NEW_RUN = (
    *("actual_resume", "weights", "init_word", "embedding_manager_ckpt"),
    *("name", "postfix", "project", "logdir", "datadir_in_name"),
)
MAY_BE_EMPTY = ("name", "postfix")


def str2bool(text: str) -> bool:
    """Read yes/true/1 and no/false/0 in any case."""
    value = {"yes": True, "true": True, "t": True, "y": True, "1": True}.get(text.lower())
    if value is None and text.lower() not in ("no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")
    return bool(value)


def trainer_value(text: str) -> Any:
    """Read the value of one of Lightning's flags as YAML would."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a value, or leave the flag out")
    if (
        ":" in text
    ):  # a duration such as 00:12:00:00, which YAML takes for a number to the base of 60
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a YAML value") from error
    return _number(value) if isinstance(value, str) else value


def _number(text: str) -> int | float | str:
    """Return the number that a text is; 1e4 and the like are text to YAML."""
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
    """Make the parser without Lightning's own flags, which `parse_args` adds unseen."""
    parser = Parser(
        prog="main.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    boolean: dict[str, Any] = {"type": str2bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "-b",
        "--base",
        action="extend",
        nargs="*",
        default=[],
        metavar="YAML",
        help="configs, merged left to right",
    )
    what.add_argument("-t", "--train", default=False, help="train", **boolean)
    what.add_argument(
        "--no-test", default=False, help="skip the test set, where the config has one", **boolean
    )
    what.add_argument(
        "-r", "--resume", metavar="RUN", help="go on with a run: its folder, or a .ckpt in it"
    )
    what.add_argument(
        "--actual_resume", metavar="CKPT", help="initial weights (.ckpt or .safetensors)"
    )
    what.add_argument(
        "--weights", choices=WEIGHTS, help="which of that file's, if it has both (default: trained)"
    )
    data = parser.add_argument_group("images")
    data.add_argument("--data_root", metavar="DIR", help="photos of the subject")
    data.add_argument(
        "--reg_data_root", metavar="DIR", help="images of the class, for prior preservation"
    )
    data.add_argument("--class_word", metavar="WORD", help="the class noun, such as dog")
    data.add_argument(
        "--init_word", metavar="WORD", help="give the identifier this word's embedding at the start"
    )
    data.add_argument(
        "--embedding_manager_ckpt",
        metavar="FILE",
        help="textual-inversion embeddings to start from",
    )
    run = parser.add_argument_group("the run and its folder")
    run.add_argument("-n", "--name", default="", help="name of the run (default: the config's)")
    run.add_argument("-f", "--postfix", default="", help="appended to the name")
    run.add_argument("-l", "--logdir", help="where run folders are made (default: logs)")
    run.add_argument(
        "--datadir_in_name",
        default=None,
        help="begin the name with the data folder's (default: true)",
        **boolean,
    )
    run.add_argument("-p", "--project", help="the run folder's parent, instead of --logdir")
    run.add_argument("-s", "--seed", type=int, help="seed of everything random (default: 23)")
    run.add_argument(
        "--export",
        choices=EXPORTS,
        help="also write the weights alone at the end, in this precision",
    )
    run.add_argument(
        "-d", "--debug", default=False, help="show the traceback of an error", **boolean
    )
    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--gpus",
        metavar="LIST",
        help="'0,' the first GPU, '0,1' two; without it the CPU or the YAML's",
    )
    machine.add_argument(
        "--scale_lr",
        default=None,
        help="learning rate x accumulated batches x devices x batch size",
        **boolean,
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Returns:
        the flags; `trainer` holds those of Lightning that were given, `overrides` the
        key.path=value.

    Raises:
        UserError: an unknown flag (with the nearest valid one), a value that does not parse, or a
            stray word.
    """
    parser = build_parser()
    visible = set(_flags(parser))
    for key in TRAINER_KEYS:
        parser.add_argument(
            f"--{key}",
            dest=f"trainer.{key}",
            type=trainer_value,
            help=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
        )
    overrides, words = _overrides_apart(parser, sys.argv[1:] if argv is None else argv)
    _say_what_is_given_twice(parser, words)
    args, rest = parser.parse_known_args(words)
    for word in rest:
        if not word.startswith("-"):
            raise UserError(f"'{word}' is neither a flag nor key.path=value; see --help")
        flag = word.partition("=")[0]
        hint = nearest(flag, visible | {f"--{key}" for key in TRAINER_KEYS})
        raise UserError(f"unknown flag {flag}{hint}; see --help")
    # What is empty is a shell variable that was not set, or a mistake: it is never "not given".
    for name, value in vars(args).items():
        if isinstance(value, str) and not value.strip() and name not in MAY_BE_EMPTY:
            raise UserError(
                f"--{name.removeprefix('trainer.')}: is empty; give a value, or leave the flag out"
            )
    args.overrides = overrides
    given = [key for key in vars(args) if key.startswith("trainer.")]
    args.trainer = {key.removeprefix("trainer."): vars(args).pop(key) for key in given}
    return args


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield every flag of a parser."""
    for action in parser._actions:
        yield from action.option_strings


def _overrides_apart(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the words of the form `key.path=value`, and the others.

    argparse would take an override for the value of a flag before it that may have one. What
    follows a flag that must have one is its value, whatever it looks like: a folder may be called
    `photos.v2=final`.
    """
    takes_one = {
        flag for action in parser._actions if action.nargs is None for flag in action.option_strings
    }
    overrides: list[str] = []
    others: list[str] = []
    for before, word in zip(["", *words], words):
        is_override = OVERRIDE.match(word) and before not in takes_one
        (overrides if is_override else others).append(word)
    return overrides, others


def _say_what_is_given_twice(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Warn of a flag whose first value is lost; that of --base is not."""
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    flags = [word.partition("=")[0] for word in words]
    times = Counter(actions[flag] for flag in flags if flag in actions)
    for action, number in times.items():
        if number > 1 and action.dest != "base":
            log.warning(
                "%s is given %d times: the last one counts", action.option_strings[-1], number
            )


def prepare(args: argparse.Namespace) -> tuple[RunConfig, Run]:
    """Make one config of the flags, the YAML files and a resumed run's own, and name the run.

    Raises:
        UserError: nothing to do, no config, or a part of it that cannot be read.
    """
    if not args.train and not args.resume:
        raise UserError("nothing to do: give -t to train, or -r RUN to go on with a run")
    for flag in OF_A_NEW_RUN:
        if args.resume and getattr(args, flag) not in (None, ""):
            raise UserError(f"--{flag}: not together with --resume, which takes it from the run")
    if args.resume:
        run = resumed_run(args.resume)
        saved = saved_config(run).content
    else:
        run = None
        saved = {}
        if not args.base:
            example = "configs/stable-diffusion/v1-finetune_unfrozen.yaml"
            raise UserError(f"no config: give one with --base, such as {example}")
    config = with_flags(RunConfig(to_plain(load_config(args.base, args.overrides, saved))), args)
    # A new run's folder is made last, when nothing of the above can be refused any more.
    return config, run or new_run(args)


def with_flags(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """Return the config with what the flags say where the YAML says it.

    Raises:
        UserError: a value that cannot be used, or a section that is no mapping.
    """
    # The run's own settings.
    given = {"seed": args.seed, "scale_lr": args.scale_lr, "export": args.export}
    values: dict[str, Any] = {
        f"run.{key}": value for key, value in given.items() if value is not None
    }
    config = config.having({**values, "run.working_folder": os.getcwd()})
    config = config.having({"run.seed": config.seed})
    # Lightning's arguments: which device and precision depends on those that are given.
    config = config.having(
        {f"lightning.trainer.{key}": value for key, value in args.trainer.items()}
    )
    config = config.having(_device(config, args))
    # The images, and what captions call them.
    config = config.having(images_of(config, args))
    config = config.having(new_words_of(config, args))
    if needs_no_class_images(config):
        config = config.without("data.params.reg", "data.params.num_class_images")
    config.check_settings()
    check_trainer_values(config.trainer)
    return config


def _device(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Return where and in which precision to train, as far as flags and YAML leave it open."""
    trainer = dict(config.trainer)
    if args.gpus is not None:
        from ldm.host import parse_gpus  # imports torch, which takes a second

        trainer.update(parse_gpus(args.gpus))
    elif "accelerator" not in trainer and "devices" not in trainer:
        trainer.update({"accelerator": "cpu", "devices": 1})
    if "precision" not in trainer and not trainer.get("barebones"):
        from ldm.host import default_precision

        trainer["precision"] = default_precision(trainer.get("accelerator", "auto"))
    return {f"lightning.trainer.{key}": value for key, value in trainer.items()}


def start_of(args: argparse.Namespace) -> Start:
    """Return the initial weights and embeddings that the flags name.

    Raises:
        UserError: a file that is not there, or --weights without one.
    """
    from ldm.training.initial_weights import Start

    weights = Path(args.actual_resume) if args.actual_resume else None
    if weights and not weights.exists():  # a file, or a diffusers folder
        raise UserError(f"--actual_resume {weights}: no such file or folder")
    embeddings = Path(args.embedding_manager_ckpt) if args.embedding_manager_ckpt else None
    if embeddings and not embeddings.is_file():
        raise UserError(f"--embedding_manager_ckpt {embeddings}: no such file")
    if args.weights and not weights:
        raise UserError(
            "--weights: says which of the weights of --actual_resume, which is not given"
        )
    return Start(weights, args.weights, embeddings, args.init_word)
