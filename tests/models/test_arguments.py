"""Blocks as people write them: tuples out, keywords in, extra tensors that need gradients, caches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import abyssal
from abyssal.models.arguments import find_caches
from toys.blocks import TO_ROUNDING, Branch, Net, build, data, flat_gradients, one_step, same_gradients, twins

both = pytest.mark.parametrize("policy", [abyssal.Keep(), TO_ROUNDING], ids=str)


class Conditioned(Branch):
    """Takes the stream by any name, with extra tensors, and returns a tuple as Hugging Face layers do."""

    def forward(self, hidden_states, mask=None, *, condition=None, pair=None, flag=True):  # type: ignore[override]
        out = self.second(torch.tanh(self.first(hidden_states)))
        if mask is not None:
            out = out * mask
        if condition is not None:
            out = out * torch.sigmoid(condition)
        if pair is not None:
            out = out + 0.1 * pair[0] * pair[1]["deep"]
        return (hidden_states + self.scale * out, out.mean()) if flag else hidden_states + self.scale * out


def positional(net: Net, x: Tensor) -> Tensor:
    h, mask = net.stem(x), torch.ones(12, dtype=x.dtype)
    for block in net.blocks:
        h = block(h, mask)[0]
    return h


def keyword(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    for block in net.blocks:
        h = block(mask=torch.ones_like(h), hidden_states=h)[0]  # the mask comes first in the call
    return h


def needing_gradients(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    condition = net.stem(x.flip(0)).tanh()
    for block in net.blocks:
        h = block(h, condition=condition, pair=(condition.sin(), {"deep": condition.cos()}))[0]
    return h


def both_outputs_used(net: Net, x: Tensor) -> Tensor:
    h, extra = net.stem(x), 0.0
    for block in net.blocks:
        h, mean = block(h)
        extra = extra + mean
    return h + extra


def as_dict(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    for block in net.blocks:
        h = block(h, flag=False)
    return h


@both
@pytest.mark.parametrize("join", [positional, keyword, needing_gradients, both_outputs_used, as_dict])
def test_any_signature(join, policy: abyssal.Policy) -> None:
    certificate = same_gradients(build(block=Conditioned, join=join), policy, lambda m: one_step(m, data()))
    if policy == TO_ROUNDING:
        assert certificate.chains == 1


@both
def test_gradients_reach_extra_arguments(policy: abyssal.Policy) -> None:
    def step(model: Net) -> Tensor:
        condition = torch.full((12,), 0.3, dtype=torch.float64, requires_grad=True)
        h = model.stem(data())
        for block in model.blocks:
            h = block(h, condition=condition)[0]
        return torch.autograd.grad(h.square().sum(), condition)[0]

    same_gradients(build(block=Conditioned), policy, step)


class Dict(Branch):
    def forward(self, x: Tensor) -> dict[str, Tensor | None]:  # type: ignore[override]
        return {"nothing": None, "hidden": super().forward(x)}


@both
def test_dict_outputs(policy: abyssal.Policy) -> None:
    def join(net: Net, x: Tensor) -> Tensor:
        h = net.stem(x)
        for block in net.blocks:
            h = block(h)["hidden"]
        return h

    same_gradients(build(block=Dict, join=join), policy, lambda m: one_step(m, data()))


def test_an_argument_changed_in_place_after_the_call_is_an_error_naming_the_block() -> None:
    model = build(block=Conditioned)
    abyssal.reconstruct(model, abyssal.Keep(), blocks=list(model.blocks))
    mask = torch.ones(12, dtype=torch.float64)
    h = model.stem(data())
    for block in model.blocks:
        h = block(h, mask)[0]
    mask.mul_(2)
    with pytest.raises(RuntimeError, match=r"blocks\.5.*changed in place"):
        h.sum().backward()


@dataclass
class Bag:
    tensor: Tensor


def test_arguments_that_hide_graph_connected_tensors_make_the_block_plain_and_say_so() -> None:
    class Bagged(Branch):
        def forward(self, x: Tensor, bag: Bag) -> Tensor:  # type: ignore[override]
            return super().forward(x) * bag.tensor

    def join(net: Net, x: Tensor) -> Tensor:
        h = net.stem(x)
        bag = Bag(h.sigmoid())
        for block in net.blocks:
            h = block(h, bag)
        return h

    certificate = same_gradients(build(block=Bagged, join=join), abyssal.Keep(), lambda m: one_step(m, data()))
    assert "Bag" in certificate.blocks[0].note


class Cache:
    """The face of a Hugging Face cache."""

    def __init__(self) -> None:
        self.entries: list[Tensor] = []

    def get_seq_length(self, layer: int = 0) -> int:
        return len(self.entries)


class Caching(Branch):
    def forward(self, x: Tensor, past_key_values: Cache | None = None) -> Tensor:  # type: ignore[override]
        extra = 0.0
        if past_key_values is not None:
            extra = sum(past_key_values.entries, start=torch.zeros(()))
            past_key_values.entries.append(x.mean())
        return super().forward(x) + 0.1 * extra


@both
def test_an_empty_cache_is_dropped_with_a_note(policy: abyssal.Policy) -> None:
    plain, ours = twins(build(block=Caching), policy)
    cache = Cache()

    def join(net: Net, x: Tensor) -> Tensor:
        h = net.stem(x)
        for block in net.blocks:
            h = block(h, past_key_values=cache)
        return h

    plain.join = lambda net, x: [h := net.stem(x), *[h := b(h) for b in net.blocks]][-1]  # type: ignore[assignment]
    ours.join = join
    assert float((one_step(ours, data()) - one_step(plain, data())).norm()) < 1e-11
    assert cache.entries == []
    assert "cache" in abyssal.certificate(ours).blocks[0].note


@both
def test_a_filled_cache_makes_the_block_plain_and_is_filled_once(policy: abyssal.Policy) -> None:
    def step(model: Net) -> Tensor:
        model.zero_grad()
        cache = Cache()
        cache.entries.append(model.stem(data()).mean())
        h = model.stem(data())
        for block in model.blocks:
            h = block(h, past_key_values=cache)
        h.square().sum().backward()
        assert len(cache.entries) == 7
        return flat_gradients(model)

    certificate = same_gradients(build(block=Caching), policy, step)
    assert "Store()" in certificate.blocks[0].note and "cache" in certificate.blocks[0].note


class Silent(Cache):
    """Answers nothing, and holds what it holds where nobody looks."""

    def get_seq_length(self, layer: int = 0) -> int:
        raise ValueError("this layer does not track sequence length")


class Hidden(Silent):
    __slots__ = ()

    def __init__(self) -> None:
        held: list[Tensor] = []
        type(self).entries = property(lambda self: held)  # type: ignore[assignment]


class Layer:
    def __init__(self, *held: Tensor) -> None:
        self.states: dict[int, Tensor | None] = dict(enumerate(held)) or {0: None}


class Told(Layer):
    """A recurrent layer's: the memory is there from the start, and a flag tells whether it is used."""

    def __init__(self, used: bool) -> None:
        super().__init__(torch.zeros(2, 3))
        self.has_previous_state = {0: False, 1: used}


