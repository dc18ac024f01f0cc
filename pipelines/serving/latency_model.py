"""How long a batch takes by its size, learnt from those that were done."""

_DECAY = 0.9


class Pace:
    """Seconds = a + b * size by least squares, the newest batches counting most."""

    def __init__(self) -> None:
        self._weight = self._size = self._squares = self._seconds = self._product = 0.0

    def add(self, size: int, seconds: float) -> None:
        """A batch that was done."""
        sums = (self._weight, self._size, self._squares, self._seconds, self._product)
        new = (1.0, size, size * size, seconds, size * seconds)
        self._weight, self._size, self._squares, self._seconds, self._product = (
            _DECAY * old + one for old, one in zip(sums, new)
        )

    def seconds(self, size: int) -> float:
        """Of a batch of this size; 0 before anything is known, proportional while one size is."""
        spread = self._weight * self._squares - self._size**2
        if spread <= 1e-6 * self._squares:
            return size * self._seconds / self._size if self._size else 0.0
        slope = max(0.0, (self._weight * self._product - self._size * self._seconds) / spread)
        return max(0.0, (self._seconds - slope * self._size) / self._weight) + slope * size

    def largest(self, limit_s: float, at_most: int) -> int:
        """The largest size that takes no longer, at least 1."""
        sizes = range(at_most, 1, -1)
        return next((size for size in sizes if self.seconds(size) <= limit_s), 1)
