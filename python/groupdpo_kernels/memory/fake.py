"""Runs operations on fake tensors, which have shapes and no memory, several times faster than torch does.

A step repeats itself: its layers, micro-batches and passes run the same operations on tensors of the same shapes. torch
runs each of them once, and `FakeRun` remembers whether the result was a new tensor, a view of an argument or the
argument itself, and makes the next one from that. torch remembers results too, but spends 0.35 ms on each that it
knows.

Floating tensors have no values, and a read gives 0. Small integer tensors have values, because code reads targets and
offsets. It needs an active FakeTensorMode and tensors of fixed shapes. Cost: some 0.1 ms an
operation, with the tracker and the model's own code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_MOST = 2**16  # results remembered, at 1 to 2 kB each
_CPU = torch.device("cpu")
_READ = torch.ops.aten._local_scalar_dense.default
# {an operation and its arguments: how FakeRun.made makes its result; None: real numbers do}
_known: dict[tuple[Any, ...], Any] = {}


class FakeRun:
    """Runs the operations of one FakeTensorMode."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}  # what torch gives each fake tensor of the mode

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation, as a TorchDispatchMode is given one."""
        parts: list[Any] = [func]
        tensors: list[Tensor] = []
        key = None
        if _describe(args, parts, tensors) and _describe(kwargs.items(), parts, tensors):
            key = tuple(parts)
        else:
            tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        if not any(isinstance(x, FakeTensor) for x in tensors):
            return _run_real(func, args, kwargs, tensors, key)
        if func is _READ:
            return False if tensors[0].dtype == torch.bool else 0.0
        if key in _known:
            return self.made(_known[key], tensors)
        before = [_layout(x) for x in tensors]
        out = func(*args, **kwargs)
        if key is not None and before == [_layout(x) for x in tensors]:
            recipe = _recipe_of(func, out, tensors)
            if recipe is not None:
                _remember(key, recipe)
        return out

    def made(self, recipe: Any, tensors: list[Tensor]) -> Any:
        """The result that a recipe describes.

        A recipe is () for None, (type, recipes) for a list or a tuple, (i,) for the argument `tensors[i]`, and
        (i, shape, stride, dtype, offset) for a view of that argument or, where i is -1, for a new tensor.
        """
        if not recipe:
            return None
        if len(recipe) == 2:
            kind, recipes = recipe
            return kind([self.made(x, tensors) for x in recipes])
        if len(recipe) == 1:
            return tensors[recipe[0]]
        i, shape, stride, dtype, offset = recipe
        with torch._C._DisableTorchDispatch():
            if i < 0:
                bare = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                bare = torch.empty(0, dtype=dtype, device="meta")
                bare.set_(tensors[i].untyped_storage(), offset, shape, stride)
        if not self.attributes:
            mode = next(x.fake_mode for x in tensors if type(x) is FakeTensor)
            self.attributes = {**vars(FakeTensor(mode, bare, _CPU))}
        # As FakeTensor's constructor does, which takes half of the time of a step for attributes that are all the same.
        out = Tensor._make_subclass(FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=_CPU)
        vars(out).update(self.attributes)
        return out


def _run_real(func: Any, args: Any, kwargs: Any, tensors: list[Tensor], key: Any) -> Any:
    """Runs an operation without a fake argument: on real numbers, unless its result is large or floating."""
    reads = func in (_READ, torch.ops.aten.nonzero.default)
    if not (reads or func._schema.is_mutable or key in _known):
        made = func(*args, **kwargs)
        # Masks of (L, L) are not read, and large ones would take the time that fake tensors save.
        if any(x.numel() > 2**22 or (x.is_floating_point() and not tensors) for x in tensors_in((made,))):
            return made
        if key is not None:
            _remember(key, None)
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _remember(key: tuple[Any, ...], recipe: Any) -> None:
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = recipe


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.untyped_storage()._cdata


def _describe(values: Iterable[Any], parts: list[Any], tensors: list[Tensor]) -> bool:
    """Adds to `parts` all that a result's shape may depend on, and to `tensors` the tensors. False: it is not known.

    Types are added too: 1, 1.0 and True are equal, and give results of different dtypes.
    """
    for x in values:
        kind = type(x)
        parts.append(kind)
        if kind is FakeTensor:
            if x.constant is not None:
                return False
            tensors.append(x)
            parts += (x.shape, x.stride(), x.storage_offset(), x.dtype, x.fake_device)
        elif kind in _PLAIN:
            parts.append(x if x == x else "nan")  # which is not equal to itself
        elif kind is tuple or kind is list:
            parts.append(len(x))
            if not _describe(x, parts, tensors):
                return False
        elif kind is Tensor and x.layout is torch.strided:
            tensors.append(x)
            parts += (x.shape, x.stride(), x.storage_offset(), x.dtype, x.device)
        else:
            return False
    return True


def _recipe_of(func: Any, out: Any, tensors: list[Tensor]) -> Any:
    """How to make such a result again, as FakeRun.made reads it, or None where that is not known."""
    if out is None:
        return ()
    if isinstance(out, (tuple, list)):
        found = [_recipe_of(func, x, tensors) for x in out]
        storages = [x.untyped_storage()._cdata for x in out if x is not None]
        return None if None in found or len(storages) > len({*storages}) else (type(out), found)
    real = not all(isinstance(x, FakeTensor) for x in tensors)
    if type(out) is not FakeTensor or out.constant is not None or out.fake_device != _CPU:
        return None
    if real and (func.is_view or func._schema.is_mutable):  # torch makes the real argument fake, and returns that
        return None
    same = [i for i, x in enumerate(tensors) if x is out]
    if same:
        return (same[0],)
    layout = out.shape, out.stride(), out.dtype, out.storage_offset()
    storage = out.untyped_storage()
    viewed = [i for i, x in enumerate(tensors) if x.untyped_storage()._cdata == storage._cdata]
    if viewed:
        return (viewed[0], *layout)
    with torch._C._DisableTorchDispatch():
        alike = torch.empty_strided(*layout[:2], dtype=out.dtype, device="meta")
    if storage.nbytes() != alike.untyped_storage().nbytes():
        return None
    return (-1, *layout)


def tensors_in(values: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among the arguments or the results of an op, whose only containers are lists and tuples."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_in(x)


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Gives a model on the device meta fake CPU tensors for its parameters and buffers, in place, and returns it."""
    made: dict[int, Tensor] = {}  # by id, so that tied weights stay tied
    with mode:
        for module in model.modules():
            owned: list[dict[str, Any]] = [module._parameters, module._buffers]
            for own in owned:
                for name, x in own.items():
                    if x is None:
                        continue
                    if id(x) not in made:
                        empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
                        made[id(x)] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
                    own[name] = made[id(x)]
    return model
