import numpy as np
import pytest
import torch
from scipy.stats import nbinom, poisson

from cctrain.training.objective import negative_log_likelihood
from tests.model.reference import nb_nll

COUNTS = np.unique(np.concatenate([np.arange(40), np.geomspace(40, 60_000, 30).astype(np.int64)]))
LOG_MU = np.linspace(-15, 11, 40)
LOG_THETA = np.linspace(-7, 9.3, 40)


def grid() -> list[torch.Tensor]:
    """Counts, log μ and log θ in fp32, every combination."""
    return [
        torch.from_numpy(values.ravel()).float() for values in np.meshgrid(COUNTS, LOG_MU, LOG_THETA, indexing="ij")
    ]


def test_it_is_the_negative_binomial_to_the_last_digit_of_fp32():
    counts, log_mu, log_theta = grid()
    ours = negative_log_likelihood(counts, log_mu, log_theta)
    right = nb_nll(counts.numpy(), log_mu.numpy(), log_theta.numpy())
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.double().numpy(), right, rtol=2e-7, atol=2e-7)


def test_in_fp64_it_is_exact_to_ten_digits():
    values = [tensor.double() for tensor in grid()]
    ours = negative_log_likelihood(*values)
    np.testing.assert_allclose(ours.numpy(), nb_nll(*(tensor.numpy() for tensor in values)), rtol=1e-10, atol=1e-9)


def test_terms_that_cancel_lose_nothing():
    """60,000 counts where as many were expected: terms of 600,000 nats whose sum is about 6."""
    for log_theta in (-6.0, 2.0, 3.0, 9.0):
        counts, log_mu = torch.tensor([60_000.0]), torch.tensor([60_000.0]).log()
        ours = negative_log_likelihood(counts, log_mu, torch.tensor([log_theta]))
        theta, mu = np.exp(log_theta), np.exp(float(log_mu))
        assert float(ours) == pytest.approx(-nbinom.logpmf(60_000, theta, theta / (theta + mu)), rel=1e-6)


def test_gradients_are_finite_and_right_all_over_the_range():
    counts, log_mu, log_theta = grid()
    log_mu.requires_grad_()
    log_theta.requires_grad_()
    negative_log_likelihood(counts, log_mu, log_theta).sum().backward()
    assert torch.isfinite(log_mu.grad).all()
    assert torch.isfinite(log_theta.grad).all()
    x, mu, theta = counts.double(), log_mu.detach().double().exp(), log_theta.detach().double().exp()
    by_mu = (mu - x) * theta / (mu + theta)
    torch.testing.assert_close(log_mu.grad.double(), by_mu, rtol=1e-5, atol=1e-6)
    psi = torch.digamma(x + theta) - torch.digamma(theta)
    by_theta = theta * (torch.log1p(mu / theta) - psi) + theta * (x - mu) / (theta + mu)
    # The formula itself cancels where theta is large, to about 1e-8 of its terms.
    torch.testing.assert_close(log_theta.grad.double(), by_theta, rtol=1e-5, atol=1e-4)


def test_gradients_agree_with_finite_differences_on_both_sides_of_every_branch():
    counts = torch.tensor([0.0, 1.0, 7.0, 300.0], dtype=torch.float64).repeat_interleave(6)
    log_theta = torch.tensor([-6.0, 0.0, 2.0, 2.1, 5.0, 9.0], dtype=torch.float64).repeat(4).requires_grad_()
    log_mu = torch.linspace(-5, 6, 24, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: negative_log_likelihood(counts, a, b), (log_mu, log_theta))


def test_probabilities_sum_to_one():
    counts = torch.arange(20_000, dtype=torch.float64)
    for log_mu, log_theta in ((1.0, -0.5), (3.0, 2.5), (-4.0, -3.0), (4.0, 9.0)):
        both = torch.full_like(counts, log_mu), torch.full_like(counts, log_theta)
        assert float((-negative_log_likelihood(counts, *both)).exp().sum()) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("log_theta", [12.0, 20.0, 40.0, 80.0])
def test_it_turns_into_a_poisson_as_theta_grows(log_theta):
    counts, log_mu = torch.tensor([0.0, 1.0, 5.0, 40.0]), torch.tensor([-3.0, 0.5, 2.0, 3.5])
    log_theta = torch.full((4,), log_theta, requires_grad=True)
    ours = negative_log_likelihood(counts, log_mu, log_theta)
    right = -poisson.logpmf(counts.numpy(), np.exp(log_mu.double().numpy()))
    tolerance = 1e-6 + 1_000 * np.exp(-log_theta.detach().numpy())
    assert np.all(np.abs(ours.detach().numpy() - right) < tolerance)
    ours.sum().backward()
    assert torch.all(log_theta.grad.abs() < 1e-2)


def test_the_result_has_the_precision_of_the_prediction():
    counts = torch.tensor([3.0])
    for dtype in (torch.float32, torch.float64):
        assert negative_log_likelihood(counts, torch.ones(1, dtype=dtype), torch.ones(1)).dtype == dtype
