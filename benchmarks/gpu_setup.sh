# Source this where vLLM is importable but this checkout can neither be installed nor fetch anything:
#
#     source benchmarks/gpu_setup.sh [FOLDER]
#
# Lays the package out in FOLDER (by default a new temporary one) as an installation would, with its entry points, so
# that vLLM finds the plugin, puts that on PYTHONPATH, and keeps vLLM's and the compilers' caches on the local disk.
_checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_site=${1:-$(mktemp -d)}
python3 - "$_checkout" "$_site" <<'END' || return 1
import pathlib, shutil, sys, tomllib

checkout, site = map(pathlib.Path, sys.argv[1:])
package = site / "energylens_vllm"
project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
shutil.copytree(checkout / "energylens_vllm", package, dirs_exist_ok=True)
for folder in ("hooks", "dashboards"):  # as setup.py maps them
    if (checkout / folder).is_dir():
        shutil.copytree(checkout / folder, package / folder, dirs_exist_ok=True)
info = site / f"energylens_vllm-{project['version']}.dist-info"
info.mkdir(exist_ok=True)
info.joinpath("METADATA").write_text(
    f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
)
groups = {"console_scripts": project["scripts"], **project["entry-points"]}
info.joinpath("entry_points.txt").write_text(
    "".join(f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items()) for group, points in groups.items())
)
END
export PYTHONPATH=$_site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
_cache=${TMPDIR:-/tmp}/energylens-cache
export VLLM_CACHE_ROOT=$_cache/vllm TORCHINDUCTOR_CACHE_DIR=$_cache/inductor TRITON_CACHE_DIR=$_cache/triton
# From / because a checkout as the working folder would hide the package: there it has no hooks/.
(cd / && python3 -c "
from importlib.metadata import entry_points
print('plugin:', entry_points(group='vllm.general_plugins', name='energylens')['energylens'].load())") || return 1
unset _checkout _site _cache
