"""The default: bits as the increments ask for, blocks that route or cannot be coded kept, and no device asked twice."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import abyssal
from abyssal.codec.quantiser import Codec
from abyssal.engine import auto
from abyssal.engine.auto import AUTO_ACCURACY
from toys.blocks import relative
from toys.huggingface import import_transformers
from toys.streams import WIDTH, Seen, absolute, batch, stack, step, true_and_restored

AUTO = abyssal.Code("auto")


def policies(model: nn.Module) -> list[str]:
    """What each block's input is restored by; a chain's first block has no bits to choose."""
    return [block.policy.removesuffix(", end").removesuffix(", start") for block in abyssal.certificate(model).blocks]


def reconstructed(model: nn.Sequential, policy: abyssal.Policy | None = None) -> nn.Sequential:
    abyssal.reconstruct(model, policy, blocks=list(model))
    return model


# ---------------------------------------------------------------------- bits


def test_bits_rise_with_the_increment_beside_the_state() -> None:
    def chosen(scale: float) -> str:
        model = reconstructed(stack([0.0, scale, 0.0, 0.0]))
        step(model, batch())
        return policies(model)[2]  # its input is where the increment is coded

    assert [chosen(scale) for scale in (0.01, 0.1, 0.3, 1.0, 3.0)] == ["Code(4)"] * 3 + ["Code(6)"] * 2
    # An increment is as large as the state at most, unless the state before it was as large: so give and take.
    ranks = [6.0 if "6" in chosen(scale) else 4.0 for scale in torch.logspace(-3, 1, 12).tolist()]
    assert ranks == sorted(ranks)


class Takes(Seen):
    """Takes the state away and leaves a small one."""

    share = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach().clone())
        return x * (1 - self.share) + 1e-6 * self.branch(x)


@pytest.mark.parametrize(("share", "policy"), [(0.1, "Code(4)"), (0.3, "Code(6)"), (0.7, "Code(8)"), (0.9, "Keep()")])
def test_a_state_that_is_small_beside_the_increment_takes_more_bits_and_in_the_end_is_kept(
    share: float, policy: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Seen(0.1), Takes(), Seen(1e-4), Seen(1e-4))
    model[1].share = share
    step(reconstructed(model), batch())
    found = abyssal.certificate(model)
    assert policies(model)[2] == policy
    assert found.drifted == []
    if policy == "Keep()":
        assert "needs more than 8 bits" in found.blocks[2].note


@pytest.mark.parametrize("scale", [0.03, 0.3, 1.0, 3.0])
def test_the_certificates_error_is_at_most_the_accuracy(scale: float) -> None:
    torch.manual_seed(0)
    model = reconstructed(nn.Sequential(*[Seen(scale, 256) for _ in range(10)]))
    step(model, torch.randn(256, 256))
    error = abyssal.certificate(model).error
    assert error is not None
    # 128 elements are sampled of 65,536, so the estimate's own standard error is 1/sqrt(2 * 128) = 6 %; of ten blocks
    # the worst is hardly beyond three of them.
    assert 0 < error <= AUTO_ACCURACY * 1.2


def test_fewer_bits_would_not_have_been_enough() -> None:
    for scale in (0.3, 1.0, 3.0):
        model = reconstructed(stack([scale] * 6))
        true, restored = true_and_restored(model, batch())
        chosen = policies(model)
        for i in range(1, 5):
            bits = int(chosen[i].removeprefix("Code(").removesuffix(")"))
            assert absolute(restored[i], true[i]) <= AUTO_ACCURACY * float(true[i].square().mean().sqrt()) * 1.01
            if bits > 4:
                _, coarser = Codec({6: 4, 8: 6}[bits]).encode(true[i] - true[i - 1])
                wrong = (coarser - (true[i] - true[i - 1])).norm(dim=1)
                deviation = (true[i] - true[i].mean(dim=1, keepdim=True)).norm(dim=1)
                assert float((wrong / deviation).square().mean().sqrt()) > 0.9 * AUTO_ACCURACY


class Counting:
    """Counts how often an error is asked for, which reads a number from the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        measure = auto.relative_error

        def counted(residual: Tensor, x: Tensor) -> Tensor:
            self.count += 1
            return measure(residual, x)

        monkeypatch.setattr(auto, "relative_error", counted)


