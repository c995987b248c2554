"""The command line of train_lm."""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable
from typing import Any

from _lm_parallel import Parallel
from _lm_training import GRAD_DTYPES, SIZES, Settings


def positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its error
    return parse


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--size", choices=SIZES, default="small", help="default: small")
    group.add_argument(
        "--tiny", action="store_const", const="tiny", dest="size", help="--size tiny"
    )
    group.add_argument(
        "--moe", action="store_true", help="four experts, two a token, in place of a dense SwiGLU"
    )
    group.add_argument(
        "--experts", type=positive(int), metavar="N", help="--moe with N experts in place of four"
    )


def add_mesh(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--mesh",
        default="data=1",
        metavar="AXES",
        help="devices along each axis, such as data=4,model=2 or data=2,expert=4: windows are cut "
        "over data and expert, experts over expert, heads and hidden units over model",
    )
    group.add_argument(
        "--fsdp",
        action="store_true",
        help="cut the layers' matrices over data as well, and gather each for its products",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="run in several processes, this one with --process of --processes; process 0 listens "
        "there. `auto` takes all three from the cluster (Slurm, Open MPI, Kubernetes, ...)",
    )
    group.add_argument("--processes", type=positive(int), metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which this one is, from 0")


def add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--text",
        type=pathlib.Path,
        metavar="DIR",
        help="read all .py, .md, .rst and .txt files below it, in place of the standard library's "
        "source (about 8 MB); a long run wants more text than it reads",
    )
    group.add_argument("--steps", type=positive(int), help="default: the size's")
    group.add_argument("--batch", type=positive(int), help="windows a step (default: the size's)")
    group.add_argument(
        "--learning-rate", type=positive(float), help="highest rate (default: the size's)"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of the parameters and the batches (default: 0)"
    )
    group.add_argument(
        "--twin",
        action="store_true",
        help="train a second BF16 model, its first weights off by a thousandth: how far the losses "
        "of two such models lie apart by chance",
    )
    group.add_argument(
        "--evaluations",
        type=positive(int),
        default=8,
        help="how many, spread evenly (default: 8)",
    )
    group.add_argument(
        "--validation-windows",
        type=positive(int),
        default=256,
        help="windows of validation text that an evaluation reads (default: 256)",
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("FP8 recipe")
    group.add_argument(
        "--scale-format",
        choices=("float32", "pow2"),
        default="float32",
        help="block scales: any float32 (default) or powers of two",
    )
    group.add_argument(
        "--grad-dtype",
        choices=tuple(GRAD_DTYPES),
        default="e4m3",
        help="FP8 type of gradients (default: e4m3); activations and weights are e4m3",
    )


def add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("out/train_lm"),
        metavar="DIR",
        help="gets loss.png, curves.json, summary.json, sample.txt (default: out/train_lm)",
    )
    group.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        metavar="DIR",
        help="save there after each evaluation and at the end",
    )
    group.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in --checkpoint"
    )
    group.add_argument(
        "--stop-after",
        type=positive(int),
        metavar="STEP",
        help="save and stop after this step; the schedule still spans --steps",
    )


def parse_arguments(argv: list[str] | None = None) -> tuple[Settings, dict[str, Any]]:
    """What decides the loss curves, and the other arguments of the job and of `join`."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level language model in BF16 and in FP8 on the source of the "
        "Python standard library, from the same parameters on the same batches, and compare.",
        epilog="Sizes: "
        + "; ".join(
            f"{name}: {s.model.layers} layers of {s.model.width}, "
            f"{s.steps} steps ({s.moe_steps} with --moe) of {s.batch} x {s.sequence} bytes"
            for name, s in SIZES.items()
        )
        + ". The medium and large models want a GPU.",
    )
    for add in (add_model, add_mesh, add_training, add_recipe, add_files):
        add(parser)
    args = parser.parse_args(argv)
    settings = settings_of(args)
    check(parser, args, settings)
    try:
        parallel = Parallel.parse(args.mesh, args.fsdp)
    except ValueError as error:
        parser.error(f"--mesh: {error}")
    check_mesh(parser, args, settings, parallel)
    names = ("out", "checkpoint", "resume", "stop_after", "text")
    names += ("coordinator", "processes", "process")
    return settings, {"parallel": parallel} | {name: getattr(args, name) for name in names}


def settings_of(args: argparse.Namespace) -> Settings:
    size = SIZES[args.size]
    moe = args.moe or args.experts is not None
    return Settings(
        size=args.size,
        moe=moe,
        experts=args.experts or 4,
        steps=args.steps or (size.moe_steps if moe else size.steps),
        batch=args.batch or size.batch,
        learning_rate=args.learning_rate or size.learning_rate,
        evaluations=args.evaluations,
        validation_windows=args.validation_windows,
        seed=args.seed,
        scale_format=args.scale_format,
        grad_dtype=args.grad_dtype,
        twin=args.twin,
    )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, settings: Settings) -> None:
    if settings.seed < 0:
        parser.error(f"--seed is {settings.seed}; allowed: zero or a positive int")
    if settings.evaluations > settings.steps:
        parser.error(
            f"--evaluations is {settings.evaluations}; allowed: at most --steps, {settings.steps}"
        )
    for flag in ("resume", "stop_after"):
        if getattr(args, flag) and args.checkpoint is None:
            parser.error(f"--{flag.replace('_', '-')} needs --checkpoint DIR")
    if settings.experts < 2:
        parser.error(
            f"--experts is {settings.experts}; allowed: at least two, of which a token has two"
        )


def check_mesh(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    settings: Settings,
    parallel: Parallel,
) -> None:
    if parallel.expert > 1 and not settings.moe:
        parser.error("--mesh: expert needs --moe or --experts")
    if parallel.fsdp and parallel.data == 1:
        parser.error("--fsdp needs --mesh data=N, N at least 2")
    numbered = args.processes is not None and args.process is not None
    if (args.coordinator not in (None, "auto")) != numbered:
        parser.error("--coordinator HOST:PORT, --processes and --process need one another")
