"""The negative log-likelihood of hidden counts, and how a step's loss is normalised.

Negative binomial with mean μ and variance μ + μ²/θ:

    log p(x) = [log Γ(x+θ) − log Γ(θ) − x log θ] − log x! + x log μ − (x + θ) log(1 + μ/θ)

The terms cancel: for 60,000 counts where as many were expected each is about 600,000 and their sum 6, which
fp32 would give as 6 ± 0.2. So the sum is computed in fp64, whatever the precision of the inputs. The bracket is
a difference of large numbers when θ is large; it is computed as such a difference only for θ < 8, and by
Stirling's series above, where its terms have the size of the result.

The loss of a step is the sum over the targets of the whole global batch divided by their number. Nothing
else normalises: no mean per context, per micro-batch or per rank.
"""

import torch
from torch import Tensor

_STIRLING_FROM = 8.0


def negative_log_likelihood(counts: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """Nats for each target; counts, log μ and log θ are fp32 (or fp64) of one shape, and so is the result."""
    x, log_mean, log_dispersion = counts.double(), log_mu.double(), log_theta.double()
    theta = log_dispersion.exp()
    ratio = torch.exp(log_mean - log_dispersion)
    log_likelihood = (
        _log_rising_factorial_over_power(x, theta)
        - torch.lgamma(x + 1)
        + x * log_mean
        - (x + theta) * torch.log1p(ratio)
    )
    return -log_likelihood.to(log_mu.dtype)


def _log_rising_factorial_over_power(x: Tensor, theta: Tensor) -> Tensor:
    """log Γ(x+θ) − log Γ(θ) − x log θ, to about 1e-10 in fp64 for any θ."""
    large = theta >= _STIRLING_FROM
    safe_small = torch.where(large, torch.ones_like(theta), theta)
    small_form = torch.lgamma(x + safe_small) - torch.lgamma(safe_small) - x * safe_small.log()
    safe_large = torch.where(large, theta, torch.full_like(theta, _STIRLING_FROM))
    large_form = (
        (x + safe_large - 0.5) * torch.log1p(x / safe_large)
        - x
        + _stirling_correction(x + safe_large)
        - _stirling_correction(safe_large)
    )
    return torch.where(large, large_form, small_form)


def _stirling_correction(z: Tensor) -> Tensor:
    """The series after (z − ½) log z − z + ½ log 2π (Abramowitz and Stegun 6.1.41); 3e-10 at z = 8."""
    inverse = 1 / z
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square / 1260))
