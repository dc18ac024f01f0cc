"""Rows are a pure function of (seed, index): the whole of the stream's determinism rests on it."""

import numpy as np
import pytest

from harmonica.samplers.noise import MAX_SEED, sample_label, sample_noise


def test_first_values_are_pinned():
    # A change here makes every recorded run another run.
    assert [sample_label(7, i, 10) for i in range(8)] == [1, 4, 3, 5, 6, 7, 2, 1]
    np.testing.assert_array_equal(
        sample_noise(7, 0, (4,)),
        np.array(
            [-0.08317036926746368, 0.17730405926704407, -1.6196136474609375, -1.0896103382110596], np.float32
        ),
    )
    np.testing.assert_array_equal(
        sample_noise(7, 5, (1, 2, 2)),
        np.array(
            [[[-0.048567917197942734, -1.021569848060608], [-2.234422206878662, 0.14923091232776642]]],
            np.float32,
        ),
    )


def test_neither_order_nor_repetition_matters():
    def rows(order: list[int]) -> dict[int, tuple[int, bytes]]:
        return {i: (sample_label(3, i, 10), sample_noise(3, i, (1, 4, 4)).tobytes()) for i in order}

    in_order = rows(list(range(20)))
    assert rows(list(reversed(range(20)))) == in_order
    assert rows([7, 7, 19, 0]).items() <= in_order.items()
    assert len(set(in_order.values())) == 20


@pytest.mark.parametrize(("seed", "index"), [(1, 0), (0, 1), (2**62, 0), (MAX_SEED, 0), (0, 2**40)])
def test_rows_of_other_seeds_and_indices_are_independent(seed, index):
    a, b = sample_noise(0, 0, (4096,)), sample_noise(seed, index, (4096,))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / 64


def test_noise_is_standard_normal_float32():
    values = np.concatenate([sample_noise(0, i, (1, 28, 28)).ravel() for i in range(64)])
    assert values.dtype == np.float32
    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert abs(values.var() - 1) < 4 * (2 / len(values)) ** 0.5
    assert abs((values**4).mean() - 3) < 4 * (96 / len(values)) ** 0.5


def test_labels_are_uniform():
    counts = np.bincount([sample_label(0, i, 10) for i in range(4000)], minlength=10)
    assert len(counts) == 10
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square of 9 degrees of freedom, p = 0.001


def test_labels_do_not_follow_from_the_noise():
    # Drawn from one stream, both come from the high bits of one word: the label and the noise's size.
    first = [abs(sample_noise(0, i, (1,))[0]) for i in range(2000)]
    labels = [sample_label(0, i, 10) for i in range(2000)]
    assert abs(np.corrcoef(first, labels)[0, 1]) < 4 / 2000**0.5
