"""Rules for depth against their sources' formulas, written out here once more as numbers."""

from __future__ import annotations

import math

import pytest

from abyssal.models.reading import Role
from abyssal.scaling.rules.base import ROLES, Factors, Rule, Sizes, ratio
from abyssal.scaling.rules.known import (
    GPT2,
    RULES,
    CompleteP,
    DeepNorm,
    DepthMuP,
    Fixup,
    LayerScale,
    NoRule,
    OneOverSqrtDepth,
    ReZero,
    SkipInit,
    rule,
)

# 48 blocks of two branches against a base of 12, and twice its width.
DEEP = Sizes(depth=48, branches=96, depth_ratio=4.0, width_ratio=2.0)
BASE = Sizes(depth=12, branches=24)
IN_BLOCKS: tuple[Role, ...] = ("hidden", "projection", "narrow", "norm", "bias")


@pytest.mark.parametrize(
    ("given", "multiplier"),
    [
        (NoRule(), 1),
        (OneOverSqrtDepth(), 1 / math.sqrt(96)),
        (DepthMuP(), 1 / 2),
        (DepthMuP(a=3), 3 / 2),
        (CompleteP(), 1 / 4),
        (CompleteP(alpha=0.75), 4**-0.75),
        (GPT2(), 1),
        (DeepNorm(), 96**-0.25),
        (ReZero(), 1),
        (SkipInit(), 1),
        (Fixup(), 1),
        (LayerScale(), 1),
    ],
    ids=repr,
)
def test_branches_are_multiplied_by_what_the_source_says(given: Rule, multiplier: float) -> None:
    assert given.multiplier(DEEP) == pytest.approx(multiplier, rel=1e-15)


# Table 1 of arXiv 2505.01618 at alpha = 1 and its reference implementation, with m_L = 4 and m_N = 2.
COMPLETEP_ADAMW = {
    "embedding": Factors(lr=1, weight_decay=1, eps=1 / 2),
    "between": Factors(lr=1 / 2, weight_decay=2, eps=1 / 2),
    "hidden": Factors(lr=1 / 2, weight_decay=2, eps=1 / 8),
    "projection": Factors(lr=1 / 2, weight_decay=2, eps=1 / 8),
    "narrow": Factors(lr=1, weight_decay=1, eps=1 / 8),
    "norm": Factors(lr=1, weight_decay=0, eps=1 / 8),
    "bias": Factors(lr=1, weight_decay=0, eps=1 / 8),
    "vector": Factors(lr=1, weight_decay=0, eps=1 / 2),
    "head": Factors(lr=1, weight_decay=1, eps=1 / 2),
}


@pytest.mark.parametrize("role", COMPLETEP_ADAMW)
def test_completep_has_the_adamw_factors_of_its_table(role: Role) -> None:
    assert CompleteP().factors(role, DEEP) == COMPLETEP_ADAMW[role]


@pytest.mark.parametrize("role", IN_BLOCKS)
def test_depth_mup_slows_adam_in_blocks_by_the_root_of_depth_and_sgd_not(role: Role) -> None:
    deep = Sizes(depth=48, branches=96, depth_ratio=4.0)
    assert DepthMuP().factors(role, deep).lr == 1 / 2
    assert DepthMuP().factors(role, deep, "sgd").lr == 1
    assert DepthMuP().factors(role, deep).eps == 1 / 2


@pytest.mark.parametrize("role", ["embedding", "between", "vector", "head"])
@pytest.mark.parametrize("given", [DepthMuP(), CompleteP()], ids=repr)
def test_depth_changes_no_learning_rate_outside_the_blocks(given: Rule, role: Role) -> None:
    deep = Sizes(depth=48, branches=96, depth_ratio=4.0)
    assert given.factors(role, deep).lr == given.factors(role, deep, "sgd").lr == given.factors(role, deep).eps == 1


@pytest.mark.parametrize("given", [DepthMuP(), CompleteP()], ids=repr)
def test_width_is_that_of_mup(given: Rule) -> None:
    wide = Sizes(depth=12, branches=24, width_ratio=2.0)
    assert given.logits(wide) == 1 / 2
    assert given.init("hidden", wide).width == given.init("projection", wide).width == pytest.approx(2**-0.5)
    assert given.init("embedding", wide).width == given.init("head", wide).width == given.init("bias", wide).width == 1
    assert given.factors("hidden", wide).lr == 1 / 2
    # Tensor Programs V, table 8: Adam 1/m_N for matrices and 1 for the rest; SGD 1 for matrices, m_N for the rest.
    assert given.factors("hidden", wide, "sgd").lr == 1
    assert given.factors("embedding", wide, "sgd").lr == given.factors("head", wide, "sgd").lr == 2


