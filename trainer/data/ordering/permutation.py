"""A keyed permutation of range(n) without a table: any entry, forward or back, in constant time.

A Feistel network permutes the smallest range of 2^bits numbers that holds n; a result of n or above goes through the
network again until it is below n (cycle walking), which keeps it a bijection of range(n). Less than half of the range
is above n, so the expected number of passes is at most two.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_30, _SHIFT_27, _SHIFT_31, _SHIFT_32 = (np.uint64(bits) for bits in (30, 27, 31, 32))


def mix(words: Words) -> Words:
    """Return the finaliser of splitmix64: every input bit changes about half of the output bits.

    Any shape.
    """
    mixed = (words ^ (words >> _SHIFT_30)) * _MIX_1
    mixed = (mixed ^ (mixed >> _SHIFT_27)) * _MIX_2
    return mixed ^ (mixed >> _SHIFT_31)


def mix_int(word: int) -> int:
    """Return `mix` of one Python integer, taken modulo 2^64; a few times faster than a one-element array."""
    word &= MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


class KeyedPermutation:
    """A pseudo-random bijection of range(n), a different one for each key.

    `key` is one integer, or a uint64 array with one key for each value that is passed in, so that values of several
    epochs are computed in one call. `n` is 1 to 2^62.
    """

    def __init__(self, n: int, key: int | Words) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation holds 1 to 2**62 numbers, not {n}")
        self.n = n
        self._key = key
        bits = (n - 1).bit_length()
        # Halves of a few bits mix slowly: after 8 rounds some orders of 5 samples came twice as often.
        self._rounds = 8 if bits > 8 else 24
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    def forward(self, values: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the images of `values` (each in range(n)), one-dimensional like them, as int64."""
        return self._walk(values, range(self._rounds))

    def inverse(self, values: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the values whose images are `values`: `inverse(forward(x)) == x`."""
        return self._walk(values, range(self._rounds - 1, -1, -1))

    def _walk(self, values: NDArray[np.integer], rounds: range) -> NDArray[np.int64]:
        result = self._pass(values.astype(np.uint64), self._key, rounds)
        limit = np.uint64(self.n)
        outside = np.flatnonzero(result >= limit)
        while outside.size:
            key = self._key if isinstance(self._key, int) else self._key[outside]
            again = self._pass(result[outside], key, rounds)
            result[outside] = again
            outside = outside[again >= limit]
        return result.view(np.int64)

    def _pass(self, values: Words, key: int | Words, rounds: range) -> Words:
        high, low = values >> self._low_bits, values & self._low_mask
        for number in rounds:
            # Each half is changed by a hash of the other alone, so the same step is its own inverse.
            if number % 2:
                low ^= _half(high, key, number) & self._low_mask
            else:
                high ^= _half(low, key, number) & self._high_mask
        high <<= self._low_bits
        high |= low
        return high


def _half(half: Words, key: int | Words, number: int) -> Words:
    """Return the round function: at least 32 well mixed bits of (half, key, number)."""
    if isinstance(key, int):
        mixed = half ^ np.uint64(mix_int(key + number * GOLDEN))
    else:
        mixed = half ^ mix(key + np.uint64(number * GOLDEN & MASK))
    mixed *= _MIX_1
    mixed ^= mixed >> _SHIFT_32
    mixed *= _MIX_2
    mixed >>= _SHIFT_32
    return mixed
