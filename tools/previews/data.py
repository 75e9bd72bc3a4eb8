"""Writes data.js for app.jsx: the dashboards, and each panel's queries answered over the recording that tests use.

python tools/previews/data.py FOLDER
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "dashboards"))

from prometheus_server import create_blocks, serving  # noqa: E402
from simulated import NOW_S, simulate  # noqa: E402
from test_live import filled_in  # noqa: E402

SHOWN_S, STEP_S = 180, 3


def main() -> None:
    boards = [json.loads(path.read_text()) for path in sorted((ROOT / "dashboards" / "grafana").glob("*.json"))]
    with tempfile.TemporaryDirectory() as folder:
        create_blocks(simulate().open_metrics(), Path(folder) / "data")
        with serving(Path(folder) / "data") as server:
            for panel in (panel for board in boards for panel in board["panels"] if panel["type"] != "row"):
                panel["results"] = []
                for target in panel["targets"]:
                    ask = {"query": filled_in(target["expr"])}
                    if target["instant"]:
                        data = server.ask("query", **ask, time=NOW_S)
                    else:
                        data = server.ask("query_range", **ask, start=NOW_S - SHOWN_S, end=NOW_S, step=STEP_S)
                    panel["results"].append(data["result"])
    content = json.dumps({"now": NOW_S, "seconds": SHOWN_S, "boards": boards})
    (Path(sys.argv[1]) / "data.js").write_text(f"export default {content};\n")


if __name__ == "__main__":
    main()
