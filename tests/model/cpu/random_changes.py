"""Ways in which torch lets people change a model or a state, for `test_random_changes.py`.

A change takes (model, rng) or (state, rng). What one of a model returns, if anything, is called to undo it. `REFUSED`
are those after which torch itself would compute with whatever lies in memory, or end the process.
"""

import copy
import dataclasses
import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize

MODEL: list[Callable] = []
STATE: list[Callable] = []
REFUSED: list[Callable] = []


def _of(where: list[Callable]) -> Callable:
    return lambda change: where.append(change) or change


class OwnLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnParameter(nn.Parameter):
    pass


class OwnTensor(torch.Tensor):
    pass


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def leaves(model) -> list[tuple[nn.Module, str, torch.Tensor]]:
    return [(m, n, p) for m in model.modules() for n, p in m.named_parameters(recurse=False)]


def a_leaf(model, rng) -> tuple[nn.Module, str, torch.Tensor]:
    return rng.choice(leaves(model))


def a_module(model, rng, *kinds):
    return rng.choice([(m, n, c) for m in model.modules() for n, c in m.named_children() if isinstance(c, kinds)])


def frozen(x) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


def other_shape(shape, rng) -> list[int]:
    shape = list(shape)
    at = rng.randrange(len(shape))
    shape[at] = max(1, shape[at] + rng.choice([-3, -1, 1, 5, shape[at]]))
    return shape


# ---------------------------------------------------------------------- layers and heads


@_of(MODEL)
def layer_deleted(model, rng):
    if len(model.blocks) > 1:
        del model.blocks[len(model.blocks) - 1]


@_of(MODEL)
def layer_appended(model, rng):
    model.blocks.append(copy.deepcopy(model.blocks[-1]))


@_of(MODEL)
def layers_in_another_order(model, rng):
    blocks = list(model.blocks)
    model.blocks = nn.ModuleList(blocks[:1] + blocks[:0:-1])


@_of(MODEL)
def layer_shared(model, rng):
    if len(model.blocks) > 2:
        model.blocks[2] = model.blocks[1]


@_of(MODEL)
def layers_in_a_sequential(model, rng):
    model.blocks = nn.Sequential(*model.blocks)


@_of(MODEL)
def tokens_added(model, rng):
    for owner in (model.emb, model.head):
        more = torch.randn(rng.randint(1, 40), owner.weight.shape[1], dtype=owner.weight.dtype)
        owner.weight = frozen(torch.cat([owner.weight, more]))


@_of(MODEL)
def head_of_ten_classes(model, rng):
    model.head = nn.Linear(model.layout.n_embd, 10, bias=False, dtype=model.emb.weight.dtype).requires_grad_(False)


@_of(MODEL)
def head_with_bias(model, rng):
    model.head.bias = frozen(torch.randn(len(model.head.weight), dtype=model.emb.weight.dtype))


@_of(MODEL)
def head_that_is_an_embedding(model, rng):
    V, C = model.layout.vocab_size, model.layout.n_embd
    model.head = nn.Embedding(V, C, dtype=model.emb.weight.dtype).requires_grad_(False)


@_of(MODEL)
def head_tied(model, rng):
    model.head.weight = model.emb.weight


@_of(MODEL)
def norm_over_groups(model, rng):
    owner, name, norm = a_module(model, rng, nn.LayerNorm)
    new = nn.GroupNorm(1, model.layout.n_embd, dtype=norm.weight.dtype)
    setattr(owner, name, new.requires_grad_(False))


# ---------------------------------------------------------------------- shapes, dtypes, memory of one parameter


@_of(MODEL)
def parameter_of_another_shape(model, rng):
    owner, name, p = a_leaf(model, rng)
    setattr(owner, name, frozen(torch.randn(other_shape(p.shape, rng), dtype=p.dtype)))


@_of(MODEL)
def data_of_another_shape(model, rng):
    _, _, p = a_leaf(model, rng)
    p.data = torch.randn(other_shape(p.shape, rng), dtype=p.dtype)


