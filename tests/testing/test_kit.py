"""The conformance kit passes what is right, and says in words what is wrong with what is not."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

import abyssal
from abyssal.engine import linking as open_ends
from abyssal.engine import policy
from abyssal.models import surroundings
from abyssal.models.replay.call import Call
from abyssal.testing import Report, check_block, check_model

WIDTH = 16


class Branch(nn.Module):
    """x + scale * f(x), f a two-layer perceptron."""

    def __init__(self, scale=0.1, width=WIDTH):
        super().__init__()
        self.scale, self.inner, self.outer = scale, nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.scale * self.outer(torch.tanh(self.inner(x)))


class Convolution(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + 0.1 * torch.relu(self.norm(self.conv(x)))


class Attention(nn.Module):
    def __init__(self, width=WIDTH, dropout=0.3):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.attention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)

    def forward(self, x):
        h = self.norm(x)
        return x + 0.2 * self.dropout(self.attention(h, h, h, need_weights=False)[0])


class Conditioned(Branch):
    """Takes an extra tensor and a keyword argument, returns a tuple."""

    def forward(self, x, context, *, gate=None, times=1):
        h = super().forward(x) + 0.1 * context
        return (h if gate is None else x + times * torch.sigmoid(gate) * (h - x), context)


class NumpyNoise(Branch):
    def forward(self, x):
        return super().forward(x * (1 + 0.3 * torch.as_tensor(np.random.randn(*x.shape), dtype=x.dtype)))


class PythonDepth(Branch):
    def forward(self, x):
        return super().forward(x) if random.random() < 0.5 else x


class OwnGenerator(Branch):
    def __init__(self):
        super().__init__()
        self.rng = torch.Generator().manual_seed(3)

    def forward(self, x):
        return super().forward(x * (1 + 0.3 * torch.randn(x.shape, generator=self.rng, dtype=x.dtype)))


class Counting(Branch):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.scale * self.outer(torch.tanh(self.calls * self.inner(x)))


class CountsInVain(Branch):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class ChangesItsInput(Branch):
    def forward(self, x):
        branch = self.scale * self.outer(torch.tanh(self.inner(x.clone())))
        return x.add_(branch).clone()


class ChangesItsContext(Branch):
    def forward(self, x, context):
        context.add_(1.0)
        return super().forward(x) + 0.1 * context


class Widening(Branch):
    def forward(self, x):
        return torch.cat([super().forward(x), x], dim=-1)


class ReturnsNothing(Branch):
    def forward(self, x):
        super().forward(x)
        return "done"


def network(block=Branch, depth=4, **settings):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, WIDTH), *(block(**settings) for _ in range(depth)), nn.Linear(WIDTH, 2))


def of(report: Report, check: str, level: str | None = None):
    return [f for f in report.findings if f.check == check and level in (None, f.level)]


def the_only(findings):
    assert len(findings) == 1, findings
    return findings[0]


# ---------------------------------------------------------------------- healthy blocks

# The blocks below are made while tests are collected. Unseeded, one in many runs drew a ReLU so near its kink that a
# restored input fell on the other side, where the gradient jumps: what the report says then is right, the block is not.
torch.manual_seed(0)


@pytest.mark.parametrize(
    ("block", "example"),
    [
        (Branch(), torch.randn(8, WIDTH)),
        (Convolution(), torch.randn(2, 4, 8, 8)),
        (Attention(), torch.randn(2, 5, WIDTH)),
        (Conditioned(), (torch.randn(8, WIDTH), torch.randn(8, WIDTH))),
        (Branch(scale=0.05), {"x": torch.randn(8, WIDTH)}),
    ],
    ids=["perceptron", "convolution and BatchNorm", "attention and dropout", "tuple", "by keyword"],
)
def test_a_healthy_block_passes(block, example):
    report = check_block(block, example)
    report.raise_if_failed()
    assert report.ok
    assert report.dtype == "float64"
    assert any("equal to plain autograd's, bit for bit" in finding.what for finding in report.findings)


def test_keyword_and_extra_tensor_arguments_are_compared_too():
    report = check_block(
        Conditioned(),
        (torch.randn(8, WIDTH), torch.randn(8, WIDTH)),
        kwargs={"gate": torch.randn(8, 1), "times": 2},
        policy=abyssal.Reverse(refine=2),
    )
    report.raise_if_failed()
    assert "returns a tuple" in the_only(of(report, "stream")).what


def test_buffers_and_dropout_are_reported_as_right():
    model = nn.Sequential(Convolution(), Convolution())
    found = of(check_model(model, torch.randn(2, 4, 8, 8)), "buffers", "ok")
    assert [f.block for f in found] == ["0", "1"]
    assert "norm.running_mean" in found[0].what
    found = the_only(of(check_block(Attention(), torch.randn(2, 5, WIDTH)), "random numbers", "ok"))
    assert found.block == "Attention"
    assert "recomputed with the same ones" in found.what


def test_a_model_passes_and_its_chains_are_named():
    model = nn.Sequential(network(), nn.ReLU(), nn.Linear(2, WIDTH), Branch(), Branch())
    report = check_model(model, (torch.randn(8, 3),), policy=abyssal.Reverse(refine=1))
    report.raise_if_failed()
    assert "2 chain(s)" in the_only(of(report, "chains")).what


def test_blocks_that_do_not_link_are_a_warning():
    model = nn.Sequential(Branch(), nn.ReLU(), Branch(), nn.ReLU(), Branch())
    report = check_model(model, torch.randn(8, WIDTH))
    assert report.ok
    assert "Something comes between" in the_only(of(report, "chains", "warning")).what


def test_evaluation_mode_is_noted():
    assert "eval mode" in the_only(of(check_model(network().eval(), torch.randn(4, 3)), "mode", "note")).what


def test_a_batch_of_keywords_and_a_loss_of_the_output():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=3, n_embd=WIDTH, n_head=2, vocab_size=30, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).train()
    tokens = torch.randint(0, 30, (2, 8))
    report = check_model(model, {"input_ids": tokens, "labels": tokens}, policy=abyssal.Keep())
    report.raise_if_failed()
    assert len(of(report, "random numbers", "ok")) == 3  # GPT-2's dropout
    own = check_model(network(), torch.randn(4, 3), loss=lambda output: output.square().mean())
    own.raise_if_failed()


def test_a_reconstructed_model_is_checked_in_its_blocks_and_stays_reconstructed():
    model = abyssal.reconstruct(network(), abyssal.Reverse(refine=1), blocks="2")
    report = check_model(model, torch.randn(8, 3))
    report.raise_if_failed()
    assert [f.block for f in of(report, "stream")] == ["2"]
    assert [block.name for block in abyssal.certificate(model).blocks] == ["2"]


def test_a_model_that_does_not_run_in_float64_is_checked_in_its_own_precision():
    class Single(Branch):
        def forward(self, x):
            assert x.dtype == torch.float32
            return super().forward(x)

    report = check_block(Single(), torch.randn(4, WIDTH))
    report.raise_if_failed()
    assert report.dtype == "float32"
    assert "in float64 it raises AssertionError" in the_only(of(report, "precision", "note")).what


def test_a_wrong_backward_of_the_users_own_is_not_flagged():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.tanh(x)

        @staticmethod
        def backward(ctx, gradient):
            return 3.0 * gradient

    class Block(Branch):
        def forward(self, x):
            return x + 0.1 * self.outer(Wrong.apply(self.inner(x)))

    check_block(Block(), torch.randn(4, WIDTH)).raise_if_failed()


# ---------------------------------------------------------------------- faults, each named


@pytest.mark.parametrize(
    ("block", "cause"),
    [
        (NumpyNoise, "numpy.random moved on"),
        (PythonDepth, "python's random module moved on"),
        (OwnGenerator, "its own random generator 'rng' moved on"),
        (Counting, "its attribute(s) 'calls' changed during the call"),
    ],
)
def test_a_block_that_is_not_deterministic_is_named_with_the_cause(block, cause):
    for report in (
        check_block(block(), torch.randn(4, WIDTH)),
        check_model(nn.Sequential(Branch(), block(), Branch()), torch.randn(4, WIDTH), blocks=["0", "1", "2"]),
    ):
        assert not report.ok
        found = the_only(of(report, "determinism", "error"))
        assert found.block in (block.__name__, "1")
        assert cause in found.what
        assert "entries" in found.what and found.figure > 1e-4
        with pytest.raises(AssertionError, match="FAILS"):
            report.raise_if_failed()


def test_gradients_that_recomputation_spoils_are_named_under_keep():
    report = check_model(nn.Sequential(Branch(), Counting(), Branch()), torch.randn(4, WIDTH), blocks=["0", "1", "2"])
    wrong = [f for f in of(report, "gradients", "error") if "Keep()" in f.what]
    assert "1" in {f.block for f in wrong}


def test_a_counter_that_does_not_matter_is_a_note():
    report = check_block(CountsInVain(), torch.randn(4, WIDTH))
    assert report.ok
    assert "'calls'" in the_only(of(report, "determinism", "note")).what


def test_a_block_that_changes_its_input_is_noted_and_exact():
    report = check_block(ChangesItsInput(), torch.randn(4, WIDTH))
    report.raise_if_failed()
    note = the_only(of(report, "arguments"))
    assert (note.level, note.block) == ("note", "ChangesItsInput")
    assert "in place" in note.what


def test_a_block_that_changes_another_argument_is_an_error():
    report = check_block(ChangesItsContext(), (torch.randn(4, WIDTH), torch.randn(4, WIDTH)))
    error = the_only(of(report, "arguments"))
    assert (error.level, error.block) == ("error", "ChangesItsContext")
    assert "changes argument 1 in place" in error.what
    assert any("was changed in place between the forward and the backward" in f.what for f in report.errors)


def test_a_block_that_changes_the_shape_is_an_error_and_in_a_model_a_warning():
    report = check_block(Widening(), torch.randn(4, WIDTH))
    error = the_only(of(report, "stream"))
    assert (error.level, error.block) == ("error", "Widening")
    assert "from [4, 16] to [4, 32]" in error.what
    model = nn.Sequential(Branch(), Branch(), Widening(), Branch(width=2 * WIDTH))
    report = check_model(model, torch.randn(4, WIDTH), blocks=list(model))
    assert report.ok
    assert the_only(of(report, "stream", "warning")).block == "2"


def test_a_block_that_returns_no_tensor_is_an_error():
    report = check_block(ReturnsNothing(), torch.randn(4, WIDTH))
    assert "returns str, which holds no tensor" in the_only(report.errors).what
    assert the_only(report.errors).block == "ReturnsNothing"


def test_a_block_that_does_not_contract_fails_under_reverse():
    report = check_block(Branch(scale=9.0), torch.randn(4, WIDTH), policy=abyssal.Reverse(refine=1))
    assert not report.ok
    error = the_only(report.errors)
    assert "under Reverse(1): relative error" in error.what and "beyond the tolerance" in error.what
    assert error.block == "Branch" and error.figure > 1e-2
    assert "does not contract" in the_only(of(report, "contraction", "warning")).what
    assert "under Keep(): equal" in the_only(of(report, "gradients", "ok")).what


def test_one_expanding_block_of_a_model_is_named():
    model = network(depth=4)
    model[2].scale = 9.0
    report = check_model(model, torch.randn(8, 3))
    assert not report.ok
    assert {f.block for f in of(report, "contraction", "warning")} == {"2"}
    assert all("2 (" in f.what for f in of(report, "gradients", "error"))


def test_without_a_policy_one_that_passes_is_enough():
    report = check_block(Branch(scale=0.3), torch.randn(4, WIDTH))
    assert report.ok
    assert "Reverse(0)" in of(report, "gradients", "warning")[0].what


def test_the_contraction_is_that_of_the_block():
    linear = Branch(scale=1.0)
    linear.forward = lambda x: 1.2 * x  # x + 0.2 x: the error falls by 0.2 per refinement
    found = the_only(of(check_block(linear, torch.randn(4, WIDTH)), "contraction"))
    assert found.figure == pytest.approx(0.2)
    assert "contracts by 0.2 per refinement: Reverse(2) restores its input to 8e-03" in found.what


def test_a_block_that_is_not_called_is_a_warning():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Branch(), Branch(), Branch()])

        def forward(self, x):
            return self.blocks[2](self.blocks[0](x))

    report = check_model(Skips(), torch.randn(4, WIDTH))
    assert report.ok
    assert the_only(of(report, "stream", "warning")).block == "blocks.1"


# ---------------------------------------------------------------------- the kit would notice a broken engine


def _reset_nothing(state):
    from contextlib import nullcontext

    return nullcontext()


def test_the_kit_fails_if_random_state_is_not_put_back(monkeypatch):
    monkeypatch.setattr(surroundings, "_random_state_put", _reset_nothing)
    report = check_model(nn.Sequential(*(Attention() for _ in range(3))), torch.randn(2, 5, WIDTH))
    assert {f.block for f in of(report, "random numbers", "error")} >= {"0", "1", "2"}
    assert any("Keep()" in f.what for f in of(report, "gradients", "error"))


def test_the_kit_fails_if_buffers_are_not_put_back(monkeypatch):
    monkeypatch.setattr(surroundings, "_buffers_put", _reset_nothing)
    report = check_model(nn.Sequential(Convolution(), Convolution()), torch.randn(2, 4, 8, 8))
    assert {f.block for f in of(report, "buffers", "error")} == {"0", "1"}


def test_the_kit_fails_if_nothing_is_handed_down(monkeypatch):
    model, batch, asked = (
        network(depth=8),
        torch.randn(8, 3),
        {"policy": abyssal.Reverse(1), "tolerance": 1e-3},
    )
    assert check_model(model, batch, **asked).ok
    monkeypatch.setattr(policy.Reverse, "hand_down", lambda self, s, y, g, kept=None: y)
    assert not check_model(model, batch, **asked).ok


def test_the_kit_fails_if_the_input_is_restored_without_solving(monkeypatch):
    monkeypatch.setattr(policy, "_refine", lambda y, times, block: torch.zeros_like(y))
    assert not check_block(Branch(), torch.randn(4, WIDTH), policy=abyssal.Reverse(refine=1)).ok


def test_the_kit_fails_if_blocks_are_linked_through_what_was_not_seen(monkeypatch):
    ends = []
    monkeypatch.setattr(open_ends.Linker, "open", lambda self, cell, output: ends.append(cell))
    monkeypatch.setattr(open_ends.Linker, "match", lambda self, stream: ends.pop() if ends else None)
    model = nn.Sequential(Branch(), nn.Softplus(), Branch())
    assert not check_model(model, torch.randn(4, WIDTH), policy=abyssal.Reverse(refine=1)).ok


def test_the_kit_fails_if_gradients_stop_at_the_input(monkeypatch):
    whole = Call.rerun

    def cut(self, x):
        self.requires_grad = False
        return whole(self, x)

    monkeypatch.setattr(Call, "rerun", cut)
    assert not check_model(network(), torch.randn(4, 3)).ok


# ---------------------------------------------------------------------- nothing of the user's is touched


def _state(model):
    return {
        "tensors": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=True),
        "python": random.getstate(),
    }


def _assert_same(a, b):
    assert [a[key] for key in ("modes", "attributes", "python")] == [
        b[key] for key in ("modes", "attributes", "python")
    ]
    assert all(torch.equal(t, b["tensors"][name]) for name, t in a["tensors"].items())
    assert torch.equal(a["torch"], b["torch"])
    assert all(np.array_equal(x, y) for x, y in zip(a["numpy"], b["numpy"], strict=True))
    for g, h in zip(a["gradients"], b["gradients"], strict=True):
        assert (g is None and h is None) or torch.equal(g, h)


@pytest.mark.parametrize("patched", [False, True])
def test_the_users_model_is_left_as_it_was(patched):
    torch.manual_seed(1)
    blocks = [Convolution(), Convolution(), Convolution()]
    model = nn.Sequential(*blocks, nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 2))
    model[1].eval()
    batch = torch.randn(2, 4, 6, 6)
    model(batch).sum().backward()
    model[0].conv.weight.grad = None
    if patched:
        abyssal.reconstruct(model, abyssal.Reverse(refine=1), blocks=blocks)
    before, batch_before = _state(model), batch.clone()
    gradients = [p.grad for p in model.parameters()]
    check_model(model, batch, blocks=blocks)
    _assert_same(before, _state(model))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(batch, batch_before) and batch.grad is None


@pytest.mark.parametrize("block", [NumpyNoise, PythonDepth, OwnGenerator, Counting, ChangesItsInput])
def test_a_faulty_block_is_left_as_it_was_too(block):
    block, example = block(), torch.randn(4, WIDTH)
    rng = copy.deepcopy(getattr(block, "rng", None))
    before, example_before = _state(block), example.clone()
    check_block(block, example)
    _assert_same(before, _state(block))
    assert getattr(block, "calls", 0) == 0
    assert rng is None or torch.equal(rng.get_state(), block.rng.get_state())
    assert torch.equal(example, example_before)


def test_all_is_put_back_when_the_model_raises():
    class Raises(Branch):
        def forward(self, x):
            torch.rand(1), np.random.rand()
            raise RuntimeError("the user's own")

    block, example = Raises(), torch.randn(4, WIDTH)
    before = _state(block)
    with pytest.raises(RuntimeError, match="the user's own"):
        check_block(block, example)
    _assert_same(before, _state(block))


# ---------------------------------------------------------------------- the report


def test_the_report_is_text_and_data():
    report = check_model(network(NumpyNoise), torch.randn(4, 3))
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "numpy.random" in text and "1 ... 4 (4)" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False and data["subject"] == "Sequential"
    assert {"level", "check", "block", "what", "advice", "figure"} == set(data["findings"][0])


def test_a_deep_models_report_is_short():
    text = str(check_model(network(depth=60), torch.randn(4, 3), policy=abyssal.Reverse(1)))
    assert "1 ... 60 (60)" in text
    assert len(text.splitlines()) < 30


def test_what_cannot_be_checked_is_refused_in_words():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function"):
        check_model(lambda x: x, torch.randn(2))
    with pytest.raises(abyssal.NoBlocksError):
        check_model(nn.Linear(3, 3), torch.randn(2, 3))
    uncopied = Branch()
    uncopied.cache = uncopied.inner.weight * 2
    with pytest.raises(TypeError, match="works on a copy"):
        check_block(uncopied, torch.randn(2, WIDTH))
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="depends on nothing that needs a gradient"):
        check_model(frozen, torch.randn(2, 3))
