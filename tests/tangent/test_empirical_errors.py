"""What cannot have a tangent kernel is told so, before any work, with what to do about it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from abyssal.tangent.empirical.ntk import ntk
from toys import kernels as toys


def linear() -> nn.Module:
    return nn.Linear(4, 2)


X = torch.randn(3, 4)


def test_batch_normalisation_in_training_mode_is_refused_by_name():
    model, x, _ = toys.conv_resnet()
    with pytest.raises(ValueError, match=r"1\.norm \(BatchNorm2d\).*model\.eval\(\)"):
        ntk(model.train(), x)
    model = nn.Sequential(linear(), nn.BatchNorm1d(2, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="no running statistics"):
        ntk(model, X)


def test_dropout_in_training_mode_is_refused():
    model = nn.Sequential(linear(), nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"p = 0\.1.*model\.eval\(\)"):
        ntk(model, X)
    assert ntk(model.eval(), X).shape == (3, 3)
    model[1].p = 0.0
    assert ntk(model.train(), X).shape == (3, 3)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h - h.mean(dim=0)


class Noisy(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 0.1 * torch.randn(len(x), 1)


@pytest.mark.parametrize("model", [Mixing, Noisy])
def test_samples_that_interact_and_random_outputs_are_found_by_evaluation(model: type[nn.Module]):
    with pytest.raises(ValueError, match=r"samples interact.*or the model is random"):
        ntk(model(), X)


def test_integer_images_are_told_to_be_floating():
    model, x, _ = toys.conv_resnet()
    images = (x * 100).to(torch.uint8)
    with pytest.raises(TypeError, match=r"argument 0 is torch\.uint8.*/ 255"):
        ntk(model, images)
    with pytest.raises(TypeError, match=r"is torch\.float64, the parameters are torch\.float32"):
        ntk(model, x.double())


def test_there_has_to_be_something_to_differentiate():
    with pytest.raises(ValueError, match="no parameters"):
        ntk(nn.ReLU(), X)
    with pytest.raises(ValueError, match=r"None of the 2 parameters.*requires_grad_"):
        ntk(linear().requires_grad_(False), X)
    with pytest.raises(ValueError, match="fits none of weight, bias"):
        ntk(linear(), X, parameters="wait")
    with pytest.raises(ValueError, match="no samples"):
        ntk(linear(), X[:0])
    with pytest.raises(ValueError, match="x2 has no samples"):
        ntk(linear(), X, X[:0])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ntk(lambda x: x, X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x1 has to be a tensor"):
        ntk(linear(), 3)


def test_values_that_are_not_finite_are_not_made_into_a_kernel():
    bad = X.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite on its first samples"):
        ntk(linear(), bad)
    with pytest.raises(ValueError, match="not finite"):
        ntk(linear(), bad.flip(0))
    with pytest.raises(ValueError, match="not finite"):
        ntk(linear(), 1e25 * X)


def test_outputs_have_to_be_those_of_samples():
    with pytest.raises(ValueError, match="summed over the batch"):
        ntk(linear(), X, output=lambda found: found.sum())
    with pytest.raises(TypeError, match=r"tuple.*output=lambda"):
        ntk(nn.LSTM(4, 2), X[:, None])
    with pytest.raises(ValueError, match="the model has 2 outputs"):
        ntk(linear(), X, outputs=2)
    with pytest.raises(ValueError, match='"trace", "full"'):
        ntk(linear(), X, outputs="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="counts the samples"):
        ntk(nn.Bilinear(4, 4, 2), (X, X[:2]))


def test_a_budget_that_nothing_fits_says_which_would():
    with pytest.raises(ValueError, match=r"budget='10 B' is too small.*Give budget=\d+"):
        ntk(linear(), X, budget="10 B")
    with pytest.raises(ValueError, match="at least 1"):
        ntk(linear(), X, jobs=0)


def test_several_arguments_and_keywords_reach_the_model():
    model = nn.Bilinear(4, 4, 2).double()
    x = X.double()
    by_position = ntk(model, (x, x.flip(1)))
    by_name = ntk(model, {"input1": x, "input2": x.flip(1)})
    assert torch.equal(by_position, by_name)
    features = torch.einsum("ni,nj->nij", x, x.flip(1)).flatten(1)
    assert torch.allclose(by_position, 2 * (features @ features.T + 1), rtol=1e-12)
