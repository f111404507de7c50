"""The host waits for nothing inside a step, whichever kernel a run gets, and reads figures a step late."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from job.training import kernels
from job.training.attention import UnsupportedModel
from job.training.head import ChunkedHead
from job.training.kernels import Reference
from job.training.loop import Loop
from tests.job.made import CPU, made_spec
from tests.job.test_loop import loop_of
from tests.job.tiny import BASES

_WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
}
"""Operations for whose result the host waits: a number, or a shape that depends on values."""

_READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")
"""Ways of a tensor to the host; on the CPU not all of them are operations."""


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        boolean = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in _WAITS or boolean:
            self._found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    """What makes the host wait for the device inside the block: operations, and tensors that are read."""
    found: list[str] = []

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return method(tensor, *args, **kwargs)

        return read

    with pytest.MonkeyPatch.context() as patched, _Operations(found):
        for name in _READS:
            patched.setattr(Tensor, name, noted(name, getattr(Tensor, name)))
        yield found


def second_step(loop: Loop) -> list[str]:
    """What the host waits for in a second step, whose forerunner's figures are still to be read."""
    steps = loop.run(lambda: False, reads=lambda step: False)
    next(steps)  # the optimizer makes its states
    with waits() as found:
        loop._step(1, False)
    assert loop.progress.step == 2
    return found


LATE = ["tolist"]
"""The figures of the step before, which are read once the next one is on its way."""

FACTORIES = {"oneDNN": 0, "chunked head": 1, "own head": 2, "padded": 3}
TRAINING = {"batch_size": 4, "micro_batch_size": 1, "max_length": 40, "max_steps": 4}


def with_kernel(loop: Loop, kernel: str) -> Loop:
    """The loop with the kernel of a name, as ``kernels.choose`` would make it."""
    if kernel == "chosen":
        core = loop.model.get_base_model()
        loop.kernel = kernels.choose(core, loop.rows, [0, 1, 2], Reference(0, CPU.device), CPU).kernel
    elif kernel == "reference":
        loop.kernel = Reference(0, CPU.device)
    else:
        try:
            loop.kernel = kernels._factories[FACTORIES[kernel]](loop.model.get_base_model(), CPU.device, 0)
        except UnsupportedModel as error:
            pytest.skip(str(error))
    return loop


def micro_batches(loop: Loop) -> int:
    """Of the second step."""
    return len(loop._groups(1))


@pytest.mark.parametrize("kernel", ["chosen", "oneDNN", "chunked head", "own head"])
@pytest.mark.parametrize("base", BASES)
def test_the_host_waits_for_nothing_inside_a_step(base: str, kernel: str, request: pytest.FixtureRequest) -> None:
    loop = with_kernel(
        loop_of(request.getfixturevalue(base), made_spec(training=TRAINING, lora={"dropout": 0.1})), kernel
    )
    assert second_step(loop) == LATE
    assert micro_batches(loop) > 1


@pytest.mark.parametrize("kernel", ["chosen", "own head"])
def test_nor_where_activations_are_computed_again(tiny_llama: Path, kernel: str) -> None:
    training = TRAINING | {"gradient_checkpointing": True}
    loop = with_kernel(loop_of(tiny_llama, made_spec(training=training, lora={"dropout": 0.1})), kernel)
    assert second_step(loop) == LATE


@pytest.mark.parametrize("kernel", ["padded", "reference"])
@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gpt2"])
def test_on_padded_rows_transformers_asks_twice_a_micro_batch_whether_there_is_padding(
    base: str, kernel: str, request: pytest.FixtureRequest
) -> None:
    loop = with_kernel(loop_of(request.getfixturevalue(base), made_spec(training=TRAINING)), kernel)
    asked = ["__bool__", "aten._local_scalar_dense.default"] * 2 * micro_batches(loop)
    assert second_step(loop) == asked + LATE


def test_on_padded_rows_whose_scores_are_bounded_it_does_not(tmp_path: Path) -> None:
    """Gemma 2, which is always padded: eager attention has its mask in any case."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = AutoConfig.for_model("gemma2", **sizes, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loop = with_kernel(loop_of(tmp_path, made_spec(training=TRAINING)), "chosen")
    assert loop.kernel.padded
    assert second_step(loop) == LATE


def test_8_bit_adam_waits_once_a_step_to_know_whether_it_may(tiny_llama: Path) -> None:
    """bitsandbytes' optimizer has no gate on the device."""
    spec = made_spec(training=TRAINING | {"optimizer": "paged_adamw_8bit"})
    loop = with_kernel(loop_of(tiny_llama, spec), "chosen")
    assert second_step(loop) == ["__bool__", "aten._local_scalar_dense.default", *LATE]


def _in_the_head(patched: pytest.MonkeyPatch) -> None:
    """What a careless head would do: the sum as a number of the host's."""
    whole = ChunkedHead._loss_and_gradient

    def careless(head: ChunkedHead, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = whole(head, hidden, wanted)
        return torch.tensor(float(loss), dtype=torch.float64), gradient

    patched.setattr(ChunkedHead, "_loss_and_gradient", careless)


def _in_the_loop(patched: pytest.MonkeyPatch) -> None:
    """What a careless loop would do: look at the figures of the step under way."""
    whole = Loop._apply

    def careless(loop: Loop, *args: Any) -> Any:
        figures = whole(loop, *args)
        figures.numbers._values.tolist()
        return figures

    patched.setattr(Loop, "_apply", careless)


@pytest.mark.parametrize(("mistake", "name"), [(_in_the_head, "__float__"), (_in_the_loop, "tolist")])
def test_a_wait_in_what_runs_by_default_would_be_seen(
    tiny_llama: Path, mistake: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = with_kernel(loop_of(tiny_llama, made_spec(training=TRAINING)), "chosen")
    mistake(monkeypatch)
    assert Counter(second_step(loop))[name] > Counter(LATE)[name]


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values[values > 1].sum(),
        lambda values: values.sum().item(),
        lambda values: values.tolist(),
        lambda values: values.numpy(),
        lambda values: values.cpu(),
        lambda values: bool(values[0]),
        lambda values: int(values[0]),
        lambda values: float(values[0]),
        lambda values: [0, 1][values[0]],
        lambda values: values.nonzero(),
    ],
)
def test_the_measure_of_waiting_sees_every_way_to_the_host(read: Callable[[Tensor], Any]) -> None:
    values = torch.arange(4)
    with waits() as found:
        read(values)
    assert found
