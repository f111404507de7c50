"""Only with torch's CUDA build and the stub libraries: ``make test-gpu-fake``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of this folder, and skips it where there is no GPU, not even a fake one."""
    fake = "libfakecudart" in os.environ.get("LD_PRELOAD", "")
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu_fake)
        if not fake or torch.version.cuda is None:
            item.add_marker(pytest.mark.skip(reason="no fake GPU: make test-gpu-fake makes one"))


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process with a fake GPU of its own: what it is like is settled when torch starts."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
