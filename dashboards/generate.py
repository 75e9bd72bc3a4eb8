"""Writes the dashboards, rules and manifests, and docs/metrics.md, dashboards.md and runbook.md from the code.

python -m energylens_vllm.dashboards.generate [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from energylens_vllm.dashboards import manifests
from energylens_vllm.dashboards.boards import DASHBOARDS
from energylens_vllm.dashboards.page import dashboards_page, metrics_page
from energylens_vllm.dashboards.panel import to_json
from energylens_vllm.dashboards.rules import rule_groups, runbook

_NOTE = "# Written by `python -m energylens_vllm.dashboards.generate`; edit the code it is made from.\n"


def files() -> dict[str, str]:
    """All files of the folder dashboards/ that are made: path -> text."""
    boards = {f"{board.uid}.json": json.dumps(to_json(board), indent=1) + "\n" for board in DASHBOARDS}
    groups = rule_groups()
    local = manifests.prometheus_config([f"127.0.0.1:{manifests.VLLM_PORT}"])
    return {
        **{f"grafana/{name}": text for name, text in boards.items()},
        "prometheus/prometheus.yml": _yaml(local),
        f"prometheus/{manifests.RULES_FILE}": _yaml(groups),
        "compose/docker-compose.yml": _yaml(manifests.compose()),
        "compose/provisioning/datasources/prometheus.yml": _yaml(manifests.grafana_datasources()),
        "compose/provisioning/dashboards/energylens.yml": _yaml(manifests.grafana_providers()),
        "kubernetes/podmonitor.yml": _yaml(manifests.pod_monitor()),
        "kubernetes/prometheusrule.yml": _yaml(manifests.prometheus_rule(groups)),
        "kubernetes/dashboards.yml": _yaml(*(manifests.dashboard_config_map(*board) for board in boards.items())),
        "kubernetes/vllm.yml": _yaml(manifests.deployment()),
    }


def pages() -> dict[str, str]:
    """The pages of the folder docs/ that are made."""
    return {"metrics.md": metrics_page(), "dashboards.md": dashboards_page(), "runbook.md": runbook()}


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as it is, and each value where it is used, not as an alias of an earlier one."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(*documents: Any) -> str:
    return _NOTE + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=118, allow_unicode=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; with --check, only say which are out of date, and return 1 if any is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    parser.add_argument("--root", type=Path, default=Path(), help="the folder of dashboards/ and docs/ (default: .)")
    args = parser.parse_args(argv)
    wanted = {args.root / "dashboards" / name: text for name, text in files().items()}
    wanted |= {args.root / "docs" / name: text for name, text in pages().items()}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        print(f"{path} {'is out of date' if args.check else 'written'}")
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
