"""FSDP2's wiring on eight ranks that are not there: what one holds of a large base, and that its step goes through."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from job.sizing.estimate import estimate
from job.sizing.shapes import shapes_of
from tests.gpu.fake import gpu_spec, inside, loop_on_gpu, step
from tests.job.live import Live
from tests.job.made import LLAMA_8B
from tests.job.test_estimate import tensors_of

RANKS = 8
SIZES = LLAMA_8B | {"num_hidden_layers": 4}


@pytest.fixture
def ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("ranks")
def test_a_rank_holds_its_share_and_its_step_goes_through() -> None:
    training = {"batch_size": 32, "micro_batch_size": 2, "max_length": 1024, "max_steps": 3, "parallelism": "shard"}
    spec = gpu_spec(training=training)
    spec = spec.model_copy(update={"resources": spec.resources.model_copy(update={"gpus": RANKS})})
    mode = FakeTensorMode()
    loop = loop_on_gpu(spec, SIZES, mode, world=RANKS)
    with inside(mode):
        step(loop, 0)
        with Live("cuda", tensors_of(loop), resized=True) as live:
            step(loop, 1)
    assert loop.progress.step == 2
    layers = [p for name, p in loop.model.named_parameters() if ".layers." in name and not p.requires_grad]
    held = sum(parameter.to_local().numel() for parameter in layers)  # type: ignore[attr-defined]
    assert held == sum(parameter.numel() for parameter in layers) / RANKS
    found = estimate(shapes_of(SIZES), spec)
    print(f"\n{live.peak / 2**30:.2f} GiB of tensors, {found.tensors / 2**30:.2f} estimated")
    assert found.tensors == pytest.approx(live.peak, rel=0.15)
