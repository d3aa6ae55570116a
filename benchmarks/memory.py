"""Memory held by tensors, as PyTorch's dispatcher sees it: the same on every machine."""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Within this context, counts the bytes of the tensors alive, and their peak.

    ``known`` tensors, such as a network's weights, do not count. What a kernel needs for itself is
    not seen; the peak of the whole process shows that it is little.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self.storages = {tensor.untyped_storage()._cdata for tensor in known}

    def _watch(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.storages.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key, size):
        self.storages.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf)
        return out
