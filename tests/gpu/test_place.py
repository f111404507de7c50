"""Which precision and attention a GPU gets by its compute capability, and which rank gets which GPU."""

import pytest

from tests.gpu.conftest import in_process

PLACE = """
import torch
from job.training.attention import _has_varlen
from job.training.device import place
from job.errors import JobError
from tests.job.made import made_spec
try:
    here = place(made_spec(resources={"gpus": 1}, training={"precision": PRECISION}))
    query = torch.empty(1, 4, 8, 64, dtype=here.precision, device=here.device)
    print(here.device, here.precision_name, here.scales_loss, _has_varlen(query, 0.0))
except JobError as error:
    print(int(error.exit_code), error)
"""


def placed(precision: str = "auto", **environment: str) -> str:
    done = in_process(PLACE.replace("PRECISION", repr(precision)), **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ("75", "cuda:0 float16 True False"),
        ("80", "cuda:0 bfloat16 False True"),
        ("90", "cuda:0 bfloat16 False True"),
    ],
)
def test_precision_and_attention_are_what_the_gpu_does_well(capability: str, expected: str) -> None:  # T34
    assert placed(FAKE_CC=capability) == expected


def test_a_gpu_that_this_torch_has_no_code_for_is_refused_by_name() -> None:
    said = placed(FAKE_CC="70")
    assert said.startswith("82 Fake has compute capability 7.0; torch ")
    assert "another GPU" in said


def test_bfloat16_on_a_gpu_that_only_emulates_it_is_refused() -> None:  # T34
    assert placed("bfloat16", FAKE_CC="75").startswith("78 training.precision: this GPU has no bfloat16")


def test_every_rank_has_its_own_gpu() -> None:
    assert placed(FAKE_GPUS="8", RANK="11", WORLD_SIZE="16", LOCAL_RANK="3").startswith("cuda:3 ")
