"""The command line: ``fused-attn train | reproduce | inspect | scales | demo | bench | convert | info``."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch

from .._extras import MissingExtraError, needs
from ..bench import BenchError
from ..train.errors import NonFiniteError, TrainError
from ..train.recipes import RECIPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done.  1: the machine failed.  2: a setting, the data or a file of the run is not usable, or packages of an extra
    are not installed or broken.  3: the training came to a loss, gradient or weight that is inf or nan.  130:
    interrupted.  141: the reader of its output has closed it, as ``head`` does.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:  # what is still to be written; tyro ends --help with SystemExit
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError as error:
        return 128 + signal.SIGPIPE if _drop_unread() else _failed(error, 1)
    except OSError as error:  # a full disk
        if sys.stdout is not None:
            _drop_output(sys.stdout)
        return _failed(error, 1)


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from .. import __version__

        print(f"fused-attn {__version__}")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        wants_help = bool(arguments) and arguments[0] in ("-h", "--help")
        lines = [f"  {name:10}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
        usage = "\n".join(["usage: fused-attn COMMAND [options]; fused-attn COMMAND --help shows the options", *lines])
        if arguments and not wants_help:
            usage = (
                f"fused-attn: error: the command must be one of {', '.join(COMMANDS)}, got {arguments[0]!r}\n{usage}"
            )
        print(usage, file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    try:
        extra = EXTRA_OF.get(arguments[0])
        with needs(extra, f"fused-attn {arguments[0]}") if extra else contextlib.nullcontext():
            return COMMANDS[arguments[0]](arguments[1:])
    except NonFiniteError as error:
        return _failed(error, 3)
    except (TrainError, BenchError, MissingExtraError) as error:
        return _failed(error, 2)
    except BrokenPipeError:
        raise
    except (OSError, MemoryError) as error:  # a log or a picture on a full disk; checkpoints report theirs themselves
        return _failed(error, 1)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return _failed(error, 1)
    except KeyboardInterrupt:
        print("fused-attn: interrupted", file=sys.stderr)
        return 130


def _failed(error: BaseException, status: int) -> int:
    text = " ".join(str(error).split()) or "out of memory"
    print(f"fused-attn: error: {text}", file=sys.stderr)
    return status


def _drop_unread() -> bool:
    """Whether nobody reads stdout or stderr any more; what Python has still to write to them is then dropped."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and _is_unread(stream)]
    for stream in unread:
        _drop_output(stream)
    return bool(unread)


def _is_unread(stream: TextIO) -> bool:
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # replaced by one without a file, or closed
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_output(stream: TextIO) -> None:
    """Let the interpreter's flush at its end succeed."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _is_out_of_memory(error: RuntimeError) -> bool:
    """The CPU's allocator raises no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _train(arguments: Sequence[str]) -> int:
    """Train a model on CPU or GPU, in one process or, under torchrun, in several."""
    import tyro

    from ..train.config import TrainConfig, resumed_config

    out = _option(arguments, "--out")
    if "--resume" in arguments and out is not None:  # the run's settings, so that --resume --out DIR is enough
        settings = vars(resumed_config(Path(out))) | {"out": tyro.MISSING, "resume": False}
    else:
        required = ("model", "dataset", "out")
        settings = dict.fromkeys(required, tyro.MISSING) | _recipe_settings(arguments)
    config = tyro.cli(TrainConfig, args=arguments, default=TrainConfig(**settings), prog="fused-attn train")
    from ..train.loop import train as run
    from ..train.results import shown

    try:
        metrics = run(config)
    except KeyboardInterrupt:
        print(f"fused-attn: interrupted; go on with --resume --out {config.out}", file=sys.stderr)
        return 130
    skipped = f" ({metrics['skipped_steps']} left out)" if metrics["skipped_steps"] else ""
    done = f"{config.out}: {metrics['steps']} steps{skipped} in {metrics['seconds']:.0f} s"
    print(", ".join(filter(None, (done, shown(metrics)))))
    return 0


def _option(arguments: Sequence[str], option: str) -> str | None:
    """Value of ``option`` among the arguments, before the whole line is parsed."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else "".join(arguments[i + 1 : i + 2])
    return None


def _recipe_settings(arguments: Sequence[str]) -> dict:
    recipe = _option(arguments, "--recipe")
    if recipe is None:
        return {}
    if recipe not in RECIPES:
        raise TrainError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    return RECIPES[recipe][1]


def _info(arguments: Sequence[str]) -> int:
    """Say what is installed, and which implementation each op would use here and why not the others."""
    argparse.ArgumentParser(prog="fused-attn info", description=_info.__doc__).parse_args(arguments)
    from .info import report

    print(report())
    return 0


def _inspect(arguments: Sequence[str]) -> int:
    """Draw what the attention layers of a run, or of a model, make of one image."""
    import tyro

    from .inspect_model import run

    return tyro.cli(run, args=arguments, prog="fused-attn inspect")


def _demo(arguments: Sequence[str]) -> int:
    """Train a small attention-augmented network on real images, and compare the fused op with eager PyTorch."""
    import tyro

    from .demo import run

    return tyro.cli(run, args=arguments, prog="fused-attn demo")


def _bench(arguments: Sequence[str]) -> int:
    """Measure speed and memory of ops, or of whole networks, beside what you would use instead."""
    import tyro

    # A time limit that ends the command ends it as Ctrl-C does: what was measured is kept.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments[:1] == ["networks"]:
            from ..bench import networks

            return networks.run(tyro.cli(networks.NetworksConfig, args=arguments[1:], prog="fused-attn bench networks"))
        from ..bench import command

        return command.run(tyro.cli(command.BenchConfig, args=arguments, prog="fused-attn bench"))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _scales(arguments: Sequence[str]) -> int:
    """Plot how much the squeeze-excite gates of trained networks differ between channels."""
    import tyro

    from .draw_scales import ScalesConfig, run

    return run(tyro.cli(ScalesConfig, args=arguments, prog="fused-attn scales"))


def _convert(arguments: Sequence[str]) -> int:
    """Put fused ops into a model of timm or transformers, and compare it with itself: equality, time, memory."""
    import tyro

    from .convert_model import ConvertConfig, run

    return run(tyro.cli(ConvertConfig, args=arguments, prog="fused-attn convert"))


def _reproduce(arguments: Sequence[str]) -> int:
    """Run a table or figure of the papers, and write it beside the paper's numbers; without one, list them."""
    import tyro

    from ..reproduce.command import ReproduceConfig, run

    return run(tyro.cli(ReproduceConfig, args=arguments, prog="fused-attn reproduce"))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "reproduce": _reproduce,
    "inspect": _inspect,
    "demo": _demo,
    "bench": _bench,
    "scales": _scales,
    "convert": _convert,
    "info": _info,
}
#: command -> extra of the package that it needs
EXTRA_OF = {
    "train": "train",
    "reproduce": "train",
    "inspect": "train",
    "demo": "train",
    "bench": "bench",
    "scales": "train",
    "convert": "bench",
}