class Keys:
    """An attention layer's. It holds a tensor while it is empty, too: the width of its window."""

    def __init__(self, length: int) -> None:
        self.window, self.length = torch.tensor(4), length

    def get_seq_length(self) -> int:
        return self.length


class Hybrid:
    """Layers of several kinds, attention's by their length: the others have none, and say so by raising."""

    def __init__(self, *layers: object, **others: object) -> None:
        self.layers = [Keys(layer) if isinstance(layer, int) else layer for layer in layers]
        self.__dict__.update(others)

    def get_seq_length(self, layer: int = 0) -> int:
        if not isinstance(self.layers[layer], Keys):
            raise ValueError("this layer does not track sequence length")
        return self.layers[layer].get_seq_length()


class Preallocating(Cache):
    def __init__(self) -> None:
        super().__init__()
        self.keys = torch.zeros(2, 3)


class Unwilling(dict[str, Tensor]):
    def __getattr__(self, name: str) -> object:
        return self[name]


FULL = Layer(torch.ones(2, 3))
EMPTY_CACHES = [
    Cache(),
    Hybrid(3, Layer(), FULL),
    Hybrid(3, Layer(torch.ones(0)), FULL),
    Hybrid(FULL, 0, 3),
    Hybrid(FULL, Told(False), 3),
    Hybrid(0, 0, linear=[FULL]),
    Hybrid(0, 0, cross=Hybrid(FULL, Layer())),
]
CACHES_THAT_MAY_HOLD_SOMETHING = [
    Silent(),
    Hidden(),
    Preallocating(),
    Hybrid(Layer(), FULL),
    Hybrid(Layer(), 3),
    Hybrid(Layer(), Told(True)),
    Hybrid(0, 0, linear=[Layer(), FULL]),
    Hybrid(0, 0, cross=Hybrid(Layer(), FULL)),
    Hybrid(Layer(), Told(False), memory=torch.ones(3)),
]


