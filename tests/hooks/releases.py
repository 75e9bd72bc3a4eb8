"""The Python files of vLLM releases, without their compiled parts:  python releases.py 0.25.1 ...

Enough to run everything above the executor (see fake_executor.py), so one CPU machine tests several releases. A wheel
is hundreds of megabytes and goes as soon as it is unpacked. What is unpacked stays in $XDG_CACHE_HOME/energylens
(~/.cache/energylens).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TESTED = ("0.25.1", "0.33.0")  #: the oldest and the newest supported; the one between is installed


def folder(version: str) -> Path:
    """A folder to put on PYTHONPATH for vLLM `version`, downloaded with pip if it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "energylens"
    unpacked = cache / f"vllm-{version}"
    if not unpacked.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            _download(version, Path(temporary))
            (Path(temporary) / "files").rename(unpacked)
    return unpacked


def _download(version: str, temporary: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip += ["--platform=manylinux_2_28_x86_64", f"--dest={temporary}", f"vllm=={version}"]
    subprocess.run(pip, check=True)
    (wheel,) = temporary.glob("vllm-*.whl")
    files = temporary / "files"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(files, [name for name in archive.namelist() if name.endswith((".py", ".json"))])
    wheel.unlink()
    # vLLM looks its version up, and takes its platform from the "+cpu".
    metadata = files / f"vllm-{version}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or TESTED:
        print(folder(name))
