"""The worker's own step on a GPU that is not there, at the sizes of Llama 3.1 8B: devices, waits, sizes, memory."""

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from job.sizing.estimate import estimate
from job.sizing.shapes import shapes_of
from tests.gpu.fake import gpu_spec, inside, loop_on_gpu, step
from tests.job.live import Live
from tests.job.made import LLAMA_8B
from tests.job.test_estimate import tensors_of

TRAINING = {"batch_size": 4, "micro_batch_size": 2, "max_length": 1536, "max_steps": 3}
TOKENS = 2 * 1536
VARLEN = "torch_attn._varlen_attn.default"


@pytest.fixture(scope="module", params=["lora", "qlora"])
def seen(request: pytest.FixtureRequest) -> tuple[Live, Any, Any]:
    """A second step, watched: its tensors, its spec and its loop."""
    spec = gpu_spec(method=request.param, lora={"r": 16, "dropout": 0.0}, training=TRAINING)
    mode = FakeTensorMode()
    loop = loop_on_gpu(spec, LLAMA_8B, mode)
    with inside(mode):
        step(loop, 0)
        # A number read off the device, or a tensor of another device, ends this in an exception of torch's.
        with Live("cuda", tensors_of(loop)) as live:
            step(loop, 1)
    return live, spec, loop


def test_a_step_waits_for_nothing_and_mixes_no_devices(seen: tuple[Live, Any, Any]) -> None:
    live, _, loop = seen
    assert loop.progress.step == 2
    assert {parameter.device.type for parameter in loop.model.parameters()} == {"cuda"}
    assert not any("_local_scalar_dense" in name or "nonzero" in name for name, _, _ in live.largest)


def test_the_estimate_is_what_a_step_holds_on_a_gpu(seen: tuple[Live, Any, Any]) -> None:
    live, spec, _ = seen
    found = estimate(shapes_of(LLAMA_8B), spec)
    print(f"\n{spec.method}: {live.peak / 2**30:.2f} GiB of tensors, {found.tensors / 2**30:.2f} estimated")
    assert found.tensors == pytest.approx(live.peak, rel=0.15)


def test_nothing_of_trained_tokens_times_vocabulary_is_ever_made(seen: tuple[Live, Any, Any]) -> None:
    live, _, loop = seen
    vocabulary, width = LLAMA_8B["vocab_size"], LLAMA_8B["hidden_size"]
    tall = [
        (name, shape)
        for name, shape, _ in live.largest
        if vocabulary in shape
        and width not in shape
        and max(n for n in shape if n != vocabulary) > loop.kernel.head.rows
    ]
    assert tall == []
    assert max(shape[0] for _, shape, _ in live.largest if shape[-1:] == (vocabulary,) and len(shape) == 2) <= width


def test_attention_is_the_kernel_for_rows_of_many_lengths_and_is_computed_again(seen: tuple[Live, Any, Any]) -> None:
    live, _, _ = seen
    assert live.calls[VARLEN] == 2 * 2 * LLAMA_8B["num_hidden_layers"]  # two micro-batches, and each twice
    assert not any("scaled_dot_product" in name for name in live.calls)


def test_waits_and_foreign_devices_would_be_seen() -> None:
    with FakeTensorMode():
        there = torch.ones(2, device="cuda")
        with pytest.raises(DataDependentOutputException):
            there.sum().item()
        with pytest.raises(Exception, match=r"(?i)device"):
            there + torch.ones(2)
