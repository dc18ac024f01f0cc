"""Predict how long a batch of a size takes, from the batches that have run."""

_DECAY = 0.9
"""Weight of every earlier batch after each new one."""


class LatencyModel:
    """This model fits `seconds = a + b * size` by least squares.

    The weight of a batch falls exponentially with every batch after it.
    """

    def __init__(self) -> None:
        self._weight = self._size = self._squares = self._seconds = self._product = 0.0

    def add(self, size: int, seconds: float) -> None:
        """Add the measured time of one batch."""
        sums = (self._weight, self._size, self._squares, self._seconds, self._product)
        new = (1.0, size, size * size, seconds, size * seconds)
        self._weight, self._size, self._squares, self._seconds, self._product = (
            _DECAY * old + one for old, one in zip(sums, new)
        )

    def seconds(self, size: int) -> float:
        """Predict the time of a batch of this size.

        Before the first batch that is 0; while only one size has been seen, time is proportional to size.
        """
        spread = self._weight * self._squares - self._size**2
        if spread <= 1e-6 * self._squares:
            return size * self._seconds / self._size if self._size else 0.0
        slope = max(0.0, (self._weight * self._product - self._size * self._seconds) / spread)
        return max(0.0, (self._seconds - slope * self._size) / self._weight) + slope * size

    def largest(self, limit_s: float, at_most: int) -> int:
        """Return the largest size that should take no longer than the limit, at least 1."""
        sizes = range(at_most, 1, -1)
        return next((size for size in sizes if self.seconds(size) <= limit_s), 1)
