"""A shuffled order that is computed, not held.

A Feistel network [Luby & Rackoff 1988] over pairs of digits, with sums instead of xor, so that it fits any n
closely [Black & Rogaway 2002, "Ciphers with arbitrary finite domains"]. An index is L + a·R with L < a and R < b,
where n ≤ a·b < n + a. A round adds a keyed hash of one digit to the other, which can be undone: all rounds
together permute a·b numbers. What lands at n or beyond goes through again until it does not: n are permuted.
"""

from math import isqrt

import numpy as np

ROUNDS = 12  # with 8, the 120 orders of five numbers are still not equally frequent


class Permutation:
    """Of the numbers from 0 to n - 1, in constant memory.

    Args:
        n: 1 to 2^62.
        rng: draws the key.
    """

    def __init__(self, n: int, rng: np.random.Generator) -> None:
        self.n = n
        left = isqrt(n - 1) + 1
        self.left, self.right = np.uint64(left), np.uint64(-(-n // left))
        self.keys = rng.integers(1 << 64, size=(ROUNDS // 2, 2), dtype=np.uint64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """(N,) int64, each from 0 to n - 1 → where each goes, the same."""
        moved = self.once(indices.astype(np.uint64))
        while (outside := moved >= self.n).any():
            moved[outside] = self.once(moved[outside])
        return moved.astype(np.int64)

    def once(self, x: np.ndarray) -> np.ndarray:
        """The permutation of a·b. uint64."""
        right, left = np.divmod(x, self.left)
        for key_left, key_right in self.keys:
            left = (left + mixed(right + key_left) % self.left) % self.left
            right = (right + mixed(left + key_right) % self.right) % self.right
        return left + self.left * right


def mixed(x: np.ndarray) -> np.ndarray:
    """A hash of 64 bits: splitmix64's [Steele, Lea & Flood 2014]. Products wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