def test_bits_are_chosen_often_at_first_and_then_every_so_many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Counting(monkeypatch)
    monkeypatch.setattr(auto, "_EVERY", 4)
    model = reconstructed(stack([0.1] * 5))
    for number in range(9):
        before = asked.count
        step(model, batch(seed=number))
        # One trial each for the four blocks that are coded: four bits are enough.
        assert asked.count - before == (4 if number in (0, 1, 2, 4, 8) else 0)


def test_bits_follow_the_increments_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_EVERY", 4)
    model = reconstructed(stack([0.1] * 5))
    for _ in range(5):
        step(model, batch())
    for block in model:
        block.scale = 1.2
    seen = []
    for _ in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("error", abyssal.DriftWarning)  # 4 bits are still within what is allowed
            step(model, batch())
        seen.append(policies(model)[1])
    assert seen == ["Code(4)"] * 3 + ["Code(6)"]


def test_a_block_that_drifted_chooses_anew_in_the_next_pass() -> None:
    model = reconstructed(stack([0.01] * 5))
    for _ in range(5):  # the next choice would be in the ninth pass
        step(model, batch())
    assert policies(model)[2] == "Code(4)"
    model[1].scale = 30.0
    with pytest.warns(abyssal.DriftWarning):
        step(model, batch())
    assert "2" in abyssal.certificate(model).drifted
    step(model, batch())
    assert policies(model)[2] == "Code(6)"
    assert abyssal.certificate(model).drifted == []


def test_a_block_called_several_times_gets_what_its_worst_call_needs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Seen(0.1), Seen(0.1)])

        def forward(self, x: Tensor) -> Tensor:
            for factor in (1.0, 1.0, 30.0, 1.0):
                for block in self.blocks:
                    block.scale = 0.1 * factor
                    x = block(x)
            return x

    torch.manual_seed(0)
    model = Tied()
    abyssal.reconstruct(model, blocks=list(model.blocks))
    model(batch())
    records = [r for r in model.blocks[0].forward.session.records if r.block.name == "blocks.0"]
    bits = [r.policy.bits for r in records[1:]]
    assert bits == sorted(bits)
    assert max(bits) > 4


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_infinite_step_does_not_keep_the_blocks_for_ever(bad: float) -> None:
    """Loss scaling tries, overflows and skips: no reason to give the code up."""
    model = reconstructed(stack([0.1] * 5))
    x = batch()
    x[0, 0] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(model, x)
    step(model, batch())
    assert policies(model) == ["Code('auto')", *["Code(4)"] * 4]
    assert 0 < (abyssal.certificate(model).error or 1.0) <= AUTO_ACCURACY


