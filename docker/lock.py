"""Writes the locks of the image: every package with its hashes, once with torch for the CPU and once for CUDA.

``make lock``. Resolved by metadata alone: no CUDA wheel is downloaded. docker/constraints.txt says which versions.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {"cpu": "+cpu", "cuda": ""}
"""Lock -> local part of the version of its torch."""
HEADER = """\
# Made by `make lock` from pyproject.toml and docker/constraints.txt; installed with --require-hashes.
"""


def torch_version(constraints: str) -> str:
    """The release of torch that the constraints name."""
    lines = (line.partition("==") for line in constraints.splitlines())
    return next(version for name, _, version in lines if name == "torch")


def lock(variant: str, find_links: str) -> str:
    """The text of one lock. Raises CalledProcessError where it cannot be resolved."""
    constraints = (ROOT / "docker" / "constraints.txt").read_text(encoding="utf-8")
    torch = torch_version(constraints)
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"
        pins.write_text(constraints.replace(f"torch=={torch}\n", f"torch=={torch}{LOCKS[variant]}\n"), encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "job", "--extra", "s3"]
        command += ["--constraints", str(pins), "--generate-hashes", "--python-version", "3.11"]
        command += ["--python-platform", "x86_64-manylinux_2_28", "--no-annotate", "--no-header", "--quiet"]
        command += ["--no-emit-index-url", "--no-emit-find-links"]
        if find_links and variant == "cpu":
            command += ["--find-links", find_links]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return HEADER + done.stdout


def main() -> None:
    """Both locks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--find-links", default="", help="folder or page with the CPU's wheel of torch")
    arguments = parser.parse_args()
    for variant in LOCKS:
        path = ROOT / "docker" / f"requirements-{variant}.txt"
        path.write_text(lock(variant, arguments.find_links), encoding="utf-8")
        sys.stdout.write(f"{path.relative_to(ROOT)}: {path.read_text(encoding='utf-8').count('==')} packages\n")


if __name__ == "__main__":
    main()
