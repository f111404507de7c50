"""How a worker leaves when its GPU is lost, full, or was given an index out of range."""

from pathlib import Path

import pytest

from tests.gpu.conftest import in_process

WORK = """
from pathlib import Path
import sys
import torch
from job.training.failures import as_torch_failure
from job.outcome import record

def body():
    torch.ones(4, device="cuda").cpu()
    raise SystemExit("the fault did not show")

sys.exit(record(Path(OUTCOME), body, as_torch_failure))
"""


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ({"FAKE_FAULT": "719"}, 82, "a launch failure"),
        ({"FAKE_FAULT": "214"}, 82, "an ECC error"),
        ({"FAKE_FAULT": "999"}, 82, "an unknown error"),
        ({"FAKE_OOM": "1"}, 83, "lower training.micro_batch_size"),
        ({"FAKE_FAULT": "710"}, 1, ""),
        ({"FAKE_FAULT": "700"}, 1, ""),
    ],
    ids=["launch failure", "ECC", "unknown", "out of memory", "index assert", "illegal address"],
)
def test_a_fault_has_the_code_that_says_whose_it_is(
    fault: dict[str, str], code: int, words: str, tmp_path: Path
) -> None:  # T30
    outcome = tmp_path / "outcome.json"
    done = in_process(WORK.replace("OUTCOME", repr(str(outcome))), **fault)
    assert done.returncode == code, done.stderr[-2000:]
    assert words in outcome.read_text(encoding="utf-8")