def test_gradient_scaling_skips_and_goes_on() -> None:
    model = reconstructed(stack([0.1] * 5))
    plain = stack([0.1] * 5)
    curves = []
    for each in (plain, model):
        optimiser = torch.optim.SGD(each.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
        losses, skipped = [], 0
        for number in range(12):
            optimiser.zero_grad()
            loss = each(batch(seed=number)).square().mean()
            scaler.scale(loss * 1e3).backward()  # overflows until the scale is small enough
            before = scaler.get_scale()
            scaler.step(optimiser)
            scaler.update()
            skipped += scaler.get_scale() < before
            losses.append(loss.item())
        assert skipped >= 1
        curves.append(torch.tensor(losses))
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("take", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
def test_a_copy_made_in_the_middle_of_training_goes_on(take: Callable[[nn.Module], nn.Module]) -> None:
    model = reconstructed(stack([0.5] * 6))
    for seed in range(2):
        step(model, batch(seed=seed))
        for block in model:
            block.inputs.clear()
    other = take(model)
    assert torch.equal(step(other, batch(seed=9)), step(model, batch(seed=9)))
    assert policies(other) == policies(model)


@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_without_data_the_fewest_bits_are_assumed(mode: str) -> None:
    def run() -> abyssal.Certificate:
        with torch.device("meta") if mode == "meta" else FakeTensorMode():
            model = nn.Sequential(*[Seen(0.3) for _ in range(5)])
            model = reconstructed(model)
            model(torch.empty(512, WIDTH)).sum().backward()
            assert all(p.grad is not None for p in model.parameters())
            return abyssal.certificate(model)

    certificate = run()
    assert [b.policy for b in certificate.blocks] == ["Code('auto'), start", *["Code(4)"] * 3, "Code(4), end"]
    code = Codec(4).nbytes(512 * WIDTH)
    assert all(code <= b.stored_bytes <= code + 64 * 6 for b in certificate.blocks[1:-1])


def test_empty_batches_and_single_features() -> None:
    model = reconstructed(stack([0.1] * 4))
    model(torch.empty(0, WIDTH)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    step(model, batch())
    assert abyssal.certificate(model).drifted == []


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_streams_of_one_feature(rows: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Seen(0.1, width=1) for _ in range(6)])
    plain = step(copy.deepcopy(model), torch.randn(rows, 1, generator=torch.Generator().manual_seed(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", abyssal.DriftWarning)
        found = step(reconstructed(model), torch.randn(rows, 1, generator=torch.Generator().manual_seed(3)))
    assert relative(found, plain) <= AUTO_ACCURACY


@pytest.mark.parametrize("rows", [1, 3])
def test_a_state_of_few_elements_is_measured_by_its_size(rows: int) -> None:
    """One number has no spread; relative to that, any code would be infinitely wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Seen(0.1, width=1) for _ in range(6)])
    abyssal.reconstruct(model, abyssal.Code(8), blocks=list(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", abyssal.DriftWarning)
        step(model, torch.ones(rows, 1))
    assert (abyssal.certificate(model).error or 0.0) <= 1e-2


# ---------------------------------------------------------------------- routing


class Routing(Seen):
    """Sends each row to the one of two experts that its logits choose, by some operation."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__(0.1)
        self.gate, self.other, self.choose = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH), choose

    def branch(self, x: Tensor) -> Tensor:
        chosen = self.choose(self.gate(x)).reshape(-1, 1).float()
        return 0.1 * (chosen * torch.tanh(self.linear(x)) + (1 - chosen) * torch.tanh(self.other(x)))


CHOICES: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": lambda logits: logits.topk(1)[1],
    "argmax": lambda logits: logits.argmax(-1),
    "max": lambda logits: logits.max(-1)[1],
    "sort": lambda logits: logits.sort(-1)[1][:, :1],
    "argsort": lambda logits: logits.argsort(-1)[:, :1],
    "multinomial": lambda logits: logits.softmax(-1).multinomial(1),
}


@pytest.mark.parametrize("how", CHOICES)
def test_blocks_that_route_are_kept_and_only_they(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Seen(0.1), Routing(CHOICES[how]), Seen(0.1), Seen(0.1), Seen(0.1))
    plain = copy.deepcopy(model)
    reconstructed(model)
    for number in range(3):
        torch.manual_seed(number)
        exact = step(plain, batch(seed=number))
        torch.manual_seed(number)
        assert relative(step(model, batch(seed=number)), exact) <= AUTO_ACCURACY
        block = abyssal.certificate(model).blocks[1]
        assert block.policy.startswith(("Keep()", "Code(4)"))
        assert ("routes discretely" in block.note) == (block.policy == "Keep()") or number == 0
        assert torch.equal(model[1].inputs[-1], model[1].inputs[-2])  # at its exact input, in the first step already
    assert policies(model) == ["Code('auto')", "Keep()", "Code('auto')", "Code(4)", "Code(4)"]


@pytest.mark.parametrize("operation", ["relu", "dropout", "max", "where", "clamp"])
def test_ordinary_operations_are_not_taken_for_routing(operation: str) -> None:
    class Ordinary(Seen):
        def branch(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            if operation == "relu":
                h = torch.relu(h)
            elif operation == "dropout":
                h = torch.nn.functional.dropout(h, 0.5)
            elif operation == "max":
                h = h - h.amax(-1, keepdim=True) + torch.softmax(h, -1)
            elif operation == "where":
                h = torch.where(h > 0, h, 0.1 * h)
            else:
                h = h.clamp(-1, 1)
            return 0.05 * h

    torch.manual_seed(0)
    model = reconstructed(nn.Sequential(*[Ordinary() for _ in range(4)]))
    step(model, batch())
    assert "Keep()" not in policies(model)


def test_what_was_asked_for_by_name_is_not_overruled_but_noted() -> None:
    torch.manual_seed(0)
    model = reconstructed(nn.Sequential(*[Routing(CHOICES["topk"]) for _ in range(3)]), abyssal.Code(8))
    step(model, batch())
    assert policies(model) == ["Code(8)"] * 3
    assert "routes discretely (topk)" in abyssal.certificate(model).blocks[0].note


@pytest.mark.slow
def test_compiled_routing_is_told_by_its_name() -> None:
    class SparseMoeBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.gate(x))

    class Layer(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * self.mlp(x)

    torch.manual_seed(0)
    model = nn.Sequential(*[Layer(SparseMoeBlock() if i == 1 else nn.Linear(WIDTH, WIDTH)) for i in range(4)])
    torch.compiler.reset()
    for block in model:
        block.compile(backend="aot_eager")
    reconstructed(model)
    for _ in range(2):
        step(model, batch())
    assert policies(model) == ["Code('auto')", "Keep()", "Code('auto')", "Code(4)"]
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe"])
def test_hugging_faces_mixtures_of_experts_are_kept(kind: str) -> None:
    transformers = import_transformers()
    small = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 61,
    }  # fmt: skip
    more = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    }[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**small, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    plain = copy.deepcopy(model)
    abyssal.reconstruct(model)
    ids = torch.randint(0, 61, (2, 9))
    for _ in range(2):
        found = []
        for each in (plain, model):
            each.zero_grad()
            each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
        assert relative(found[1], found[0]) <= 1e-6
    assert policies(model) == ["Keep()"] * 3
    assert all("routes discretely" in b.note for b in abyssal.certificate(model).blocks)


# ---------------------------------------------------------------------- streams of every kind


class Convolution(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach())
        return x + 0.1 * torch.tanh(self.conv(x))


@pytest.mark.parametrize("size", [(2, 6, 8, 8), (3, 6, 7, 5), (1, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("policy", [abyssal.Code(8), abyssal.Code(8, refine=1, group=40)], ids=str)
def test_image_streams_come_back_in_their_layout(
    policy: abyssal.Policy, layout: torch.memory_format, size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Convolution() for _ in range(5)]).to(memory_format=layout)
    x = torch.randn(size).contiguous(memory_format=layout)
    plain = step(copy.deepcopy(model), x)
    for block in model:
        block.inputs.clear()
    found = step(reconstructed(model, policy), x)
    assert relative(found, plain) <= 2e-3
    for block in model:
        assert block.inputs[-1].stride() == block.inputs[0].stride()
    assert abyssal.certificate(model).chains == 1


def test_blocks_whose_output_is_a_view_of_something_larger() -> None:
    """The certificate compares the elements of the view, not what else is in its memory."""

    class Slice(Seen):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.cat([y, torch.full_like(y, 7.0)], dim=-1)[:, :WIDTH]

    torch.manual_seed(0)
    for policy in (abyssal.Code(8), abyssal.Reverse(8)):
        model = nn.Sequential(*[Slice(0.1) for _ in range(6)])
        plain = step(copy.deepcopy(model), batch())
        assert relative(step(reconstructed(model, policy), batch()), plain) <= 2e-3
        certificate = abyssal.certificate(model)
        assert certificate.drifted == []
        assert certificate.chains == 1


def test_batch_sizes_may_change_from_step_to_step() -> None:
    model = stack([0.1] * 5)
    plain = copy.deepcopy(model)
    reconstructed(model)
    for rows in (16, 3, 40, 1, 0, 16):
        x = torch.randn(rows, WIDTH)
        exact = step(plain, x) if rows else None
        found = step(model, x)
        assert exact is None or relative(found, exact) <= AUTO_ACCURACY


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.cfloat) / 80)

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.weight


def test_complex_streams_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Complex() for _ in range(3)])
    x = torch.randn(4, WIDTH, dtype=torch.cfloat)
    found = []
    for each in (copy.deepcopy(model), reconstructed(model)):
        torch.view_as_real(each(x)).square().mean().backward()
        found.append(torch.view_as_real(torch.cat([p.grad.flatten() for p in each.parameters()])))
    assert torch.equal(*found)
    assert "cannot be coded" in abyssal.certificate(model).blocks[0].note


class Shifts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, WIDTH)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return (ids + 1) % 16, self.table(ids).sin()


