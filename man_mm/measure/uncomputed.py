"""Training steps whose tensors have shapes but no values: in seconds, in no memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .cuda_operators import cuda_operators

_ATEN = torch.ops.aten
# Their work grows faster than their tensors do.
_PRODUCTS = {
    getattr(_ATEN, name)
    for name in (
        'convolution',
        'convolution_backward',
        'mm',
        'addmm',
        'bmm',
        'baddbmm',
        '_scaled_dot_product_flash_attention_for_cpu',
        '_scaled_dot_product_flash_attention_for_cpu_backward',
    )
}
_FILLED_WITH_ZEROS = {_ATEN.empty, _ATEN.empty_strided, _ATEN.zeros}
# Elements from which on an op is skipped. What decides on shapes, such as proposals and
# costs of matches, is smaller, and gets values.
_LARGE = 2**16
_NEEDS_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
# Linux maps such pages when they are written, and reads zeros before.
_LAZILY = dict(
    flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, 'MAP_NORESERVE', 0x4000)
)


class Uncomputed(TorchDispatchMode):
    """Leaves out what takes time and memory, and keeps every shape.

    A context for building a model and for running its training steps on the CPU. The
    steps make the same tensors in the same order, so that `measure_memory` inside of it
    sees what it sees in a real step. But

    - large tensors are zeros that no memory backs until someone writes to them;
    - products, and large ops, are skipped if what they read depends on random numbers,
      as weights do: a meta kernel tells the shapes of what they return.

    Small ops run. So do ops on images, targets and anchors, and those without a meta
    kernel or with shapes that depend on values: assigners and samplers decide on
    what is real, and on predictions that are zero.

    Args:
        device: ``'cuda'`` for the bytes of mmcv's operators on a GPU, where they save
            less than on a CPU. Defaults to ``'cpu'``.

    Attributes:
        flops: What `count_flops` would have counted so far.

    Examples:
        >>> import torch
        >>> from man_mm.measure import Uncomputed, measure_memory
        >>> with Uncomputed():
        ...     layer = torch.nn.Linear(2**16, 2**16)  # 16 GiB, as its batch
        ...     x = torch.zeros(2**16, 2**16)
        ...     report = measure_memory(lambda: layer(x).sum().backward())
        >>> report.peak // 2**30
        16
    """

    def __init__(self, device: str = 'cpu') -> None:
        super().__init__()
        self.flops = 0
        self._known: dict[tuple, object] = {}  # what ops return, by what they take
        self._device, self._operators = device, ExitStack()

    def __enter__(self) -> Uncomputed:
        if self._device == 'cuda':
            self._operators.enter_context(cuda_operators())
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._operators.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not inputs:
            out = _made(func, args, kwargs, random)
        elif not random and not any(map(_is_blank, inputs)):
            return func(*args, **kwargs)
        else:
            written = _written(func, args, kwargs)
            out = NotImplemented
            if _is_skipped(func, inputs):
                out = self._skipped(func, args, kwargs, written)
            _mark(written)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        if inputs or random:
            _mark(_tensors(out))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        return out

    def _skipped(self, func, args, kwargs, written: list[Tensor]) -> object:
        """What an op would return, without its values; NotImplemented if unknown."""
        returns = func._schema.returns
        if written and all(r.alias_info for r in returns):
            changed = written[0] if len(returns) == 1 else tuple(written)
            return changed if returns else None
        key = (func, _signature(args), _signature(kwargs))
        if key not in self._known:
            self._known[key] = _run_on_meta(func, args, kwargs)
        return _mapped(_zeros_like, self._known[key])


def _run_on_meta(func, args, kwargs) -> object:
    metas = []

    def meta(x: Tensor) -> Tensor:
        metas.append(
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device='meta')
        )
        return metas[-1]

    args, kwargs = _mapped(meta, args), _mapped(meta, kwargs)
    if 'device' in kwargs:
        kwargs['device'] = torch.device('meta')
    try:
        out = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        return NotImplemented
    taken = {x.untyped_storage()._cdata for x in metas}
    if any(x.untyped_storage()._cdata in taken for x in _tensors(out)):
        return NotImplemented  # a view after all, such as _unsafe_view
    return out


def _made(func, args, kwargs, random: bool) -> object:
    """What an op that reads no tensor makes, if it is large and without values."""
    if not random and func.overloadpacket not in _FILLED_WITH_ZEROS:
        return NotImplemented
    meta = func(*args, **{**kwargs, 'device': torch.device('meta')})
    if not isinstance(meta, Tensor) or meta.numel() <= _LARGE:
        return NotImplemented
    return _zeros_like(meta)


def _is_skipped(func, inputs: Sequence[Tensor]) -> bool:
    if _NEEDS_VALUES.intersection(func.tags):
        return False
    # Views share memory, whatever their size.
    if any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
        return False
    if func.overloadpacket in _PRODUCTS:
        return True
    return any(x.numel() > _LARGE for x in inputs)


def _written(func, args, kwargs) -> list[Tensor]:
    """The tensors that an op changes."""
    values = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            by_place = not argument.kwarg_only and index < len(args)
            values.append(args[index] if by_place else kwargs.get(argument.name))
    return list(_tensors(values))


def _zeros_like(meta: Tensor) -> Tensor:
    """Zeros that take no memory until they are written, if they are large."""
    strides = zip(meta.size(), meta.stride(), strict=True)
    count = 1 + sum((n - 1) * step for n, step in strides) if meta.numel() else 0
    if count > _LARGE:
        memory = mmap.mmap(-1, count * meta.dtype.itemsize, **_LAZILY)
        flat = torch.frombuffer(memory, dtype=meta.dtype)
    else:
        flat = torch.zeros(count, dtype=meta.dtype)
    return flat.as_strided(meta.size(), meta.stride())


def _mark(tensors: Iterable[Tensor]) -> None:
    """Marks tensors whose values mean nothing."""
    for tensor in tensors:
        # PyTorch keeps the Python object as long as the storage.
        tensor.untyped_storage().is_blank = True


def _is_blank(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), 'is_blank', False)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _mapped(fn: Callable[[Tensor], Tensor], value: object) -> object:
    """A value with ``fn`` called on its tensors."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(fn, item) for item in value])
    if isinstance(value, dict):
        return {key: _mapped(fn, item) for key, item in value.items()}
    return value


def _signature(value: object) -> object:
    """What an op's result depends on, beside values of tensors."""
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in value.items())
    return type(value), value  # 2 and 2.0 give other dtypes
