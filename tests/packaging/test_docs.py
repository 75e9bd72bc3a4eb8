"""The documentation holds together: links lead somewhere, the index names every page, commands in it exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from energylens_vllm.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    files = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    assert [target for target in files if not (page.parent / target).exists()] == []


def test_the_index_names_every_page() -> None:
    named = set(re.findall(r"\]\(([^)\s]+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert pages - {"index.md"} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_documentation_exist(page: Path) -> None:
    used = set(re.findall(r"`energylens ([a-z]+)", page.read_text())) | set(
        re.findall(r"^(?:\$ )?energylens ([a-z]+)", page.read_text(), flags=re.MULTILINE)
    )
    assert used <= set(COMMANDS)


def test_pages_show_what_the_commands_print() -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"], check=True)