def test_integer_streams_are_left_alone() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList([Shifts() for _ in range(3)])
    found = []
    for each in (copy.deepcopy(blocks), abyssal.reconstruct(blocks, blocks=list(blocks))):
        ids, total = torch.arange(8), torch.zeros(())
        for block in each:
            ids, looked_up = block(ids)
            total = total + looked_up.sum()
        total.backward()
        found.append(torch.cat([block.table.weight.grad for block in each]))
    assert torch.equal(*found)
    assert "not floating-point" in abyssal.certificate(blocks).blocks[0].note


def test_streams_by_keyword_and_in_tuples() -> None:
    class Layer(Seen):
        def forward(self, hidden_states: Tensor, *, mask: Tensor) -> tuple[Tensor, None]:
            self.inputs.append(hidden_states.detach().clone())
            return hidden_states + mask * self.branch(hidden_states), None

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(0.1) for _ in range(5)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x, _ = layer(mask=torch.ones(WIDTH), hidden_states=x)
            return x

    torch.manual_seed(0)
    model = Encoder()
    plain = step(copy.deepcopy(model), batch())
    abyssal.reconstruct(model)
    assert relative(step(model, batch()), plain) <= AUTO_ACCURACY
    assert abyssal.certificate(model).chains == 1


@pytest.mark.parametrize("policy", [AUTO, abyssal.Code(4), abyssal.Code(4, refine=1)], ids=str)
def test_under_bfloat16_autocast(policy: abyssal.Policy) -> None:
    model = stack([0.1] * 6)
    plain, exact = copy.deepcopy(model), step(copy.deepcopy(model), batch())
    reconstructed(model, policy)
    found = []
    for each in (plain, model):
        each.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            each(batch()).float().square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in each.parameters()]))
    assert abyssal.certificate(model).chains == 1
    # A state of 2e-2 at most; and another rounding of what is computed from it in bfloat16.
    assert relative(found[1], found[0]) <= AUTO_ACCURACY + 2 * relative(found[0], exact)


@pytest.mark.parametrize("policy", [abyssal.Code(4), abyssal.Code(4, refine=1), AUTO], ids=str)
def test_blocks_compiled_in_place_give_the_gradients_of_the_others(policy: abyssal.Policy) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * torch.tanh(self.linear(x))

    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*[Plain() for _ in range(4)])
    compiled = copy.deepcopy(model)
    for block in compiled:
        block.compile(backend="aot_eager")
    # Equal but for the order of sums, which may turn a code at the border of two levels, one level in 2^4.
    found = [step(reconstructed(each, policy), batch()) for each in (model, compiled)]
    assert relative(found[1], found[0]) <= 1e-4
    assert policies(compiled) == policies(model)
    torch.compiler.reset()
