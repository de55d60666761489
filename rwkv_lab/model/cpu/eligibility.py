"""Whether a call of a model may take its compiled paths, for prefill and step alike, and if not, why.

Compiled code knows neither hooks nor adapters, computes no gradients, and reads weights where they are stored. So it
takes a call only where PyTorch's modules would compute the same. What decides:

* **The call**: the chosen backend, tracing, autocast, derivatives, modes that intercept operators, the tensors given.
  All of it may differ from call to call and costs little to look at, so every call looks at it.
* **The model**: its modules, their classes, options and hooks; its tensors, their dtypes, shapes and addresses. It is
  examined once and then again when it has changed. No change is announced: torch has hooks for some ways to replace
  a parameter, but none for `p.data = …`, `share_memory()`, a hook on one Linear, or an attribute. So every call
  compares the model with what was examined, in a few passes over C functions.

Memory comes first: every call compares the address and the size of each tensor's storage and holds the storages until
it is done, so that compiled code reads no memory that was resized or given back in between. The rest of the comparison
takes a third of a millisecond where a token's weights have just thrown everything else out of the caches: there a
second thread makes it while the token is computed, and where something has changed the call is made again
(`Eligibility.compare_meanwhile`).
"""

import logging
import operator
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rwkv_lab import torch_private
from rwkv_lab.errors import KernelError
from rwkv_lab.model.cpu import abi
from rwkv_lab.model.cpu.lazy_state import is_lazy
from rwkv_lab.model.cpu.model_faults import fault_of_modules, fault_of_tensors, refuse_tensors_without_values
from rwkv_lab.model.standard_modules import patched_class
from rwkv_lab.model.state import RWKVState
from rwkv_lab.wkv.choice import chosen_backend
from rwkv_lab.wkv.pointers import Span, span

log = logging.getLogger(__name__)

_PATHS = {"prefill": "Prefill", "step": "Decoding"}
# Attributes of modules that decide what they compute.
_OPTIONS = (
    "eps",
    "max_norm",
    "normalized_shape",
    "n_head",
    "head_size",
    "layer",
    "halves",
    "bits",
    "rows",
    "columns",
    "activations",
)

_address, _storage, _nbytes = torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.UntypedStorage.nbytes
_shape, _dtype, _requires_grad = (operator.attrgetter(x) for x in ("shape", "dtype", "requires_grad"))
_is_contiguous, _is_neg = torch.Tensor.is_contiguous, torch.Tensor.is_neg


class Permit(NamedTuple):
    """That a path may compute a call: what was found in the model, and its memory, which stays while this is held."""

    found: "Eligibility"
    storages: list


def eligible(model: Any, path: str, tokens: object = None, state: RWKVState | None = None) -> Permit | None:
    """What a path, "prefill" or "step", may read to compute this call; None where PyTorch computes it.

    The log has one line for each reason why it does.

    Raises:
        KernelError: the step cannot be compiled, and `use_backend("cpu")` demands it.
        ParameterError: a weight has no values: PyTorch would compute with whatever lies in memory.
    """
    if torch.compiler.is_compiling():
        return None  # nothing below is for tracing
    level = logging.INFO
    try:
        permit, why = _decide(model, path, tokens, state)
    except KernelError as error:
        if path == "step" and chosen_backend() == "cpu":
            raise
        permit, why, level = None, str(error).rstrip("."), logging.WARNING
    if permit is None and tokens is not None:
        refuse_tensors_without_values(model)
    if permit is None and (path, why) not in _told:
        _told.add((path, why))
        log.log(level, "%s runs through PyTorch: %s.", _PATHS[path], why)
    return permit


def fallback_reason(model: Any, path: str, tokens: object = None, state: RWKVState | None = None) -> str:
    """Why such a call runs through PyTorch and not through the path "prefill" or "step"; "" where it does not."""
    try:
        return _decide(model, path, tokens, state)[1]
    except KernelError as error:
        return str(error)


_told: set[tuple[str, str]] = set()  # (path, reason) that the log has


def _decide(model: Any, path: str, tokens, state) -> tuple[Permit | None, str]:
    """(What the path may read, ""), or (None, why not). Raises KernelError where only its compilation is wrong."""
    if why := _fault_of_call(tokens, state):
        return None, why
    found = _examined.get(model)
    meanwhile = path == "step" and found is not None and found.meanwhile
    storages = None if found is None or model.layout is not found.layout else found.memory()
    if found is None or storages is None or not (meanwhile or found.holds(model)):
        weight = getattr(model.ln_out, "weight", None)  # on a GPU that is all there is to examine
        if weight is not None and (weight.device.type != "cpu" or weight.dtype not in abi.DTYPES):
            return None, f"the model is in {weight.dtype} on {weight.device.type}"
        found = _examine(model)
        storages = found.memory()
    if not (meanwhile and found.meanwhile):
        if why := found.faults[path] or found.fault_of_moment(torch.is_grad_enabled()):
            return None, why
    if storages is None:
        return None, "another thread is changing the model"
    if path == "prefill":
        abi.prefill_library()
    else:
        found.step = abi.step_library().step
    return Permit(found, storages), ""


