"""A base that the ranks share (FSDP2): every rank holds a part of each layer and gathers the rest while it computes.

Only frozen weights are cut up. The adapter lies whole on every rank and its gradients are summed by the loop as for a
replicated base, so that optimizer, checkpoint and published adapter know nothing of it. Embeddings tied to the head,
the head itself and the last norm stay whole too: the chunked loss reads the head outside of any forward.

Gathering is a collective: ranks have to run the same number of forward and backward passes (``idle_passes``).
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from job.errors import SpecInvalid
from job.spec import JobSpec
from job.training.device import Placement
from job.training.order import share

log = logging.getLogger(__name__)


def shards(spec: JobSpec, placement: Placement) -> bool:
    """Whether the base is to be shared; says so where the spec asks for it in vain, or where nobody has tried it."""
    if spec.training.parallelism != "shard":
        return False
    if placement.world == 1:
        log.info("training.parallelism: shard has nothing to share with on one rank; the base is held whole")
        return False
    if spec.method == "qlora" and placement.device.type == "cuda" and placement.rank == 0:
        log.warning("training.parallelism: shard with method: qlora is untested on a GPU; it was trained on CPUs only")
    return True


def loading_place(spec: JobSpec, placement: Placement) -> Placement:
    """Where the base is read before it is shared: in main memory, for the device has no room for the whole of it."""
    wanted = spec.training.parallelism == "shard" and placement.world > 1
    return replace(placement, device=torch.device("cpu")) if wanted else placement


def verifying_place(spec: JobSpec, placement: Placement) -> Placement:
    """Where the one process that verifies the adapter reads the base: no device has room for one that is shared."""
    return replace(placement, device=torch.device("cpu")) if spec.training.parallelism == "shard" else placement


def shard(core: nn.Module, placement: Placement) -> None:
    """Shares a causal language model's frozen layers out over all ranks and moves the rest to the device.

    Call it once the adapter is in place and before the optimizer is made. Layer after layer passes through the device,
    so that it never holds more than its share and one layer.

    Raises:
        SpecInvalid: the model has no list of layers to share.
    """
    backbone: nn.Module = core.base_model  # type: ignore[assignment]
    layers = _layers(backbone)
    if not layers:
        raise SpecInvalid(
            f"training.parallelism: shard needs a model made of a list of layers, and {type(backbone).__name__} is "
            "none; use replicate"
        )
    mesh = init_device_mesh(placement.device.type, (placement.world,))
    whole = {parameter for parameter in core.parameters() if parameter.requires_grad}
    for part in [*layers, *_loose_embedding(core)]:
        # Without the flag the root would keep what it gathered from forward to backward.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(backbone, mesh=mesh, reshard_after_forward=True, ignored_params=_unshared(core))
    for parameter in _unshared(core):
        parameter.data = parameter.data.to(placement.device)
    for module in core.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(placement.device)
    if placement.rank == 0:
        log.info("the base is shared by %d ranks: %d layers, %s", placement.world, len(layers), _held(core))


def _layers(backbone: nn.Module) -> list[nn.Module]:
    """The decoder layers: the entries of the outermost lists of modules."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    return [layer for layers in lists.values() for layer in layers]


def _loose_embedding(core: nn.Module) -> list[nn.Module]:
    """The input embedding if it is frozen, plain and not tied to the head."""
    embedding, head = core.get_input_embeddings(), core.get_output_embeddings()  # type: ignore[operator]
    if type(embedding) is not nn.Embedding or embedding.weight.requires_grad:
        return []
    return [] if head is not None and embedding.weight is getattr(head, "weight", None) else [embedding]


def _unshared(core: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in core.parameters() if not isinstance(parameter, DTensor)}


def _held(core: nn.Module) -> str:
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in core.parameters())
    return f"{local:,} of {sum(p.numel() for p in core.parameters()):,} weights here"


def is_shared(core: nn.Module) -> bool:
    """Whether ``shard`` was called on the model."""
    return isinstance(core.base_model, FSDPModule)


def idle_passes(groups: Sequence[list[int]], lengths: Sequence[int], rank: int, world: int) -> int:
    """Passes a rank has to run besides its own of a step, with a weight of 0, so that no other waits for it in vain.

    Args:
        groups, lengths: the step's micro-batches, as ``job.training.order.share`` deals them out.
    """
    passes = [len(share(groups, lengths, one, world)) for one in range(world)]
    return max(passes) - passes[rank]