@_of(MODEL)
def data_viewed_in_another_shape(model, rng):
    _, _, p = a_leaf(model, rng)
    p.data = p.data.view(*reversed(p.shape))


@_of(MODEL)
def data_cut(model, rng):
    _, _, p = a_leaf(model, rng)
    p.data = p.data[..., : max(1, p.shape[-1] // 2)]


@_of(MODEL)
def resized(model, rng):
    _, _, p = a_leaf(model, rng)
    before, shape = p.numel(), other_shape(p.shape, rng)
    p.resize_(shape)
    p.view(-1)[before:].zero_()


@_of(MODEL)
def set_to_other_memory(model, rng):
    _, _, p = a_leaf(model, rng)
    p.set_(torch.randn(rng.choice([p.shape, other_shape(p.shape, rng)]), dtype=p.dtype))


@_of(MODEL)
def data_of_another_dtype(model, rng):
    _, _, p = a_leaf(model, rng)
    p.data = p.data.to(rng.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16]))


@_of(MODEL)
def data_viewed_in_another_dtype(model, rng):
    _, _, p = a_leaf(model, rng)
    p.data = p.data.view(torch.int32 if p.itemsize == 4 else rng.choice([torch.int16, torch.bfloat16, torch.float16]))


@_of(MODEL)
def module_in_another_dtype(model, rng):
    rng.choice(list(model.modules())).to(rng.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16]))


@_of(MODEL)
def data_expanded(model, rng):
    _, _, p = a_leaf(model, rng)
    p.data = p.data.reshape(-1)[:1].expand(p.shape)


@_of(MODEL)
def data_transposed_in_memory(model, rng):
    _, _, p = a_leaf(model, rng)
    p.data = p.data.mT.contiguous().mT if p.ndim > 1 else torch.stack([p.data, p.data], -1)[..., 0]


@_of(MODEL)
def transposed_at_its_place(model, rng):
    _, _, p = a_leaf(model, rng)
    p.data = p.data.mT if p.ndim > 1 else p.data.flip(0)


@_of(MODEL)
def data_inside_something_larger(model, rng):
    _, _, p = a_leaf(model, rng)
    block = torch.full((p.numel() + 7,), torch.nan, dtype=p.dtype)
    block[3:-4] = p.data.reshape(-1)
    p.data = block[3:-4].view(p.shape)


@_of(MODEL)
def data_negative(model, rng):
    _, _, p = a_leaf(model, rng)
    p.data = torch._neg_view(p.data)


@_of(MODEL)
def memory_freed_and_made_anew(model, rng):
    _, _, p = a_leaf(model, rng)
    size = p.untyped_storage().nbytes()
    p.untyped_storage().resize_(0)
    p.untyped_storage().resize_(size)
    p.fill_(0.25)


@_of(MODEL)
def in_shared_memory(model, rng):
    model.share_memory()


@_of(MODEL)
def changed_in_place(model, rng):
    a_leaf(model, rng)[2].mul_(1.5)


@_of(MODEL)
def made_in_inference_mode(model, rng):
    owner, name, p = a_leaf(model, rng)
    with torch.inference_mode():
        setattr(owner, name, frozen(p.clone()))


@_of(REFUSED)
def memory_freed(model, rng):
    a_leaf(model, rng)[2].untyped_storage().resize_(0)


@_of(REFUSED)
def memory_freed_beside_a_hook(model, rng):
    """One that gives no values: only a hook before the module, or one around it, may."""
    owner, _, p = a_leaf(model, rng)
    p.untyped_storage().resize_(0)
    other = rng.choice([m for m in model.modules() if m is not owner and not list(m.children())])
    other.register_forward_pre_hook(lambda m, given: None)
    owner.register_forward_hook(lambda m, given, out: None)


@_of(REFUSED)
def memory_cut(model, rng):
    _, _, p = a_leaf(model, rng)
    p.untyped_storage().resize_(p.nbytes - p.itemsize)


