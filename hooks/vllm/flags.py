"""`vllm serve MODEL --plugin energylens --energylens '{...}'`: vLLM has neither flag in any release.

vLLM loads plugins before it parses its command line, so they can be added. What they say has to reach processes that
vLLM forks or spawns later, and those inherit the environment.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from energylens_vllm.errors import EnergyLensError, unknown
from energylens_vllm.hooks.vllm import status
from energylens_vllm.hooks.vllm.start import check
from energylens_vllm.serving import settings

#: modules of vLLM that are changed only when they are imported; `--plugin energylens` tries them at once
_CHANGED = (
    "vllm.config.scheduler",
    "vllm.v1.engine.core",
    "vllm.v1.engine.core_client",
    "vllm.v1.metrics.stats",
    "vllm.v1.metrics.loggers",
)


def install(arg_utils: ModuleType) -> None:
    """Have `EngineArgs` add our flags, and check before anything is started what `--plugin energylens` asks for."""
    add_original = arg_utils.EngineArgs.add_cli_args
    create_original = arg_utils.EngineArgs.create_engine_config

    @functools.wraps(add_original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = add_original(parser, *args, **kwargs)
        try:
            add_flags(parser)
        except Exception as error:
            status.unusable(error)
        return parser

    @functools.wraps(create_original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = create_original(self, *args, **kwargs)
        if status.is_required():
            try:
                check(vllm_config, log_stats=not self.disable_log_stats)
            except RuntimeError as error:  # as for any other mistake on the command line
                print(f"vllm: error: {error}", file=sys.stderr)
                raise SystemExit(2) from None
        return vllm_config

    arg_utils.EngineArgs.add_cli_args = staticmethod(add_cli_args)
    arg_utils.EngineArgs.create_engine_config = create_engine_config


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--plugin` and `--energylens` to a parser, unless it has them."""
    if "--energylens" in parser._option_string_actions:
        return
    group = parser.add_argument_group("energylens", "Energy of each batch, predicted and measured (energylens-vllm).")
    group.add_argument(
        "--plugin",
        action=_PluginAction,
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="Require the plugin of this name (energylens): if it cannot start, vLLM does not.",
    )
    group.add_argument(
        "--energylens",
        action=_SettingsAction,
        metavar="JSON",
        default=argparse.SUPPRESS,
        help="Settings of energylens as a JSON object, or one as --energylens.NAME VALUE: "
        + "; ".join(f"{name} ({kind}, default {default})" for name, kind, default, _ in settings.table()),
    )


class _PluginAction(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if values != "energylens":
            raise argparse.ArgumentError(self, str(unknown("plugin", values, ["energylens"])))
        os.environ[settings.REQUIRED_VARIABLE] = "1"
        try:
            for name in _CHANGED:
                importlib.import_module(name)
        except Exception as error:
            raise argparse.ArgumentError(self, f"the energylens plugin cannot start: {error}") from error
        if status.problem is not None:
            raise argparse.ArgumentError(self, f"the energylens plugin cannot start: {status.problem}")
        setattr(namespace, self.dest, values)


class _SettingsAction(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        os.environ[settings.FLAG_VARIABLE] = str(values)
        try:
            settings.load()  # so that a mistake is an error of the command line, not of a process started later
        except EnergyLensError as error:
            del os.environ[settings.FLAG_VARIABLE]
            raise argparse.ArgumentError(self, str(error)) from error
        setattr(namespace, self.dest, values)
