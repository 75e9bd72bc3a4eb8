"""Writes docs/settings.md from the code:  python -m energylens_vllm.serving.reference [--check]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from energylens_vllm.serving import settings

_NOTE = "<!-- Written by `python -m energylens_vllm.serving.reference`; edit the code it is made from. -->"


def settings_page() -> str:
    """docs/settings.md."""
    rows = [
        f"| `{name}` | {kind} | `{default}` | `{settings.PREFIX}{name.upper()}` | {doc} |"
        for name, kind, default, doc in settings.table()
    ]
    assert settings.__doc__ is not None
    return "\n".join(
        [
            "# Settings of the vLLM plugin",
            _NOTE,
            "",
            settings.__doc__.partition("\n\n")[2].strip(),
            "",
            "`vllm serve MODEL --plugin energylens` asks for the plugin by name: if it cannot start (bad settings, a",
            "model it cannot read, a vLLM it does not know), vLLM stops with the reason. Without that flag the plugin",
            "is found because it is installed, and what stops it is logged and does not stop vLLM.",
            "`VLLM_PLUGINS=` (a list without `energylens`) leaves it out.",
            "",
            "| setting | type | default | environment variable | meaning |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


PAGES = {"settings.md": settings_page}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages; with --check, only say which are out of date, and return 1 if any is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="the folder of the pages (default: docs)")
    args = parser.parse_args(argv)
    stale = [name for name, page in PAGES.items() if not _is_current(args.docs / name, page())]
    for name in stale:
        print(f"{args.docs / name} {'is out of date' if args.check else 'written'}")
        if not args.check:
            (args.docs / name).write_text(PAGES[name]())
    return 1 if args.check and stale else 0


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main())
