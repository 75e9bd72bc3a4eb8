"""The `energylens` command, one module a subcommand.

A subcommand is a line in `COMMANDS` and a module of its name here with `add_arguments(parser)` and
`run(args) -> exit status`; its module docstring is the description that `--help` shows. Only the chosen subcommand's
module is imported, so `energylens --help` is quick and a subcommand may need extras that others do not.

Exit status: 0 done, 1 a check or comparison failed, 2 bad input (one line on stderr).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from energylens_vllm import __version__
from energylens_vllm.errors import EnergyLensError

COMMANDS = {
    "predict": "time, energy and power of one engine step",
    "explore": "find the deployments that serve a load with least energy",
    "compare": "what another fusion of a network saves",
    "simulate": "try routing policies on a trace: joules, latencies and attainment of a fleet",
    "replay": "predict recorded steps and score them against what was measured",
    "record": "record the steps of a running server, for replay",
    "calibrate": "measure a GPU of this machine and write its profile",
    "agent": "weigh vLLM replicas for HAProxy by the energy that a request adds there",
    "monitor": "start Prometheus with the energy rules beside a running vLLM",
    "doctor": "check vLLM, the plugin, the GPUs and the settings of this machine",
    "models": "list the models that are known by name",
    "gpus": "list the GPU profiles",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `energylens` with `argv` (default: the process's) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(chosen=next((word for word in arguments if word in COMMANDS), None)).parse_args(arguments)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output left, as in `energylens models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (EnergyLensError, OSError) as error:  # OSError: a file that may not be read, say; it names the file
        print("energylens: error:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, instead of repeating all of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="energylens", description="Predict, measure and lower the energy of vLLM serving.", allow_abbrev=False
    )
    parser.add_argument("-V", "--version", action="version", version=f"energylens-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            module = import_module(f"{__name__}.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
