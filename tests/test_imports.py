"""The directions of the architecture, kept by walking the imports: who may know what."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TORCH_SIDE = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "numpy"}
STORE_SIDE = {
    "job.storage.store",
    "job.storage.directory",
    "job.storage.s3",
    "job.storage.s3_ask",
    "job.storage.s3_client",
    "job.storage.s3_errors",
    "job.storage.s3_move",
    "job.storage.s3_proof",
    "job.storage.transfer",
    "job.supervision.own",
    "job.supervision.ledger",
    "job.storage.basemodel",
    "job.storage.hub",
    "job.supervision.supervisor",
    "job.supervision.account",
    "job.supervision.announce",
    "job.supervision.folders",
    "job.supervision.prefix",
    "job.supervision.publishing",
}

AGREEMENT = {
    "job.spec",
    "job.spec_section",
    "job.strict_yaml",
    "job.exits",
    "job.layout",
    "job.loading",
    "job.status",
    "job.errors",
    "job.sizing.fits",
    "job.sizing.shapes",
}
"""What the launcher shares with the container."""
READERS = {
    "launcher.results",
    "launcher.folders",
    "launcher.remote",
    "launcher.download",
    "launcher.logs",
    "launcher.manage",
    "launcher.verbs",
}
"""Modules of the launcher that look at what runs left behind, and so may open a store."""

SUPERVISOR = {
    "job.__main__",
    "job.supervision.supervisor",
    "job.supervision.launch",
    "job.supervision.announce",
} | STORE_SIDE
WORKER = {
    "job.training.train",
    "job.data.prepare",
    "job.data.prepared",
    "job.evaluation.evaluate",
    "job.evaluation.verify",
    "job.training.model",
    "job.training.loop",
}

ONLY = {
    "boto3": set[str](),
    "kubernetes": {"launcher.cluster"},
    "botocore": {"job.storage.s3_move", "job.storage.s3_client", "job.storage.s3_errors"},
    "s3transfer": {"job.storage.s3_move", "job.storage.s3_client", "job.storage.s3_errors"},
    "yaml": {"job.strict_yaml"},
    "pytest": set[str](),
}
"""Package -> the only modules of ours that may import it."""

Modules = dict[str, set[str]]
"""Module of ours -> every module it imports, at the top or inside functions."""


def imports(source: str, package: str) -> set[str]:
    """Modules a text imports, those of ``from x import y`` both as ``x`` and as ``x.y``; not those for types only."""
    return {name for node in _running(ast.parse(source)) for name in _names(node, package)}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _running(child)


def _names(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def modules() -> Modules:
    """Every module of the project's packages."""
    files = [*ROOT.glob("job/**/*.py"), *ROOT.glob("launcher/**/*.py"), ROOT / "tunejob.py", ROOT / "main.py"]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): imports(
            path.read_text(encoding="utf-8"), ".".join(path.parent.relative_to(ROOT).parts)
        )
        for path in files
    }


def reach(start: str, known: Modules) -> set[str]:
    """Every module that may be imported once ``start`` runs."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += known.get(name, ())
    return seen


def package(name: str) -> str:
    """The distribution-level package a module belongs to."""
    return name.partition(".")[0]


def heavy(start: str, known: Modules) -> set[str]:
    """Packages of the torch side that ``start`` may reach."""
    return {package(name) for name in reach(start, known)} & TORCH_SIDE


def storing(start: str, known: Modules) -> set[str]:
    """Modules that know stores, and that ``start`` may reach."""
    return reach(start, known) & (STORE_SIDE | {"boto3"})


def beyond_the_agreement(start: str, known: Modules) -> set[str]:
    """Modules of ``job`` that a launcher's module imports but may not."""
    allowed = AGREEMENT | ({"job.storage.store"} if start in READERS else set())
    ours = {name for name in known[start] if name in known and package(name) == "job"}
    return ours - allowed - {"job"}


def present(names: Iterable[str], known: Modules) -> list[str]:
    return sorted(set(names) & known.keys())


def fresh_python(code: str) -> str:
    """What a new interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


KNOWN = modules()


@pytest.mark.parametrize("name", present(SUPERVISOR | AGREEMENT, KNOWN))
def test_the_supervisor_and_the_agreement_never_reach_torch(name: str) -> None:
    assert heavy(name, KNOWN) == set()


@pytest.mark.parametrize("name", present(WORKER, KNOWN))
def test_the_worker_knows_no_store(name: str) -> None:
    assert storing(name, KNOWN) == set()


@pytest.mark.parametrize("name", [name for name in sorted(KNOWN) if package(name) in ("launcher", "tunejob", "main")])
def test_the_launcher_imports_only_the_agreement(name: str) -> None:
    assert beyond_the_agreement(name, KNOWN) == set()
    assert heavy(name, KNOWN) == set()


@pytest.mark.parametrize("name", [name for name in sorted(KNOWN) if package(name) == "job"])
def test_the_container_never_imports_the_launcher(name: str) -> None:
    assert not {package(other) for other in KNOWN[name]} & {"launcher", "tunejob", "main"}


ROOMS = {
    "storage": set[str](),
    "supervision": {"storage"},
    "data": {"storage", "training"},
    "sizing": {"training"},
    "training": {"data", "sizing", "evaluation"},
    "evaluation": {"data", "training"},
}
"""Package of ``job`` -> the others that it may import; all may import what lies beside them."""


def room(name: str) -> str:
    """The package of ``job`` that a module lies in; empty for what lies beside them."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 and parts[0] == "job" and parts[1] in ROOMS else ""


