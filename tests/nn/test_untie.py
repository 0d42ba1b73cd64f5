"""untie: shared weights become a chain's own, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import abyssal
from abyssal.nn import ConvBranch, Euler, Heun, MLPBranch, RefineError, ResidualStack, Untied, refinement, untie
from toys.huggingface import import_transformers

SCHEMES = [Euler(), Heun()]


class Block(nn.Module):
    """`x + dropout(outer(tanh(norm(inner(x)))))`."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.dropout = nn.BatchNorm1d(width), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.dropout(self.outer(torch.tanh(self.norm(self.inner(x)))))


class Network(nn.Module):
    """An embedding, a chain, and a head that is tied to the embedding."""

    def __init__(self, depth: int = 3, tied: bool = True):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        block = Block()
        self.blocks = nn.ModuleList(block if tied else Block() for _ in range(depth))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tokens() -> torch.Tensor:
    return torch.randint(7, (5,), generator=torch.Generator().manual_seed(0))


def network(**options) -> Network:
    torch.manual_seed(0)
    return Network(**options).double()


@pytest.mark.parametrize("training", [False, True])
def test_the_outputs_are_the_same_bits_with_dropout_and_batch_norm(training):
    tied = network().train(training)
    free = untie(tied)
    assert free.training == training
    outputs = []
    for model in (tied, free):
        torch.manual_seed(1)
        outputs.append(model(tokens()))
    if training:  # a shared norm's statistics move once per use, a free one's once
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
    assert torch.equal(*outputs)


def test_the_state_dict_is_laid_out_as_that_of_the_untied_class():
    free, fresh = untie(network()), network(tied=False)
    assert list(free.state_dict()) == list(fresh.state_dict())
    fresh.load_state_dict(free.state_dict())
    assert torch.equal(fresh.eval()(tokens()), free.eval()(tokens()))


def test_every_block_has_its_own_and_the_head_stays_tied():
    tied = network()
    free = untie(tied)
    assert len({id(p) for block in free.blocks for p in block.parameters()}) == 3 * len(
        list(tied.blocks[0].parameters())
    )
    assert free.head.weight is free.embed.weight
    assert [id(b) for b in tied.blocks] == [id(tied.blocks[0])] * 3  # the one given is as it was
    report = refinement(free)
    assert isinstance(report, Untied)
    assert report.chains == (("blocks", 3, 1),)
    assert report.parameters == (28 + 48, 28 + 3 * 48)
    assert "blocks: 3 blocks of their own where there were 1" in str(report)


def test_the_gradients_of_the_free_blocks_add_up_to_the_shared_one():
    tied = network().eval()
    free = untie(tied)
    for model in (tied, free):
        model(tokens()).square().sum().backward()
    for name, p in tied.blocks[0].named_parameters():
        torch.testing.assert_close(p.grad, sum(block.get_parameter(name).grad for block in free.blocks))


def test_only_blocks_that_share_are_copied():
    first, second = Block(), Block()
    model = nn.Sequential(first, second, first, nn.Flatten(), second)
    free = untie(model)
    assert refinement(free).chains == (("", 4, 2),)
    assert len({id(member) for member in free}) == 5
    for mine, theirs in zip(free.state_dict().items(), model.state_dict().items(), strict=True):
        assert mine[0] == theirs[0] and torch.equal(mine[1], theirs[1])


def test_parameters_that_different_modules_share_are_untied_but_not_those_shared_with_the_outside():
    model = network(tied=False)
    model.blocks[2].inner.weight = model.blocks[0].inner.weight
    model.extra = nn.Linear(4, 4)
    for block in model.blocks[:2]:
        block.outer.bias = model.extra.bias
    free = untie(model)
    inner = [block.inner.weight for block in free.blocks]
    assert len({id(p) for p in inner}) == 3 and torch.equal(inner[0], inner[2])
    assert free.blocks[0].outer.bias is free.blocks[1].outer.bias is free.extra.bias
    assert refinement(free).kept == ("blocks.0.outer.bias",)
    assert "blocks.0.outer.bias" in str(refinement(free))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_stack_of_one_function_becomes_one_of_many(scheme):
    f = MLPBranch(3).double()
    tied = ResidualStack([f] * 4, scheme, scale=[0.1, 0.2, 0.3] if scheme == Heun() else None)
    free = untie(tied)
    fresh = ResidualStack([MLPBranch(3).double() for _ in range(4)], scheme)
    x = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(tied(x), free(x))
    assert tied.scale == free.scale
    assert len({id(f) for f in free.blocks}) == 4
    assert list(free.state_dict()) == list(fresh.state_dict())
    if scheme == Heun():
        assert free.steps[0].second is free.steps[1].first  # as the scheme wants it
    with pytest.raises(RefineError, match="shares its weights"):
        untie(fresh)


def test_a_stack_in_evaluation_mode_stays_in_it():
    free = untie(ResidualStack([ConvBranch(8)] * 3, Heun()).eval())
    assert not any(module.training for module in free.modules())


@pytest.mark.parametrize("groups", [1, 2])
def test_the_groups_of_an_albert_become_one_for_each_layer(groups, tmp_path):
    transformers = import_transformers()
    sizes = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.AlbertConfig(
        num_hidden_layers=4, num_hidden_groups=groups, vocab_size=31, max_position_embeddings=16, **sizes
    )
    torch.manual_seed(0)
    tied = transformers.AlbertForMaskedLM(config).eval()
    batch = {"input_ids": torch.arange(1, 9).view(1, 8)}
    free = untie(tied, batch=batch)
    assert refinement(free).change == 0
    assert refinement(free).chains == (("albert.encoder.albert_layer_groups", 4, groups),)
    assert (tied.config.num_hidden_groups, free.config.num_hidden_groups) == (groups, 4)
    free.save_pretrained(tmp_path)
    again = transformers.AlbertForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, tied(**batch).logits)
    assert free.predictions.decoder.weight is free.albert.embeddings.word_embeddings.weight


def test_copies_share_what_the_blocks_share_with_the_model_around():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("angles", torch.ones(4))

    class Config:
        def __init__(self):
            self.size = 4

    model = network()
    model.rotary, model.settings = Rotary(), Config()
    model.blocks[0].rotary, model.blocks[0].settings = model.rotary, model.settings
    free = untie(model)
    assert all(block.rotary is free.rotary and block.settings is free.settings for block in free.blocks)


def test_what_cannot_be_untied_is_refused_with_a_way_out():
    with pytest.raises(RefineError, match=r"nn\.ModuleList\(\[block\] \* n\) first"):
        untie(network(tied=False))
    with pytest.raises(TypeError, match="got a list"):
        untie([Block()])
    patched = copy.deepcopy(network())
    abyssal.reconstruct(patched)
    with pytest.raises(RefineError, match=r"abyssal\.release\(model\) before"):
        untie(patched)
