"""Models that other people wrote: transformers, timm, torchvision, and accelerate and PEFT around them."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import abyssal
from toys.distributed import relative_error
from toys.huggingface import (
    DEPTH,
    MAKERS,
    TOKENS,
    Maker,
    bert,
    calm,
    gpt2,
    import_transformers,
    llama,
    loss_of,
    make,
    step,
    t5,
    timm_convnext,
    timm_vit,
    torchvision_resnet18,
    vit,
)

# Everything is in float64. Gradients of what several layers share (tied embeddings, T5's position bias) are
# summed in another order, since backward nodes run by the order in which they were made.
ROUNDING = 1e-13
KEEP, REVERSE = abyssal.Keep(), abyssal.Reverse(refine=8)
# How many chains link where Reverse restores; each stage of a convolutional network is one.
CHAINS = {gpt2: 1, llama: 1, bert: 1, vit: 1, t5: 2, timm_vit: 1, timm_convnext: 4}
CAUSAL = [gpt2, llama]
LANGUAGE = [gpt2, llama, t5]


def name_of(value: Any) -> str:
    return getattr(value, "__name__", str(value))


def agrees_with_its_certificate(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], model: nn.Module, restorable: float = 1e-7
) -> None:
    """The gradient's error is of the order of the largest state's, which is small in calmed blocks."""
    error = abyssal.certificate(model).error
    assert error is not None
    assert error < restorable
    assert relative_error(ours, theirs) <= max(100 * error, ROUNDING)


def restorable_to(maker: Maker) -> float:
    return 2e-3 if maker is bert else 1e-7


# ---------------------------------------------------------------------- gradients


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("maker", MAKERS, ids=name_of)
def test_kept_gradients_buffers_and_random_state_equal_those_without_us(maker: Maker, training: bool) -> None:
    plain, batch = make(maker)
    model = abyssal.reconstruct(make(maker)[0], KEEP)
    plain.train(training)
    model.train(training)
    for _ in range(2):
        theirs = step(plain, batch)
        drawn = torch.get_rng_state()
        ours = step(model, batch)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert relative_error(ours, theirs) <= ROUNDING
    for (name, buffer), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, expected), name  # BatchNorm's statistics are updated once per step
    assert abyssal.certificate(model).error == 0.0


@pytest.mark.parametrize("maker", CHAINS, ids=name_of)
def test_reversed_gradients_are_as_good_as_the_certificate_says(maker: Maker) -> None:
    plain, batch = make(maker)
    model = abyssal.reconstruct(calm(make(maker)[0]), REVERSE)
    calm(plain)
    plain.train()
    model.train()
    agrees_with_its_certificate(step(model, batch), step(plain, batch), model, restorable_to(maker))
    refused = maker is bert  # its layers end in a LayerNorm: each keeps its own input
    assert abyssal.certificate(model).chains == (len(abyssal.certificate(model).blocks) if refused else CHAINS[maker])


def test_a_reversed_resnet_updates_its_running_statistics_once_per_step() -> None:
    """A ReLU after the sum forgets the state: reversal is refused, and the certificate says so."""
    plain, batch = make(torchvision_resnet18)
    model = abyssal.reconstruct(make(torchvision_resnet18)[0], abyssal.Reverse(refine=2))
    for number in range(1, 3):
        step(plain, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", abyssal.DriftWarning)
            step(model, batch)
        assert model.layer1[0].bn1.num_batches_tracked == number
    for (name, buffer), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    assert abyssal.certificate(model).error == 0.0
    assert "comes out of a ReLU" in abyssal.certificate(model).blocks[0].note


@pytest.mark.parametrize("maker", [gpt2, llama, bert, vit, t5], ids=name_of)
@pytest.mark.parametrize("policy", [KEEP, REVERSE], ids=str)
def test_a_loss_on_every_hidden_state(maker: Maker, policy: abyssal.Policy) -> None:
    found = []
    for policy_or_none in (None, policy):
        model, batch = make(maker)
        calm(model).eval()
        if policy_or_none is not None:
            abyssal.reconstruct(model, policy_or_none)
        output = model(**batch, output_hidden_states=True)
        states = [s for key in output if "hidden_states" in key for s in output[key]]
        assert len(states) == (DEPTH + 1) * (2 if maker is t5 else 1)
        (output.loss + sum(state.square().mean() for state in states)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    agrees_with_its_certificate(found[1], found[0], model, restorable_to(maker))


# ---------------------------------------------------------------------- key-value caches


@pytest.mark.parametrize("maker", LANGUAGE, ids=name_of)
def test_generate_gives_the_same_tokens_before_and_after_training_steps(maker: Maker) -> None:
    tokens: list[list[Any]] = []
    for reconstructed in (False, True):
        model, batch = make(maker)
        if reconstructed:
            abyssal.reconstruct(model, KEEP)
        given = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        tokens.append([])
        for _ in range(2):
            model.eval()
            tokens[-1] += [model.generate(**given, **options, use_cache=use).tolist() for use in (True, False)]
            step(model.train(), batch)
            optimiser.step()
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("maker", CAUSAL, ids=name_of)
def test_an_empty_cache_is_dropped_with_a_note(maker: Maker) -> None:
    """transformers hands its layers one whenever `use_cache` is on, as it is by default, in eval mode too."""
    plain, batch = make(maker)
    model = abyssal.reconstruct(make(maker)[0], KEEP)
    cache = import_transformers().DynamicCache()
    theirs = step(plain.eval(), batch)
    assert relative_error(step(model.eval(), batch, past_key_values=cache), theirs) <= ROUNDING
    assert cache.get_seq_length() == 0
    assert "empty key-value cache is dropped" in abyssal.certificate(model).blocks[0].note
    step(model, batch, use_cache=False)


@pytest.mark.parametrize("policy", [KEEP, REVERSE], ids=str)
@pytest.mark.parametrize("maker", CAUSAL, ids=name_of)
def test_a_prefix_in_the_cache_runs_stored_and_gets_its_gradients(maker: Maker, policy: abyssal.Policy) -> None:
    found = []
    for policy_or_none in (None, policy):
        model, batch = make(maker)
        if policy_or_none is not None:
            abyssal.reconstruct(model, policy_or_none)
        cache = import_transformers().DynamicCache()
        prefix = {}
        for layer in range(DEPTH):
            for part in ("keys", "values"):
                generator = torch.Generator().manual_seed(layer)
                state = torch.randn(2, 2, 3, 32 // model.config.num_attention_heads, generator=generator)
                prefix[f"{part}.{layer}"] = state.double().requires_grad_()
            cache.update(prefix[f"keys.{layer}"], prefix[f"values.{layer}"], layer)
        ids = {key: batch[key] for key in ("input_ids", "labels")}
        found.append(step(model, ids, past_key_values=cache))
        found[-1] |= {key: state.grad for key, state in prefix.items()}
        assert cache.get_seq_length() == 3 + TOKENS
    assert relative_error(found[1], found[0]) == 0.0
    for block in abyssal.certificate(model).blocks:
        assert "ran as Store(): a key-value cache that is not empty" in block.note


# ---------------------------------------------------------------------- gradient checkpointing


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("maker", [gpt2, llama, bert, vit, t5], ids=name_of)
def test_gradient_checkpointing_that_is_enabled_is_taken_over(maker: Maker) -> None:
    plain, batch = make(maker)
    model, _ = make(maker)
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="gradient checkpointing was enabled") as told:
        abyssal.reconstruct(model, KEEP)
    assert told[0].filename == __file__
    assert not model.is_gradient_checkpointing
    assert relative_error(step(model.train(), batch), step(plain.train(), batch)) <= ROUNDING


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_layers_that_are_not_ours_stay_checkpointed() -> None:
    plain, batch = make(gpt2)
    model, _ = make(gpt2)
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="gradient checkpointing was enabled"):
        abyssal.reconstruct(model, KEEP, blocks="transformer.h.1")
    assert [layer.gradient_checkpointing for layer in model.transformer.h] == [True, False, True]
    assert relative_error(step(model.train(), batch), step(plain.train(), batch)) <= ROUNDING


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_gradient_checkpointing_enabled_afterwards_is_right_and_told_once() -> None:
    plain, batch = make(gpt2)
    model = abyssal.reconstruct(calm(make(gpt2)[0]), REVERSE)
    calm(plain)
    model.gradient_checkpointing_enable()  # as transformers' Trainer does
    with pytest.warns(UserWarning, match="after abyssal.reconstruct") as told:
        ours = [step(model.train(), batch) for _ in range(2)]
    assert sum("after abyssal.reconstruct" in str(w.message) for w in told) == 1
    agrees_with_its_certificate(ours[1], step(plain.train(), batch), model)
    assert "gradient checkpointing" in abyssal.certificate(model).blocks[0].note


# ---------------------------------------------------------------------- autocast


def autocast_step(maker: Maker, policy: abyssal.Policy | None, cache: bool = True) -> dict[str, Tensor]:
    model, batch = make(maker, torch.float32)
    calm(model).eval()
    if policy is not None:
        abyssal.reconstruct(model, policy)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        loss = loss_of(model(**batch))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("maker", MAKERS, ids=name_of)
def test_kept_gradients_under_autocast_equal_those_of_plain_autocast(maker: Maker) -> None:
    ours, theirs = autocast_step(maker, KEEP), autocast_step(maker, None)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("maker", [gpt2, llama, bert, vit, t5, timm_vit], ids=name_of)
def test_no_gradient_is_lost_in_the_weight_cache_of_autocast(maker: Maker) -> None:
    """A weight cast where a state is restored, without a graph, must not be found by the one with a graph."""
    ours = autocast_step(maker, abyssal.Reverse(refine=1))
    uncached = autocast_step(maker, abyssal.Reverse(refine=1), cache=False)
    assert ours.keys() == uncached.keys() == autocast_step(maker, None).keys()
    assert all(torch.equal(ours[name], uncached[name]) for name in uncached)


# ---------------------------------------------------------------------- accelerate and PEFT


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_prepare(when: str, mixed_precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    found = []
    for reconstructed in (False, True):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # it is a singleton
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
        model, batch = make(gpt2, torch.float32)
        if reconstructed and when == "before":
            abyssal.reconstruct(model, KEEP)
        model, optimiser = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if reconstructed and when == "after":
            abyssal.reconstruct(model, KEEP)
        torch.manual_seed(1)
        accelerator.backward(model(**batch).loss)
        found.append({name: p.grad.clone() for name, p in accelerator.unwrap_model(model).named_parameters()})
        optimiser.step()
    assert abyssal.certificate(model).error == 0.0
    assert relative_error(found[1], found[0]) < 1e-6  # float32, and tied embeddings summed in another order


@pytest.mark.parametrize("policy", [KEEP, REVERSE], ids=str)
@pytest.mark.parametrize("order", ["hooks first", "hooks later"])
def test_accelerate_hooks_that_set_a_forward_are_given_back(policy: abyssal.Policy, order: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    plain, batch = make(gpt2)
    model = calm(make(gpt2)[0])
    calm(plain)
    if order == "hooks later":
        abyssal.reconstruct(model, policy)
    for layer in model.transformer.h:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    hooked = [layer.__dict__["forward"] for layer in model.transformer.h]
    if order == "hooks first":
        abyssal.reconstruct(model, policy)
    theirs = step(plain, batch)
    agrees_with_its_certificate(step(model, batch), theirs, model)
    abyssal.release(model)
    assert [layer.__dict__["forward"] for layer in model.transformer.h] == hooked
    assert relative_error(step(model, batch), theirs) <= ROUNDING
    with pytest.raises(ValueError, match="not reconstructed"):
        abyssal.certificate(model)
    abyssal.reconstruct(model, policy)
    agrees_with_its_certificate(step(model, batch), theirs, model)


def test_accelerate_dispatch() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, batch = make(gpt2)
    model = accelerate.dispatch_model(calm(make(gpt2)[0]), {"": "cpu"}, force_hooks=True, main_device="cpu")
    abyssal.reconstruct(model, REVERSE)
    agrees_with_its_certificate(step(model, batch), step(calm(plain), batch), model)
    assert abyssal.certificate(model).chains == 1


@pytest.mark.parametrize("policy", [KEEP, REVERSE], ids=str)
def test_peft_lora_trains_adapters_whose_first_input_needs_no_gradient(policy: abyssal.Policy) -> None:
    import_transformers()
    peft = pytest.importorskip("peft")
    found = []
    for policy_or_none in (None, policy):
        model, batch = make(llama)
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, lora_alpha=1, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(calm(model), config).double()
        if policy_or_none is not None:
            abyssal.reconstruct(model, policy_or_none)
        found.append(step(model.train(), batch))
    assert all("lora" in name for name in found[0])
    assert len(found[0]) == 4 * DEPTH
    agrees_with_its_certificate(found[1], found[0], model)


# ---------------------------------------------------------------------- copies, saving


@pytest.mark.parametrize("maker", [gpt2, llama, t5, timm_vit, torchvision_resnet18], ids=name_of)
def test_copies_keep_keys_and_get_their_own_gradients(maker: Maker) -> None:
    plain, batch = make(maker)
    keys = list(plain.state_dict())
    theirs = step(plain, batch)
    model = abyssal.reconstruct(make(maker)[0], KEEP)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(copied.state_dict()) == keys
        assert type(copied) is type(plain)
        assert relative_error(step(copied, batch), theirs) <= ROUNDING
        assert abyssal.certificate(copied).error == 0.0
        assert all(p.grad is None for p in model.parameters())


def test_save_pretrained_writes_what_it_writes_without_us(tmp_path: Any) -> None:
    plain, _ = make(gpt2)
    model = abyssal.reconstruct(make(gpt2)[0], REVERSE)
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "theirs")
    again = type(plain).from_pretrained(tmp_path / "ours")
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name].double(), value)
    ours, theirs = (sorted(p.name for p in (tmp_path / which).iterdir()) for which in ("ours", "theirs"))
    assert ours == theirs
