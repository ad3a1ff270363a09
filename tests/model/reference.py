"""What the model computes, spelled out: float64, one context, loops over heads and queries, plain formulas.

One criss-cross layer, pre-norm, with tokens X (n, d) and latents L (M, d_latent), in this order:

    L ← L + Read (norm L, norm X)      latents ask, tokens answer
    L ← L + MLP  (norm L)
    X ← X + Write(norm X, norm L)      tokens ask, the updated latents answer
    X ← X + MLP  (norm X)

and its dense control, self-attention over the tokens. Every fast path is compared with this file, so it
shares no code with them and takes no short cut: no masks, no packing, no batches, no fused operation.
Parameters are a dict of arrays by name; a linear map is y = W x + b with W of shape (out, in).
"""

import math

import numpy as np
from scipy.special import gammaln

EPSILON = 1e-5

Parameters = dict[str, np.ndarray]


def criss_cross_layer(
    params: Parameters, tokens: np.ndarray, latents: np.ndarray, heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n, d) and latents (M, d_latent) after one layer; n may be 0."""
    params = _float64(params)
    tokens = np.array(tokens, dtype=np.float64)
    latents = np.array(latents, dtype=np.float64)

    asking = _layer_norm(latents, params["read.norm_latents.weight"])
    answering = _layer_norm(tokens, params["read.norm_tokens.weight"])
    latents = latents + _attention(params, "read", asking, answering, heads)
    latents = latents + _mlp(params, "latent_mlp", latents)

    asking = _layer_norm(tokens, params["write.norm_tokens.weight"])
    answering = _layer_norm(latents, params["write.norm_latents.weight"])
    tokens = tokens + _attention(params, "write", asking, answering, heads)
    tokens = tokens + _mlp(params, "token_mlp", tokens)
    return tokens, latents


def dense_layer(params: Parameters, tokens: np.ndarray, heads: int) -> np.ndarray:
    """Tokens (n, d) after one layer of self-attention and MLP."""
    params = _float64(params)
    tokens = np.array(tokens, dtype=np.float64)
    normed = _layer_norm(tokens, params["attention.norm.weight"])
    tokens = tokens + _attention(params, "attention", normed, normed, heads)
    return tokens + _mlp(params, "token_mlp", tokens)


def nb_nll(count: np.ndarray, log_mu: np.ndarray, log_theta: np.ndarray) -> np.ndarray:
    """−log of the negative binomial probability, mean mu and variance mu + mu²/theta, term by term.

    Plain: it loses digits when theta is beyond about 1e6.
    """
    count = np.asarray(count, dtype=np.float64)
    mu = np.exp(np.asarray(log_mu, dtype=np.float64))
    theta = np.exp(np.asarray(log_theta, dtype=np.float64))
    ways = gammaln(count + theta) - gammaln(theta) - gammaln(count + 1.0)
    failures = theta * np.log(theta / (theta + mu))
    successes = count * np.log(mu / (theta + mu))
    return -(ways + failures + successes)


def _attention(params: Parameters, name: str, asking: np.ndarray, answering: np.ndarray, heads: int) -> np.ndarray:
    width = params[f"{name}.query.weight"].shape[0]
    head_width = width // heads
    queries = _linear(asking, params[f"{name}.query.weight"])
    keys = _linear(answering, params[f"{name}.key.weight"])
    values = _linear(answering, params[f"{name}.value.weight"])

    mixed = np.zeros((len(asking), width))
    for head in range(heads):
        part = slice(head * head_width, (head + 1) * head_width)
        for i in range(len(asking)):
            if len(answering) == 0:
                continue  # nobody answers: the sum over keys is empty
            scores = np.array([np.dot(queries[i, part], key) for key in keys[:, part]])
            scores = scores / math.sqrt(head_width)
            weights = np.exp(scores - scores.max())
            weights = weights / weights.sum()
            for j in range(len(answering)):
                mixed[i, part] += weights[j] * values[j, part]
    return _linear(mixed, params[f"{name}.out.weight"])


def _mlp(params: Parameters, name: str, rows: np.ndarray) -> np.ndarray:
    normed = _layer_norm(rows, params[f"{name}.norm.weight"])
    hidden = _linear(normed, params[f"{name}.up.weight"]) + params[f"{name}.up.bias"]
    return _linear(_gelu(hidden), params[f"{name}.down.weight"]) + params[f"{name}.down.bias"]


def _layer_norm(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    normed = np.zeros_like(rows)
    for i, row in enumerate(rows):
        mean = row.sum() / len(row)
        variance = ((row - mean) ** 2).sum() / len(row)
        normed[i] = (row - mean) / math.sqrt(variance + EPSILON) * weight
    return normed


def _linear(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return rows @ weight.T


def _gelu(rows: np.ndarray) -> np.ndarray:
    """x · Φ(x), with the exact distribution function of the standard normal."""
    return rows * 0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(rows / math.sqrt(2.0)))


def _float64(params: Parameters) -> Parameters:
    return {name: np.asarray(value, dtype=np.float64) for name, value in params.items()}
