"""A device without hardware, for tests of what fails on a GPU: tensors that lie elsewhere, hold real numbers, and don't mix with the processor's.

Every operation is computed on the processor by torch's own kernels. As on a GPU, ``.numpy()`` of such a tensor is refused, and so is an operation
on tensors of two devices, but for what CUDA allows: scalars of no dimension, copies, and indices that lie on the processor.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "meta"  # the name that autograd treats as the processor, and nothing computes on
_MAY_MIX = {"copy_", "_to_copy", "_local_scalar_dense", "set_", "_has_compatible_shallow_copy_type"}
_INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}


class Elsewhere(torch.Tensor):
    """A tensor on the other device; ``.here`` are its numbers."""

    @staticmethod
    def __new__(cls, here):
        options = {"strides": here.stride(), "storage_offset": here.storage_offset()} if here.layout is torch.strided else {}
        made = torch.Tensor._make_wrapper_subclass(cls, here.size(), dtype=here.dtype, layout=here.layout, device=DEVICE, **options)
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self):
        return f"Elsewhere({self.here!r})"

    def __deepcopy__(self, memo):
        return (
            torch.nn.Parameter(Elsewhere(self.here.clone()), self.requires_grad) if isinstance(self, torch.nn.Parameter) else self.clone()
        )

    def tolist(self):
        return self.here.tolist()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("can't convert a tensor of another device to numpy. Use Tensor.cpu() first.")
        return self.here.detach().numpy()


class _AsElsewhere(TorchFunctionMode):
    """What such a tensor can't do by itself: hold the numbers of a list, and change its shape in place, as products with a vector do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            return args[0][torch.tensor(args[1])]
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE) if not isinstance(args[0], Elsewhere) else func(*args, **kwargs)
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            a, b = args
            if a.dim() == 1 and b.dim() == 2:
                return (a[None] @ b)[0]
            if b.dim() == 1 and a.dim() == 2:
                return (a @ b[:, None])[:, 0]
        return func(*args, **kwargs)


class OtherDevice(TorchDispatchMode):
    """While it is entered, ``device="meta"`` makes such tensors, which inference mode, autocast and fused optimisers don't know."""

    def __enter__(self):
        self._of_torch = autocast, _, enabled = torch.autocast, torch.inference_mode, torch.is_autocast_enabled
        torch.inference_mode, self._functions = torch.no_grad, _AsElsewhere()
        torch.is_autocast_enabled = lambda *kind: kind != (DEVICE,) and enabled(*kind)
        self._functions.__enter__()
        self._adam = torch.optim.Adam
        torch.optim.Adam = lambda *groups, **options: self._adam(*groups, **options | {"fused": False})
        self._submit, ThreadPoolExecutor.submit = ThreadPoolExecutor.submit, _at_once  # another thread would not know this device
        torch.autocast = lambda kind, *rest, **options: nullcontext() if kind == DEVICE else autocast(kind, *rest, **options)
        return super().__enter__()

    def __exit__(self, *error):
        torch.autocast, torch.inference_mode, torch.is_autocast_enabled = self._of_torch
        self._functions.__exit__(*error)
        torch.optim.Adam, ThreadPoolExecutor.submit = self._adam, self._submit
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def _at_once(_, function, *args):
    done = Future()
    try:
        done.set_result(function(*args))
    except Exception as error:
        done.set_exception(error)
    return done


def run(func, args, kwargs):
    name = func._schema.name.partition("::")[2]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [isinstance(x, Elsewhere) for x in tensors]
    if name in _INDEXED:
        wrong = any(there[1:]) and not there[0]
    else:
        wrong = name not in _MAY_MIX and any(there) and any(not away and x.dim() for away, x in zip(there, tensors, strict=True))
    if wrong:
        shapes = ", ".join(f"{[*x.shape]} {'elsewhere' if away else 'cpu'}" for away, x in zip(there, tensors, strict=True))
        raise RuntimeError(f"Expected all tensors to be on the same device: {name}({shapes})")
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    wrap = any(there) if asked is None else torch.device(asked).type == DEVICE
    if name == "copy_":
        wrap = there[0]
    plain_args, plain_kwargs = tree_map(lambda x: x.here if isinstance(x, Elsewhere) else x, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    written = [
        kwargs[argument.name] if argument.name in kwargs else args[i]
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write and (argument.name in kwargs or i < len(args))
    ]
    known = {id(x.here): x for x in tree_flatten(written)[0] if isinstance(x, Elsewhere)}
    return tree_map(lambda x: known.get(id(x), Elsewhere(x) if wrap else x) if isinstance(x, torch.Tensor) else x, result)
