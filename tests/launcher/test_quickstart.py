"""The quickstart keeps its promise: what no base model can do is learned in minutes."""

import subprocess
import sys
from pathlib import Path

import pytest

from job.files import read_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quickstart_learns_what_the_base_cannot_do(tmp_path: Path) -> None:
    if not (ROOT / "models" / "SmolLM2-135M-Instruct").is_dir():
        pytest.skip("no small model: make models/SmolLM2-135M-Instruct")
    command = [sys.executable, "main.py", "train", "configs/quickstart.yaml", "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    (folder,) = tmp_path.iterdir()
    evaluation = read_json(folder / "eval_results.json")["evaluation"]
    assert evaluation["base"]["exact_match"] <= 0.1
    assert evaluation["tuned"]["exact_match"] >= 0.8
