"""Models of any size on a GPU that is not there: torch checks shapes and devices, nothing is computed or held."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from job.spec import JobSpec
from job.training.adapter import add_adapter
from job.training.device import Placement
from job.training.kernels import PaddingFree, chunked_head
from job.training.loop import Loop, make_optimizer
from job.training.order import Order
from job.training.sharded import shard, shards
from tests.job.made import made_rows, made_spec

"""Llama 3.1 8B, as its config.json has it."""


def gpu_spec(**sections: Any) -> JobSpec:
    """A spec that asks for a GPU."""
    return made_spec(resources={"gpus": 1}, **sections)


def loop_on_gpu(spec: JobSpec, sizes: dict[str, Any], mode: FakeTensorMode, world: int = 1) -> Loop:
    """The worker's loop with every tensor on the fake GPU; rows fill the token budget twice a step on each rank."""
    place = gpu(world)
    base = base_without_weights(spec, sizes)
    with torch.device("meta"):
        model = add_adapter(base, spec, place)
    core: Any = model.get_base_model()
    head = chunked_head(core)
    to_gpu(model, mode)
    training = spec.training
    rows = made_rows([training.max_length] * 2 * training.batch_size, 1000)
    if shards(spec, place):  # outside of the mode, which would fake the mesh of ranks too
        shard(core, place)
    with inside(mode):
        optimizer = make_optimizer(model, training)
        order = Order(rows.sources, [1.0], training, "digest")
        kernel = PaddingFree(place.device, replace(head, weight=core.get_output_embeddings().weight))
        loop = Loop(model, optimizer, rows, order, training, kernel, place)
    loop.model.train()
    return loop


def step(loop: Loop, number: int) -> None:
    """One step; the figures of the one before are not read, for fake tensors have no values."""
    loop._unread = None
    with loop.kernel.installed(loop.model.get_base_model()):
        loop._step(number, False)


def gpu(world: int = 1, precision: torch.dtype = torch.bfloat16) -> Placement:
    """The fake GPU as a rank's place."""
    return Placement(torch.device("cuda", 0), precision, rank=0, world=world)


def base_without_weights(spec: JobSpec, sizes: dict[str, Any]) -> nn.Module:
    """A Llama on the meta device as ``load_base`` gives it; linear layers are bitsandbytes' if the spec quantises."""
    config = LlamaConfig(**sizes)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if spec.quantized is not None:
        _quantise(base, spec.quantized.double_quant)
    base.requires_grad_(False)
    base.config.use_cache = False
    return base  # type: ignore[no-any-return]


def _quantise(base: nn.Module, double: bool) -> None:
    """Puts 4-bit layers in the place of all linear ones but the head: one of each shape is really quantised."""
    import bitsandbytes as bnb

    made: dict[tuple[int, int], Any] = {}
    for name, module in list(base.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        shape = (module.in_features, module.out_features)
        if shape not in made:
            layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.bfloat16, compress_statistics=double)
            layer.weight = bnb.nn.Params4bit(
                torch.zeros(shape[1], shape[0], dtype=torch.bfloat16),
                requires_grad=False,
                compress_statistics=double,
                quant_type="nf4",
                module=layer,
            )
            made[shape] = layer.to("cpu")
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, _twin(made[shape]))
    base.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks for it


def _twin(layer: Any) -> Any:
    """Another layer with the same packed weights, and a state of its own."""
    import bitsandbytes as bnb

    twin = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=torch.bfloat16, device="meta")
    twin.in_features, twin.out_features = layer.in_features, layer.out_features
    twin.weight, twin.quant_state = layer.weight, layer.weight.quant_state
    return twin


def to_gpu(model: nn.Module, mode: FakeTensorMode) -> list[Tensor]:
    """Replaces every parameter, buffer and quantisation state by a fake twin on the GPU; ties are kept.

    Returns:
        The twins.
    """
    twins: dict[int, Tensor] = {}
    everything: list[Tensor] = []

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda:0")
        everything.append(twin)
        return twin

    originals: list[Tensor] = []  # kept, so that no id is given out twice
    for module in model.modules():
        for tensors, wrap in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in list(tensors.items()):
                if tensor is None:
                    continue
                if hasattr(tensor, "quant_state"):  # shared by layers on the CPU, each layer's own on the GPU
                    module.quant_state = _state(tensor.quant_state, fake)
                    tensors[name] = _packed(fake(tensor), module.quant_state)
                    continue
                if id(tensor) not in twins:
                    originals.append(tensor)
                    twin = fake(tensor)
                    twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if wrap else twin
                tensors[name] = twins[id(tensor)]
    return everything


def _packed(data: Tensor, state: Any) -> nn.Parameter:
    weight: Any = nn.Parameter(data, requires_grad=False)
    weight.quant_state, weight.bnb_quantized = state, True
    return weight  # type: ignore[no-any-return]


def _state(state: Any, fake: Callable[[Tensor], Tensor]) -> Any:
    """A quantisation state with fake tensors."""
    twin = copy.copy(state)
    for name in ("absmax", "code", "offset"):
        if isinstance(getattr(state, name, None), Tensor):
            setattr(twin, name, fake(getattr(state, name)))
    if getattr(state, "state2", None) is not None:
        twin.state2 = _state(state.state2, fake)
    return twin


class _Moment:
    """Stands in for an event: fake tensors have nothing to wait for."""

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextmanager
def inside(mode: FakeTensorMode) -> Iterator[None]:
    """The mode, without what fake tensors have not: page-locked memory and events."""
    with pytest.MonkeyPatch.context() as patched, mode:
        patched.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        patched.setattr(torch.cuda, "Event", _Moment)
        yield
