"""kubectl, as a person would call it: apply, get, wait with an end, forward a port."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, TypeVar

MANIFESTS = Path(__file__).parent / "manifests"
SECONDS = 300
"""Nothing that is waited for here takes longer, unless it hangs."""

Manifest = dict[str, Any]
T = TypeVar("T")


def manifest(name: str, /, **values: str) -> str:
    """The YAML text of a file of manifests/ with its ``$words`` filled in."""
    return Template((MANIFESTS / f"{name}.yaml").read_text(encoding="utf-8")).substitute(values)


def wait_for(condition: Callable[[], T | None], what: str, story: Callable[[], str] = str) -> T:
    """The first answer of ``condition`` that is true; fails with ``story`` if there is none in time."""
    deadline = time.monotonic() + SECONDS
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"no {what} in {SECONDS} s\n{story()}"
        time.sleep(0.5)
    return answer


@dataclass(frozen=True)
class Said:
    """What kubectl answered."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Kubectl:
    """kubectl with one kubeconfig, in one namespace."""

    kubeconfig: Path
    namespace: str

    def ask(self, *arguments: str, text: str | None = None) -> Said:
        """Calls it, whatever comes of it; ``text`` goes to its standard input."""
        done = subprocess.run(
            self._command(*arguments), input=text, capture_output=True, text=True, timeout=SECONDS, env=self._env()
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        """Calls it and gives what it printed; fails with its message if it fails."""
        said = self.ask(*arguments, text=text)
        assert said.code == 0, f"kubectl {' '.join(arguments)}: {said.err or said.out}"
        return said.out

    def apply(self, text: str) -> Said:
        """Applies manifests; fails if the server refuses one."""
        said = self.ask("apply", "-f", "-", text=text)
        assert said.code == 0, said.err
        return said

    def get(self, kind: str, name: str) -> Manifest:
        """One object."""
        found: Manifest = json.loads(self("get", kind, name, "-o", "json"))
        return found

    def listed(self, kind: str, selector: str) -> list[Manifest]:
        """Every object of a kind that a label selector takes, oldest first."""
        found = json.loads(self("get", kind, "-l", selector, "-o", "json", "--sort-by=.metadata.creationTimestamp"))
        items: list[Manifest] = found["items"]
        return items

    @contextmanager
    def forwarded(self, target: str, port: int) -> Iterator[int]:
        """Yields the port of 127.0.0.1 that leads to a port of ``target`` while the block runs."""
        command = self._command("port-forward", "--address", "127.0.0.1", target, f":{port}")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self._env())
        try:
            line = process.stdout.readline() if process.stdout else ""
            found = re.search(r"127\.0\.0\.1:(\d+) ->", line)
            assert found, f"kubectl port-forward {target}: no port in {line!r}"
            yield int(found[1])
        finally:
            process.terminate()
            process.communicate()

    def _command(self, *arguments: str) -> list[str]:
        return ["kubectl", "--namespace", self.namespace, *arguments]

    def _env(self) -> Mapping[str, str]:
        return os.environ | {"KUBECONFIG": str(self.kubeconfig)}
