"""Bytes of tensors that live at a time, by device: what an allocator would be asked for, fake tensors included."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Follows the storages of what operators return, inside the block; ``peak`` is the most at a time."""

    def __init__(self, device: str, known: Iterable[Tensor] = (), resized: bool = False) -> None:
        """
        Args:
            device: type of the device that counts.
            known: tensors made before the block.
            resized: storages change their size without any operator (FSDP2 gives back what it gathered that way).
        """
        super().__init__()
        self._device, self._resized = device, resized
        self._storages: dict[int, Any] = {}
        self._seen: dict[int, int] = {}
        self.now = self.peak = 0
        self.largest: dict[tuple[str, tuple[int, ...], torch.dtype], int] = defaultdict(int)
        """Bytes of the largest output, by operator, shape and type."""
        self.calls: Counter[str] = Counter()
        """How often each operator was called."""
        for tensor in known:
            self._take(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[str(func)] += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                key = (str(func), tuple(tensor.shape), tensor.dtype)
                if tensor.device.type == self._device:
                    self.largest[key] = max(self.largest[key], tensor.numel() * tensor.element_size())
                self._take(tensor)
        return out

    def _take(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):  # says how large the whole is; its part is met by itself
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        # A fake tensor's storage lies on the meta device.
        if tensor.device.type != self._device or storage._cdata in self._seen:
            return
        size, key = storage.nbytes(), storage._cdata
        self._seen[key] = size
        weakref.finalize(storage, self._give, key)
        self.now += size
        if self._resized:
            self._storages[key] = weakref.ref(storage)
            alive = (reference() for reference in self._storages.values())
            self.now = sum(one.nbytes() for one in alive if one is not None)
        self.peak = max(self.peak, self.now)

    def _give(self, key: int) -> None:
        self._storages.pop(key, None)
        self.now -= self._seen.pop(key)
