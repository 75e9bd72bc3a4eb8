"""Which folders become which packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# Top-level folders that are imported as part of energylens_vllm and never by their own name.
MAPPED = ("hooks", "dashboards")

setup(
    packages=[
        *find_packages(include=["energylens_vllm", "energylens_vllm.*"]),
        *(f"energylens_vllm.{name}" for folder in MAPPED for name in find_packages(include=[folder, f"{folder}.*"])),
    ],
    package_dir={f"energylens_vllm.{folder}": folder for folder in MAPPED},
)