@pytest.mark.parametrize("given", [rule(name) for name in RULES], ids=repr)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_at_the_base_sizes_no_learning_rate_or_eps_changes(given: Rule, optimizer: str) -> None:
    for role in ROLES:
        if not (isinstance(given, Fixup) and role in ("bias", "gate")):
            found = given.factors(role, BASE, optimizer)  # type: ignore[arg-type]
            assert (found.lr, found.eps) == (1, 1)


@pytest.mark.parametrize("given", [NoRule(), DepthMuP(), CompleteP()], ids=repr)
def test_relative_rules_are_the_identity_at_the_base_depth(given: Rule) -> None:
    assert given.multiplier(BASE) == given.logits(BASE) == 1
    assert given.init("hidden", BASE).scale == given.init("hidden", BASE).width == 1


def test_one_over_sqrt_depth_is_the_identity_at_one_branch() -> None:
    assert OneOverSqrtDepth().multiplier(Sizes(depth=1, branches=1)) == 1


def test_gpt2_divides_projections_by_the_root_of_the_number_of_branches() -> None:
    assert GPT2().init("projection", DEEP).gpt2 is True
    assert GPT2().init("hidden", DEEP).gpt2 is None


def test_deepnorm_scales_all_matrices_but_queries_and_keys() -> None:
    assert DeepNorm().init("hidden", DEEP).scale == pytest.approx((8 * 48) ** -0.25)
    assert DeepNorm().init("norm", DEEP).scale == 1
    assert not DeepNorm().reaches("layer.0.attention.self.query.weight")
    assert not DeepNorm().reaches("layers.0.self_attn.k_proj.weight")
    assert DeepNorm().reaches("layer.0.attention.self.value.weight")
    with pytest.raises(ValueError, match=r"qkv.*in one\s+matrix"):
        DeepNorm().reaches("blocks.0.attn.qkv.weight")


@pytest.mark.parametrize(("depth", "start"), [(1, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6), (300, 1e-6)])
def test_layer_scale_begins_by_depth(depth: int, start: float) -> None:
    gate = LayerScale().gate(Sizes(depth=depth, branches=2 * depth))
    assert gate.start == start
    assert gate.per_channel


def test_rezero_shares_one_number_in_a_block_and_skipinit_does_not() -> None:
    assert (ReZero().gate(DEEP).start, ReZero().gate(DEEP).shared) == (0, True)
    assert (SkipInit().gate(DEEP).start, SkipInit().gate(DEEP).shared) == (0, False)
    assert SkipInit(start=0.1).gate(DEEP).start == 0.1
    with pytest.raises(ValueError, match=r"R\^-1/2 = 0\.102"):
        SkipInit(start=0.2).gate(DEEP)


@pytest.mark.parametrize(("layers", "power"), [(2, -1 / 2), (3, -1 / 4), (4, -1 / 6)])
def test_fixup_scales_the_first_layers_and_zeroes_the_last(layers: int, power: float) -> None:
    assert Fixup().init("hidden", DEEP, layers).scale == pytest.approx(96**power)
    assert Fixup().init("projection", DEEP, layers).scale == Fixup().init("head", DEEP).scale == 0
    assert Fixup().factors("gate", DEEP).lr == Fixup().factors("bias", DEEP).lr == 0.1


def test_fixup_leaves_a_branch_of_one_layer_at_zero_without_dividing_by_it() -> None:
    assert Fixup().init("hidden", DEEP, layers=1).scale == 1


@pytest.mark.parametrize("name", [*RULES, "CompleteP", "depth_mup", "DepthMuP", "1/sqrt(l)", " gpt2 "])
def test_rules_are_known_by_name(name: str) -> None:
    assert isinstance(rule(name), Rule)


def test_a_rule_is_taken_as_it_is_and_none_is_no_rule() -> None:
    assert rule(CompleteP(alpha=0.5)) == CompleteP(alpha=0.5)
    assert rule(None) == NoRule()


def test_an_unknown_rule_is_answered_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"'complete'.*Did you mean 'completep'\?.*'rezero'"):
        rule("complete")
    with pytest.raises(TypeError, match="takes a name or a rule"):
        rule(3)  # type: ignore[arg-type]


def test_every_rule_names_its_source() -> None:
    for kind in RULES.values():
        assert kind.source
        assert kind is NoRule or kind.source in (kind.__doc__ or "")


def test_completep_refuses_an_alpha_outside_its_range() -> None:
    with pytest.raises(ValueError, match=r"from 0\.5 to 1, got 2"):
        CompleteP(alpha=2)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, True, "12"])
def test_a_bad_base_depth_is_named(bad: object) -> None:
    with pytest.raises(ValueError, match="base_depth has to be a number of at least 1"):
        ratio(12, bad, "depth")  # type: ignore[arg-type]
