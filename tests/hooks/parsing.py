"""Parses command lines as `vllm serve` does, without serving:  python parsing.py < cases.json

A case is {"arguments": [...], "environment": {...}, "configure": whether to make the configuration too}. Prints for
each a JSON object: the settings in force and whether the plugin is required, or the exit status and what was printed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
from dataclasses import asdict
from typing import Any

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_TARGET_DEVICE": "cpu"}

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hooks.vllm import status
from energylens_vllm.serving import settings

#: packages of vllm.entrypoints that hold cli_args in one release or another
HOMES = [name for name in ("openai", "launchers", "common") if importlib.util.find_spec(f"vllm.entrypoints.{name}")]
cli_args = next(
    importlib.import_module(f"vllm.entrypoints.{home}.cli_args")
    for home in HOMES
    if importlib.util.find_spec(f"vllm.entrypoints.{home}.cli_args")
)


def parse(arguments: list[str], environment: dict[str, str], configure: bool) -> dict[str, Any]:
    before, argv, said = dict(os.environ), sys.argv, io.StringIO()
    os.environ.update(environment)
    sys.argv = ["vllm", "serve", *arguments]
    try:
        with contextlib.redirect_stderr(said):
            parser = cli_args.make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
            parsed = parser.parse_args(arguments)
            parsed.model = parsed.model_tag  # as the subcommand does
            engine = AsyncEngineArgs.from_cli_args(parsed)
            if configure:
                engine.create_engine_config()
        return {
            "settings": asdict(settings.load(engine.additional_config)),
            "required": os.environ.get(settings.REQUIRED_VARIABLE) == "1",
            "seed": engine.seed,
        }
    except SystemExit as exit:
        return {"exit": exit.code, "said": said.getvalue().strip().splitlines()[-1]}
    except EnergyLensError as error:
        return {"error": str(error)}
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(before)
        status.problem = None


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        print(json.dumps(parse(**case)), flush=True)
