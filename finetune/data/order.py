"""The order of training: a function of the seed and the global sample index alone."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np


class SampleOrder:
    """An endless sequence of (source, segment) pairs that any number of ranks can share.

    Sources are mixed in exact proportion to their weights: each draw takes the source that is
    furthest behind its share. A source goes through all of its segments before it repeats one;
    shuffled anew each time, or in their own order.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, shuffle: bool
    ) -> None:
        """`sizes`: number of segments of each source."""
        self._sizes = sizes
        self._shares = [weight / sum(weights) for weight in weights]
        self._seed = seed
        self._shuffle = shuffle

    def walk(self, start: int) -> Iterator[tuple[int, int]]:
        """The sequence from global sample `start` on: index of the source, and within it."""
        num_drawn = self._num_drawn_before(start)
        epochs = [-1] * len(self._sizes)
        permutations: list[Sequence[int]] = [[] for _ in self._sizes]
        for index in itertools.count(start):
            source = self._next_source(index, num_drawn)
            epoch, position = divmod(num_drawn[source], self._sizes[source])
            if epoch != epochs[source]:
                epochs[source], permutations[source] = epoch, self._permutation(source, epoch)
            yield source, permutations[source][position]
            num_drawn[source] += 1

    def _num_drawn_before(self, start: int) -> list[int]:
        if len(self._sizes) == 1:
            return [start]
        # Draw by draw, but without touching any data: about a second for a million samples.
        num_drawn = [0] * len(self._sizes)
        for index in range(start):
            num_drawn[self._next_source(index, num_drawn)] += 1
        return num_drawn

    def _next_source(self, index: int, num_drawn: list[int]) -> int:
        deficits = [
            share * (index + 1) - drawn
            for share, drawn in zip(self._shares, num_drawn, strict=True)
        ]
        return deficits.index(max(deficits))

    def _permutation(self, source: int, epoch: int) -> Sequence[int]:
        size = self._sizes[source]
        if not self._shuffle:
            return range(size)
        permutation: list[int] = (
            np.random.default_rng([self._seed, source, epoch]).permutation(size).tolist()
        )
        return permutation