def block_of_layer(index: int | None) -> nn.Module:
    block = Branch()
    block.second.layer_idx = index  # type: ignore[assignment]
    return block


@pytest.mark.parametrize("cache", EMPTY_CACHES, ids=lambda cache: type(cache).__name__)
def test_caches_that_are_known_to_hold_nothing_of_the_block(cache: object) -> None:
    assert find_caches((torch.ones(1), cache), {"state": cache}, block_of_layer(1)) == {1: "", "state": ""}


@pytest.mark.parametrize("cache", CACHES_THAT_MAY_HOLD_SOMETHING, ids=lambda cache: type(cache).__name__)
def test_caches_that_may_hold_something_of_the_block(cache: object) -> None:
    assert "would grow" in find_caches((torch.ones(1), cache), {}, block_of_layer(1))[1]


@pytest.mark.parametrize("cache", [Hybrid(0, FULL), Hybrid(0, 3), Hybrid(FULL, 0)])
def test_a_block_without_a_number_may_use_every_layer(cache: object) -> None:
    assert all(find_caches((cache,), {}, block_of_layer(None)).values())
    assert not any(find_caches((Hybrid(0, Layer()),), {}, block_of_layer(None)).values())


def test_what_is_no_cache_is_not_asked() -> None:
    others = (torch.ones(1), nn.Linear(2, 2), {"a": 1}, {1}, "text", None, [1], Bag(torch.ones(1)), Unwilling())
    assert find_caches(others, {"type": Cache}, Branch()) == {}


class States:
    """A convolution's memory: no length, and written at every call."""

    def __init__(self) -> None:
        self.last = torch.zeros(12, dtype=torch.float64)
        self.updates = 0

    def update_conv_state(self, x: Tensor) -> Tensor:
        before, self.last = self.last, x.mean(0)
        self.updates += 1
        return before


class Recurrent(Branch):
    def forward(self, x: Tensor, cache_params: States) -> Tensor:  # type: ignore[override]
        return super().forward(x) + 0.1 * cache_params.update_conv_state(x)


@both
def test_a_state_without_a_length_is_updated_once(policy: abyssal.Policy) -> None:
    def step(model: Net) -> Tensor:
        model.zero_grad()
        states = [States() for _ in model.blocks]
        h = model.stem(data())
        for _ in range(2):
            for block, state in zip(model.blocks, states, strict=True):
                h = block(h, cache_params=state)
        h.square().sum().backward()
        assert [state.updates for state in states] == [2] * 6
        return flat_gradients(model)

    certificate = same_gradients(build(block=Recurrent), policy, step)
    assert "ran as Store(): an object of type States" in certificate.blocks[0].note


@both
def test_a_cache_that_answers_nothing_is_filled_once(policy: abyssal.Policy) -> None:
    def step(model: Net) -> Tensor:
        model.zero_grad()
        cache = Silent()
        h = model.stem(data())
        for block in model.blocks:
            h = block(h, past_key_values=cache)
        h.square().sum().backward()
        assert len(cache.entries) == 6
        return flat_gradients(model)

    same_gradients(build(block=Caching), policy, step)


@both
def test_an_argument_that_fails_when_asked_for_attributes(policy: abyssal.Policy) -> None:
    class Asking(Branch):
        def forward(self, x: Tensor, options: Unwilling) -> Tensor:  # type: ignore[override]
            return super().forward(x) * options.scale  # type: ignore[operator]

    def join(net: Net, x: Tensor) -> Tensor:
        h = net.stem(x)
        for block in net.blocks:
            h = block(h, Unwilling(scale=torch.ones(12, dtype=torch.float64)))
        return h

    same_gradients(build(block=Asking, join=join), policy, lambda m: one_step(m, data()))


def test_without_gradients_the_cache_is_left_alone() -> None:
    model = build(block=Caching)
    abyssal.reconstruct(model, abyssal.Keep(), blocks=list(model.blocks))
    cache = Cache()
    with torch.no_grad():
        h = model.stem(data())
        for block in model.blocks:
            h = block(h, past_key_values=cache)
    assert len(cache.entries) == 6


def test_integer_streams_are_left_alone() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 10)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids)

    model = nn.Sequential(Lookup())
    ids = torch.arange(5)
    true = one_step(model, ids)
    abyssal.reconstruct(model, abyssal.Reverse(1), blocks="0")
    assert torch.equal(one_step(model, ids), true)
    assert "shape" in abyssal.certificate(model).blocks[0].note