@pytest.mark.parametrize("name", [name for name in sorted(KNOWN) if room(name)])
def test_the_rooms_of_the_container_open_to_where_they_should(name: str) -> None:
    others = {room(other) for other in KNOWN[name] if other in KNOWN} - {"", room(name)}
    assert others <= ROOMS[room(name)]


@pytest.mark.parametrize("name", ONLY)
def test_each_outside_thing_has_one_door(name: str) -> None:
    users = {module for module, names in KNOWN.items() if name in {package(other) for other in names}}
    assert users <= ONLY[name]


@pytest.mark.parametrize(
    ("source", "rule", "caught"),
    [
        ("from job import middle", heavy, {"torch"}),
        ("import job.middle as m", heavy, {"torch"}),
        ("def f() -> None:\n    from job.middle import x", heavy, {"torch"}),
        ("if TYPE_CHECKING:\n    import job.middle", heavy, set()),
        ("from .storage import store", storing, {"job.storage.store"}),
        ("from job.middle import y", beyond_the_agreement, {"job.middle"}),
        ("from job.spec import JobSpec", beyond_the_agreement, set()),
    ],
)
def test_a_wrong_import_would_be_caught(
    source: str, rule: Callable[[str, Modules], set[str]], caught: set[str]
) -> None:
    known = {"job.middle": {"torch", "torch.nn"}, "job.storage.store": set[str](), "job.spec": set[str]()}
    known["start"] = imports(source, "job")
    assert rule("start", known) == caught


POSIX = {"fcntl", "pwd", "grp", "resource", "termios", "tty", "pty", "syslog", "posix", "readline"}


@pytest.mark.parametrize("name", [name for name in sorted(KNOWN) if package(name) in ("launcher", "tunejob", "main")])
def test_the_launcher_imports_nothing_that_only_posix_has(name: str) -> None:
    reached = {other for other in reach(name, KNOWN) if package(other) in ("launcher", "tunejob", "main")} | AGREEMENT
    assert not {package(other) for module in reached for other in KNOWN.get(module, ())} & POSIX


ELSEWHERE = """
import importlib, signal, subprocess, sys, tempfile, threading, concurrent.futures
import kubernetes, pydantic, tenacity, yaml  # other people's modules know Windows by its name

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name in {posix!r}:
            raise ModuleNotFoundError(name)

for name in {posix!r}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Lacking())
windows = ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN")
for name in dir(signal):
    if (name.startswith("SIG") and name.isupper() and name not in windows) or name in ("alarm", "pthread_sigmask"):
        delattr(signal, name)
for name in {ours!r}:
    importlib.import_module(name)
print("imported")
"""


def test_every_module_of_the_launcher_imports_where_there_is_no_posix() -> None:
    ours = sorted(name for name in KNOWN if package(name) in ("launcher", "tunejob"))
    assert fresh_python(ELSEWHERE.format(posix=sorted(POSIX - {"posix"}), ours=ours)) == "imported\n"


PURE = {"launcher.render", "launcher.profile", "launcher.pod", "launcher.bundle", "launcher.labels"}


@pytest.mark.parametrize("name", sorted(PURE & KNOWN.keys()))
def test_rendering_never_reaches_the_cluster_or_a_store(name: str) -> None:
    assert not reach(name, KNOWN) & {"launcher.cluster", "kubernetes", "boto3", "job.storage.store"}


def test_check_and_render_load_neither_client_nor_torch_nor_boto3() -> None:
    code = (
        "import sys, launcher.cli\n"
        "assert launcher.cli.main(['check', 'configs/gitops.yaml', '-p', 'configs/profiles/gpus.yaml']) == 0\n"
        "assert launcher.cli.main(['render', 'configs/gitops.yaml', '-p', 'configs/profiles/gpus.yaml']) == 0\n"
        "print('LOADED', *sys.modules)"
    )
    printed, loaded = fresh_python(code).split("LOADED")
    assert "kind: Job" in printed
    assert not set(loaded.split()) & (TORCH_SIDE | {"boto3", "kubernetes", "rich"})


@pytest.mark.parametrize("module", ["tunejob", "launcher.cli"])
def test_importing_the_doors_brings_nothing_heavy(module: str) -> None:
    loaded = set(fresh_python(f"import {module}, sys; print(*sys.modules)").split())
    assert not loaded & (TORCH_SIDE | {"boto3", "kubernetes", "rich", "pydantic", "yaml"})


def test_help_comes_without_anything_heavy() -> None:
    code = (
        "import sys, launcher.cli\n"
        "try:\n    launcher.cli.main(['--help'])\n"
        "except SystemExit:\n    print('LOADED', *sys.modules)"
    )
    printed, loaded = fresh_python(code).split("LOADED")
    assert "train-qlora" in printed
    assert not set(loaded.split()) & (TORCH_SIDE | {"boto3", "kubernetes", "rich", "pydantic", "yaml"})
