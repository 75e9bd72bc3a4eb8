"""Run the `$ energylens` commands that README.md shows and write what they print under them.

python tools/readme.py [--check]     # --check changes nothing and fails if README.md shows something else
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
SHOWN = re.compile(r"(?<=```console\n)\$ (energylens [^\n]*)\n(.*?)(?=```)", flags=re.DOTALL)


def refreshed(text: str) -> str:
    """`text` with the present output of each command."""

    def run(shown: re.Match[str]) -> str:
        command = [sys.executable, "-m", "energylens_vllm.cli", *shlex.split(shown[1])[1:]]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return f"$ {shown[1]}\n{output}"

    return SHOWN.sub(run, text)


def main() -> None:
    text = README.read_text()
    new = refreshed(text)
    if sys.argv[1:] == ["--check"]:
        sys.exit("README.md shows what the commands no longer print: python tools/readme.py" if new != text else 0)
    README.write_text(new)


if __name__ == "__main__":
    main()