_examined: WeakKeyDictionary[nn.Module, "Eligibility"] = WeakKeyDictionary()


def _examine(model: Any) -> "Eligibility":
    found = Eligibility(model)
    if found.lasting:
        _examined[model] = found
    else:
        forget(model)
    return found


def forget(model: Any) -> None:
    """Let the next call examine the model again."""
    _examined.pop(model, None)


# ---------------------------------------------------------------------- the call


def in_plain_eager_mode() -> bool:
    """Whether torch would do no more here than compute values: no tracing, autocast, forward-mode derivatives,
    interception of operators, hooks of all modules, or exchanged forward methods of classes."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or torch.is_autocast_enabled("cpu")
        or torch_private.takes_tangents()
        or torch_private.intercepted()
        or torch_private.hooks_of_all_modules()
        or patched_class()
    )


def _fault_of_call(tokens, state) -> str:
    """Why this call, whatever the model, needs PyTorch; "" where it does not."""
    if chosen_backend() not in ("auto", "cpu"):
        return f'use_backend("{chosen_backend()}") was chosen'
    if torch_private.missing():
        return f"this torch has no {torch_private.missing()[0]}"
    if not in_plain_eager_mode():
        return "torch is tracing, in autocast, taking derivatives, or calling hooks of all modules"
    if tokens is not None and type(tokens) is not torch.Tensor:
        return f"tokens are a {type(tokens).__name__}"
    if state is None or is_lazy(state) or not isinstance(state, RWKVState):
        return ""
    for name, x in state.tensors().items():
        if type(x) not in (torch.Tensor, nn.Parameter):
            return f"the state's {name} is a {type(x).__name__}"
        if name == "wkv" and x.dtype != torch.float32:
            return f"the state's wkv is {x.dtype}"
        if x.is_neg():
            return f"the state's {name} is a negative view"
        if x.requires_grad and torch.is_grad_enabled():
            return "gradients of the state are asked for"
    return ""


# ---------------------------------------------------------------------- the model


class Eligibility:
    """What was found when a model was examined, and how to notice that it has changed since.

    faults: why the model cannot take a path, "" where it can; by path.
    lasting: whether `holds` notices when that changes. Where a tensor does not fit, it might not.
    step, table: of the step: its function, and what it makes of the tensors at its first use.
    meanwhile: the step has run, and its weights are large: from now on a second thread compares while it runs.
    """

    def __init__(self, model: Any):
        self.layout, self.meanwhile = model.layout, False
        self.step: Any = None
        self.table: Any = None
        # Without the model itself, which would not be given back while this is kept for it.
        _, *modules = model.modules()
        self.modules: list[Any] = modules
        self.types, self.inside = [type(model), *map(type, modules)], [vars(model), *map(vars, modules)]
        self.sizes = list(map(len, self.inside))
        self.hooks = [hooks for m in (model, *modules) for hooks in torch_private.hooks_of(m)]
        self.captured = [m for m in self.modules if hasattr(m, "receivers")]
        names = [tuple(x for x in _OPTIONS if x in d) for d in self.inside]
        self._getters = [(operator.itemgetter(*n), d) for n, d in zip(names, self.inside, strict=True) if n]
        self._options = self._options_now()
        children = [d for m in (model, *modules) if (d := torch_private.children_of(m))]
        parts = (torch_private.parameters_of, torch_private.buffers_of)
        stored = [d for m in (model, *modules) for part in parts if (d := part(m))]
        # All is kept alive, so that what is found at the same place later is the same.
        self._trees: list[tuple[list[dict], list]] = [
            (ds, [x for d in ds for x in d.values()]) for ds in (children, stored)
        ]
        fault = fault_of_modules(model)
        self.tensors: list[Any] = [] if fault else [x for x in self._trees[1][1] if x is not None]
        self.lasting = bool(fault) or not (fault := fault_of_tensors(model))
        if not self.lasting:
            self.tensors = []
        self._places = {id(x): span(x, x.shape, x.dtype) for x in self.tensors}
        self._addresses = [self._places[id(x)].data or 0 for x in self.tensors]
        self._nbytes = list(map(_nbytes, map(_storage, self.tensors)))
        self._kinds = self._kinds_now()
        self._kept: Callable[..., bool] | None = None
        self._large = sum(x.nbytes for x in self.tensors) > _LARGE
        self.faults = {
            "prefill": fault,
            "step": fault or ("" if self.norm_eps() else "its norms differ in eps"),
        }

    def span_of(self, x: torch.Tensor) -> Span:
        """The memory of one of the tensors, as it is compared in every call.

        Raises:
            KernelError: it is none of those that were examined.
        """
        known = self.known_span(x)
        if known is None:
            raise KernelError("A weight for compiled code is none of the model's parameters.")
        return known

    def known_span(self, x: torch.Tensor) -> Span | None:
        """As `span_of`, None where it is none of the tensors."""
        return self._places.get(id(x))

    def norm_eps(self) -> tuple[float, float] | None:
        """What all LayerNorms and what all GroupNorms add to the variance, 0 where there is none; None where norms of
        one kind differ, for which the step has no place."""
        layers, heads = ({m.eps for m in self.modules if type(m) is x} or {0.0} for x in (nn.LayerNorm, nn.GroupNorm))
        return (layers.pop(), heads.pop()) if len(layers) == len(heads) == 1 else None

    def _options_now(self) -> list:
        return [get(d) for get, d in self._getters]

    # Some hundred tensors are looked at for every token: `map` over C functions takes a third of a loop's time.

    def memory(self) -> list | None:
        """The storages of all tensors, which stay as long as the list does; None where one has other memory than it
        had."""
        try:
            storages = list(map(_storage, self.tensors))  # held first: nothing new comes to lie where they are
            same = list(map(_nbytes, storages)) == self._nbytes
            return storages if same and list(map(_address, self.tensors)) == self._addresses else None
        except (RuntimeError, NotImplementedError):  # a tensor has no memory any more
            return None

    def _kinds_now(self) -> list:
        return [[*map(of, self.tensors)] for of in (type, _shape, _dtype)]

    def _kinds_hold(self) -> bool:
        """Whether all tensors have the class, shape and dtype that they had, contiguous and no negative views."""
        if self._kept is not None and self._kept(*self.tensors):
            return True
        # First what compares in one call from now on, then the comparison: what holds for that holds for this.
        kept = torch_private.kept_as_now(self.tensors)
        same = self._kinds_now() == self._kinds
        same = same and all(map(_is_contiguous, self.tensors)) and not any(map(_is_neg, self.tensors))
        self._kept = kept if same else None
        return same

    def holds(self, model: Any) -> bool:
        """Whether all modules and tensors are those that were examined, and tensors that are in place are as large."""
        try:
            for dictionaries, were in self._trees:
                now = list(chain.from_iterable(map(dict.values, dictionaries)))
                if len(now) != len(were) or not all(map(operator.is_, now, were)):
                    return False
            return (
                self._kinds_hold()
                and [type(model), *map(type, self.modules)] == self.types
                and list(map(len, self.inside)) == self.sizes
                and self._options_now() == self._options
                and model.layout is self.layout
            )
        except (KeyError, RuntimeError, TypeError, ValueError):
            return False  # an option was deleted, or is none that can be compared

    def fault_of_moment(self, grad: bool) -> str:
        """Why a model that is as it was examined needs PyTorch just now; "" where it does not. `grad`: gradients are
        on."""
        if any(self.hooks) or any([m.receivers for m in self.captured]) or any(["forward" in d for d in self.inside]):
            return "a module has a hook, is captured, or has a forward of its own"
        return "gradients of parameters are asked for" if grad and any(map(_requires_grad, self.tensors)) else ""

    def compare_meanwhile(self, model: Any) -> "Future[bool] | None":
        """Whether the step may compute this call, to be asked when it is done; None where that was looked at before.

        To be called at every step, with the table made.
        """
        if self.meanwhile:
            grad = torch.is_grad_enabled()  # of this thread
            try:
                return _second_thread.submit(lambda: self.holds(model) and not self.fault_of_moment(grad))
            except RuntimeError:  # Python is ending and begins no new thread
                now: Future[bool] = Future()
                now.set_result(self.holds(model) and not self.fault_of_moment(grad))
                return now
        self.meanwhile = self._large
        return None


# Bytes of weights that throw everything else out of the caches when they are read.
_LARGE = 1 << 24
_second_thread = ThreadPoolExecutor(1, "rwkv_lab compares weights")


def _after_fork() -> None:
    global _second_thread
    _second_thread = ThreadPoolExecutor(1, "rwkv_lab compares weights")  # the thread stayed in the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