@_of(REFUSED)
def on_the_meta_device(model, rng):
    owner, name, p = rng.choice([leaf for leaf in leaves(model) if leaf[0] is not model.emb])
    setattr(owner, name, frozen(p.to("meta")))


# ---------------------------------------------------------------------- replaced, hidden and shared


@_of(MODEL)
def module_of_a_subclass(model, rng):
    owner, name, linear = a_module(model, rng, nn.Linear)
    rows, columns = linear.weight.shape
    new = OwnLinear(columns, rows, bias=False, dtype=linear.weight.dtype).requires_grad_(False)
    new.weight = linear.weight
    setattr(owner, name, new)


@_of(MODEL)
def class_exchanged(model, rng):
    a_module(model, rng, nn.Linear)[2].__class__ = OwnLinear


@_of(MODEL)
def module_with_something_behind(model, rng):
    owner, name, linear = a_module(model, rng, nn.Linear)
    setattr(owner, name, nn.Sequential(linear, Doubled()))
    getattr(owner, name).weight = linear.weight


@_of(MODEL)
def module_shared(model, rng):
    if len(model.blocks) > 1:
        model.blocks[1].ffn.key = model.blocks[0].ffn.key


@_of(MODEL)
def parameter_of_a_subclass(model, rng):
    owner, name, p = a_leaf(model, rng)
    setattr(owner, name, OwnParameter(p.data, requires_grad=False))


@_of(MODEL)
def class_of_a_parameter_exchanged(model, rng):
    a_leaf(model, rng)[2].__class__ = OwnParameter


@_of(MODEL)
def parameter_that_is_a_buffer(model, rng):
    owner, name, p = a_leaf(model, rng)
    delattr(owner, name)
    owner.register_buffer(name, p.data.clone().mul_(0.5))


@_of(MODEL)
def parameter_that_is_an_attribute(model, rng):
    owner, name, p = a_leaf(model, rng)
    delattr(owner, name)
    setattr(owner, name, p.data * 0.5)


@_of(MODEL)
def parameter_hidden(model, rng):
    owner, name, p = a_leaf(model, rng)
    vars(owner)[name] = frozen(torch.randn(rng.choice([p.shape, other_shape(p.shape, rng)]), dtype=p.dtype))


@_of(MODEL)
def parameter_deleted(model, rng):
    owner, name, _ = a_leaf(model, rng)
    delattr(owner, name) if rng.random() < 0.5 else setattr(owner, name, None)


@_of(MODEL)
def parameters_tied(model, rng):
    owner, name, p = a_leaf(model, rng)
    same = [q for _, _, q in leaves(model) if q.shape == p.shape]
    setattr(owner, name, rng.choice(same))


@_of(MODEL)
def parametrized(model, rng):
    _, _, linear = a_module(model, rng, nn.Linear)
    parametrize.register_parametrization(linear, "weight", Doubled())


@_of(MODEL)
def weight_norm(model, rng):
    nn.utils.parametrizations.weight_norm(a_module(model, rng, nn.Linear)[2])
    model.requires_grad_(False)


# ---------------------------------------------------------------------- hooks and options


@_of(MODEL)
def hook(model, rng):
    a_module(model, rng, nn.Linear, nn.LayerNorm)[2].register_forward_hook(lambda m, i, out: 2 * out)


@_of(MODEL)
def hook_before(model, rng):
    a_module(model, rng, nn.Linear, nn.LayerNorm)[2].register_forward_pre_hook(lambda m, given: (2 * given[0],))


@_of(MODEL)
def hook_of_all_modules(model, rng):
    register = nn.modules.module.register_module_forward_hook
    return register(lambda m, i, out: 2 * out if type(m) is nn.Linear else None).remove


@_of(MODEL)
def own_forward(model, rng):
    linear = a_module(model, rng, nn.Linear)[2]
    linear.forward = lambda x: nn.functional.linear(2 * x, linear.weight)


@_of(MODEL)
def another_eps(model, rng):
    a_module(model, rng, nn.LayerNorm, nn.GroupNorm)[2].eps = rng.choice([1e-3, 0.5, 1])


