"""Writes the locks of the image: every package with its hashes, once with torch for the CPU and once for CUDA.

``make lock``. Resolved by metadata alone: no CUDA wheel is downloaded. docker/constraints.txt says which versions; what
it does not name keeps the version of the lock, so remove a lock to take newer ones. With ``--check`` nothing is
written, and the exit status is 1 where a lock is not what these files and the index say.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {"cpu": "+cpu", "cuda": ""}
"""Lock -> local part of the version of its torch."""
LEFT_OUT = ("kubernetes",)
"""What only the launcher needs: a run asks the API server for nothing."""
HEADER = """\
# Made by `make lock` from pyproject.toml and docker/constraints.txt; installed with --require-hashes.
"""
_PACKAGE = re.compile(r"^(\S+==\S+) \\\n((?:    --hash=.*\n)+)", re.MULTILINE)


def path(variant: str) -> Path:
    """Where a lock lies."""
    return ROOT / "docker" / f"requirements-{variant}.txt"


def wanted() -> list[str]:
    """The requirements of the container, as pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    everything: list[str] = [*project["dependencies"], *extras["job"], *extras["s3"]]
    return [one for one in everything if not one.startswith(LEFT_OUT)]


def hashes(text: str) -> dict[str, set[str]]:
    """Name==version -> the hashes of its files, as a lock has them."""
    return {pin: set(re.findall(r"sha256:[0-9a-f]{64}", files)) for pin, files in _PACKAGE.findall(text)}


def lock(variant: str, find_links: str) -> str:
    """The text of one lock. Raises CalledProcessError where it cannot be resolved; uv has said why on stderr."""
    constraints = (ROOT / "docker" / "constraints.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        asked, pins, kept = Path(folder, "asked.txt"), Path(folder, "constraints.txt"), Path(folder, "lock.txt")
        asked.write_text("\n".join(wanted()), encoding="utf-8")
        pins.write_text(re.sub(r"(?m)^(torch==.*)$", rf"\1{LOCKS[variant]}", constraints), encoding="utf-8")
        if path(variant).exists():
            # Without the hashes, which uv would take over unseen.
            kept.write_text("\n".join(hashes(path(variant).read_text(encoding="utf-8"))), encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", str(asked)]
        command += ["--constraints", str(pins), "--output-file", str(kept), "--generate-hashes", "--no-annotate"]
        command += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", "--quiet"]
        command += ["--no-header", "--no-emit-index-url", "--no-emit-find-links"]
        # A wheel of torch for the CPU also satisfies the version that the lock for CUDA asks for.
        command += ["--find-links", find_links] if find_links and variant == "cpu" else []
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        return HEADER + kept.read_text(encoding="utf-8")


def differences(old: str, new: str) -> list[str]:
    """What an existing lock has otherwise. Files that a release gained later are none: they were not chosen."""
    before, now = hashes(old), hashes(new)
    lines = [f"not wanted, or in another version: {pin}" for pin in before.keys() - now.keys()]
    lines += [f"absent: {pin}" for pin in now.keys() - before.keys()]
    lines += [f"another hash: {pin}" for pin in before.keys() & now.keys() if not before[pin] <= now[pin]]
    return sorted(lines)


def main() -> int:
    """One lock or both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", nargs="*", help=f"of {', '.join(LOCKS)}; default: all")
    parser.add_argument("--find-links", default="", help="folder or page with the CPU's wheel of torch")
    parser.add_argument("--check", action="store_true", help="only say what differs")
    arguments = parser.parse_args()
    wrong = 0
    for variant in arguments.variant or LOCKS:
        try:
            text = lock(variant, arguments.find_links)
        except subprocess.CalledProcessError as error:
            return error.returncode
        if arguments.check:
            found = differences(path(variant).read_text(encoding="utf-8"), text)
            wrong += len(found)
            print(*(f"{path(variant).name}: {line}" for line in found), sep="\n", end="\n" if found else "")
        else:
            path(variant).write_text(text, encoding="utf-8")
            print(f"{path(variant).name}: {len(hashes(text))} packages")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
