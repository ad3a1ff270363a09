"""Counter-based randomness: a number is a pure function of its keys, never a draw from a stream.

So no generator state exists that a worker, a rank or a checkpoint would have to carry. The mixing step is
the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), applied once per key.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_DROPPED = np.uint64(11)  # bits, of which a float64 has no room

Key = int | str | np.ndarray


def hash64(*keys: Key) -> np.ndarray:
    """uint64 hashes of the keys, broadcast against each other; the order of the keys matters.

    A key is an integer, a text (a purpose, a digest) or an array of integers.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = hash_after(state, key_of_hash(key))
    return state


def key_of_hash(key: Key) -> np.ndarray:
    """uint64: a key as `hash_after` takes it, to be kept where it comes in many hashes."""
    with np.errstate(over="ignore"):
        return _mix(_as_uint64(key) + _GOLDEN)


def hash_after(state: np.ndarray, key: np.ndarray) -> np.ndarray:
    """hash64(*keys, last), from hash64(*keys) and key_of_hash(last)."""
    with np.errstate(over="ignore"):
        return _mix((state + _GOLDEN) ^ key)


def uniform(*keys: Key) -> np.ndarray:
    """float64 in [0, 1), from the upper 53 bits of `hash64`."""
    return (hash64(*keys) >> _DROPPED).astype(np.float64) * 2.0**-53


def is_below(hashes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Where uniform(…) < p, from hash64(…) and bound_of(p)."""
    return (hashes >> _DROPPED) < bounds


def bound_of(probability: np.ndarray) -> np.ndarray:
    """uint64: a probability from 0 to 1 as `is_below` takes it, to be kept where many hashes are compared to it."""
    return np.ceil(np.asarray(probability) * 2.0**53).astype(np.uint64)


def _as_uint64(key: Key) -> np.ndarray:
    if isinstance(key, str):
        key = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    if isinstance(key, int):
        return np.asarray(key & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    return np.asarray(key).astype(np.uint64)


def _mix(value: np.ndarray) -> np.ndarray:
    value = value ^ (value >> np.uint64(30))  # the only copy
    value *= _FIRST
    value ^= value >> np.uint64(27)
    value *= _SECOND
    value ^= value >> np.uint64(31)
    return value
