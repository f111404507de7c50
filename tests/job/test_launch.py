"""Children know nothing of the store, die with their group, and never outlive the supervisor (promise 11, T44)."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from job.supervision.launch import Child, _environment


def lines_of(code: str, environment: dict[str, str]) -> tuple[int | None, list[str]]:
    lines: list[str] = []
    child = Child([sys.executable, "-c", textwrap.dedent(code)], environment, lines.append)
    return child.wait(30), lines


def test_no_secret_of_store_or_hub_reaches_a_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SHARED_CREDENTIALS_FILE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "swordfish")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    code, lines = lines_of("import os; print(dict(os.environ))", _environment(tmp_path))
    assert code == 0
    said = "\n".join(lines)
    assert "swordfish" not in said
    assert "'NCCL_DEBUG': 'WARN'" in said
    assert "'HF_HUB_OFFLINE': '1'" in said


def test_a_module_in_the_working_directory_does_not_hide_a_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    code, lines = lines_of("import yaml; print(yaml.__version__)", _environment(tmp_path))
    assert code == 0, lines


def test_what_the_user_set_for_threads_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _environment(tmp_path)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert _environment(tmp_path)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_exit_codes_and_signals_come_back(tmp_path: Path) -> None:
    assert lines_of("raise SystemExit(65)", dict(os.environ))[0] == 65
    assert lines_of("import os; os.kill(os.getpid(), 9)", dict(os.environ))[0] == -9


def test_lines_that_libraries_cannot_be_talked_out_of_are_left_out() -> None:
    code, lines = lines_of(
        "print('Failed to load CPU gemm_4bit_forward from kernels-community: x'); print('kept')", dict(os.environ)
    )
    assert (code, lines) == (0, ["kept"])


# Whole lines at once: where Python does not buffer, `print` writes a line and its end one after the other.
STUBBORN = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen([sys.executable, "-c", "import os, signal, time; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(1, b'up\\n'); time.sleep(600)"])
    os.write(1, b"%d\\n" % grandchild.pid)
    time.sleep(600)
"""


def test_a_group_that_ignores_the_request_is_killed_with_its_children() -> None:
    lines: list[str] = []
    child = Child([sys.executable, "-c", textwrap.dedent(STUBBORN)], dict(os.environ), lines.append)
    deadline = time.monotonic() + 30
    while len(lines) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.end(0.2)
    grandchild = next(int(line) for line in lines if line.isdigit())
    while Path(f"/proc/{grandchild}/cmdline").exists() and Path(f"/proc/{grandchild}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_leaves_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    supervisor = """
        import os, sys, time
        from pathlib import Path
        from job.supervision.launch import Child, _environment
        code = "from job.child import setup_child; import os, time; setup_child(); "
        code += "print(os.getpid(), flush=True); time.sleep(600)"
        Child([sys.executable, "-c", code], _environment(Path(sys.argv[1])), lambda line: print(line, flush=True))
        time.sleep(600)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(supervisor), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
