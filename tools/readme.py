"""Run the `$ energylens` commands that README.md and docs/explore.md show and write what they print under them.

python tools/readme.py [--check]     # --check changes nothing and fails if a page shows something else
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "explore.md")
SHOWN = re.compile(r"(?<=```console\n)\$ (energylens [^\n]*)\n(.*?)(?=```)", flags=re.DOTALL)
TOOK = re.compile(r"\(\d+\.\d s\)")  # how long it took, which differs each time


def refreshed(text: str) -> str:
    """`text` with the present output of each command."""

    def run(shown: re.Match[str]) -> str:
        command = [sys.executable, "-m", "energylens_vllm.cli", *shlex.split(shown[1])[1:]]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return shown[0] if TOOK.sub("", output) == TOOK.sub("", shown[2]) else f"$ {shown[1]}\n{output}"

    return SHOWN.sub(run, text)


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        new = refreshed(text)
        if sys.argv[1:] != ["--check"]:
            page.write_text(new)
        elif new != text:
            sys.exit(f"{page.relative_to(ROOT)} shows what the commands no longer print: python tools/readme.py")


if __name__ == "__main__":
    main()
