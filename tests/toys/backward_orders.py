"""Training steps whose backward passes ask for states in every order; each returns all gradients in a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toys.blocks import Net, data, flat_gradients


def retained_twice(model: nn.Module) -> Tensor:
    model.zero_grad()
    loss = model(data()).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    return flat_gradients(model)


def autograd_grad(model: nn.Module) -> Tensor:
    gradients = torch.autograd.grad(model(data()).square().mean(), list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def second_order(model: nn.Module) -> Tensor:
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(data()).square().mean(), parameters, create_graph=True)
    penalty = sum(g.square().sum() for g in gradients)
    return torch.cat([h.flatten() for h in torch.autograd.grad(penalty, parameters)])


def intermediate_losses_bottom_up(model: Net) -> Tensor:
    model.zero_grad()
    h, states = model.stem(data()), []
    for block in model.blocks:
        h = block(h)
        states.append(h)
    states[1].square().sum().backward(retain_graph=True)
    states[3].sum().backward(retain_graph=True)
    states[-1].square().sum().backward()
    return flat_gradients(model)


def intermediate_losses_top_down(model: Net) -> Tensor:
    model.zero_grad()
    h, states = model.stem(data()), []
    for block in model.blocks:
        h = block(h)
        states.append(h)
    for state in reversed(states):
        state.square().sum().backward(retain_graph=True)
    return flat_gradients(model)


def gradient_of_a_middle_state(model: Net) -> Tensor:
    h = model.stem(data())
    middle = model.blocks[2](model.blocks[1](model.blocks[0](h)))
    end = middle
    for block in model.blocks[3:]:
        end = block(end)
    first = torch.autograd.grad(end.square().sum(), middle, retain_graph=True)[0]
    second = torch.autograd.grad(middle.square().sum(), h, retain_graph=True)[0]
    third = torch.autograd.grad(end.sum(), h)[0]
    return torch.cat([first.flatten(), second.flatten(), third.flatten()])


def backward_within_backward(model: Net) -> Tensor:
    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            with torch.enable_grad():
                x = data(seed=9).requires_grad_()
                extra = torch.autograd.grad(model(x).sum(), x)[0]
            return gradient + extra

    model.zero_grad()
    h = model.stem(data())
    for i, block in enumerate(model.blocks):
        h = block(h)
        if i == 2:
            h = Inner.apply(h)
    h.square().sum().backward()
    return flat_gradients(model)