@_of(MODEL)
def another_normalized_shape(model, rng):
    n = model.layout.n_embd
    a_module(model, rng, nn.LayerNorm)[2].normalized_shape = rng.choice([(n // 2,), [n], (1, n), (n + 1,)])


@_of(MODEL)
def another_option(model, rng):
    block = rng.choice(list(model.blocks))
    module, name, value = rng.choice(
        [(block.att, "n_head", 1), (block.att, "layer", 7), (block.att, "head_size", 8), (block, "halves", True)]
    )
    if name in vars(module):
        setattr(module, name, value)


@_of(MODEL)
def max_norm(model, rng):
    model.emb.max_norm = 0.1


@_of(MODEL)
def another_layout(model, rng):
    name, value = rng.choice([("vocab_size", 5), ("n_layer", 1), ("n_layer", 9), ("n_embd", 8), ("dim_ffn", 200)])
    model.layout = dataclasses.replace(model.layout, **{name: value})


# ---------------------------------------------------------------------- states


def _part(state, rng) -> tuple[str, torch.Tensor]:
    return rng.choice(list(state.tensors().items()))


@_of(STATE)
def part_of_another_dtype(state, rng):
    name, x = _part(state, rng)
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32])
    return dataclasses.replace(state, **{name: x.to(dtype)})


@_of(STATE)
def part_of_another_shape(state, rng):
    name, x = _part(state, rng)
    return dataclasses.replace(state, **{name: torch.randn(other_shape(x.shape, rng)).to(x.dtype)})


@_of(STATE)
def part_in_another_order(state, rng):
    name, x = _part(state, rng)
    order = list(range(x.ndim))
    rng.shuffle(order)
    moved = x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
    return dataclasses.replace(state, **{name: rng.choice([moved, torch.stack([x, x], -1)[..., 0]])})


@_of(STATE)
def part_of_one_number(state, rng):
    name, x = _part(state, rng)
    return dataclasses.replace(state, **{name: x.as_strided(x.shape, [0] * x.ndim)})


@_of(STATE)
def part_that_is_no_dense_tensor(state, rng):
    name, x = _part(state, rng)
    others = [x.tolist(), None, x.numpy() if x.dtype == torch.float32 else "x", x.to_sparse(), x.to(torch.complex64)]
    return dataclasses.replace(state, **{name: rng.choice([*others, torch.nested.nested_tensor([x[0]])])})


@_of(STATE)
def one_for_all(state, rng):
    return state.rows([0]).expand(state.batch_size)


@_of(STATE)
def part_of_a_subclass(state, rng):
    name, x = _part(state, rng)
    return dataclasses.replace(state, **{name: rng.choice([x.as_subclass(OwnTensor), frozen(x)])})


@_of(STATE)
def part_negative(state, rng):
    name, x = _part(state, rng)
    return dataclasses.replace(state, **{name: torch._neg_view(-x)})


@_of(STATE)
def part_with_gradients(state, rng):
    name, x = _part(state, rng)
    return dataclasses.replace(state, **{name: x.clone().requires_grad_(True)})


@_of(STATE)
def part_changed_in_place(state, rng):
    _part(state, rng)[1].mul_(0.5)
    return state


@_of(STATE)
def part_with_other_data(state, rng):
    _, x = _part(state, rng)
    x.data = torch.randn(rng.choice([x.shape, other_shape(x.shape, rng)])).to(x.dtype)
    return state


@_of(STATE)
def memory_of_part_cut(state, rng):
    name, x = _part(state, rng)
    cut = x.clone()
    cut.untyped_storage().resize_(rng.choice([0, cut.nbytes - cut.itemsize]))
    return dataclasses.replace(state, **{name: cut})


@_of(STATE)
def part_on_meta(state, rng):
    name, x = _part(state, rng)
    return dataclasses.replace(state, **{name: x.to("meta")})


@_of(STATE)
def without_version(state, rng):
    return dataclasses.replace(state, version="")


@_of(STATE)
def copied(state, rng):
    return copy.deepcopy(copy.copy(state))


def seeded(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)
