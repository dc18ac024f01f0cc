"""How far two computations of one thing may be apart: from the arithmetic, never from what one CPU gave.

A floating-point operation is off by at most its type's unit roundoff u, relative to its result: 2^-53 in
float64, 2^-24 in float32, 2^-11 in float16, 2^-8 in bfloat16. In which order a sum is taken, and so each of
its roundings, is the library's choice: it changes with the processor, the number of threads and the shape.
A bound is therefore made of numbers of which none is a measured distance: u, how many roundings follow one
another (a product over K terms has K, where it sums in its own type), how much the later operations amplify
what the earlier were off by, and `MARGIN` on top.

Bits may be compared where one kernel runs at one shape on both sides, and nowhere else.
`make test-cpus` holds every test to both (tests/cpus.py).
"""

import torch

MARGIN = 3
PASS = 1000
"""Roundings in a row of a pass of the tiny models, in float64 or float32: three blocks at most, 48 wide, of
16 tokens; attention (48 + 12 + 16 + 48), again over the text, MLP (48 + 4 * 48), norms and gates."""
HALF_PASS = 90
"""The same in half precision, whose products sum in float32 and are rounded once: 25 a block (norm,
modulation, four products and a softmax twice, MLP, gates, sums), and 15 in what embeds and in the head."""
NOISIEST = 160
"""1 / sqrt(alpha-bar) at t = 999: so much more than the output is x_0 off, as the first step has it."""


def roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def rounding(
    dtype: torch.dtype, operations: int, *, amplification: float = 1.0, is_random: bool = False
) -> float:
    """The relative distance that so many roundings in a row make, with the margin.

    Args:
        is_random: Some up, some down, they add up to the root of their number. Short types have too few
            digits for the worst case, in which all are in one direction, to say anything.
    """
    return MARGIN * amplification * roundoff(dtype) * (operations**0.5 if is_random else operations)


def close(
    dtype: torch.dtype, operations: int, *, amplification: float = 1.0, is_random: bool = False
) -> dict[str, float]:
    """For `assert_close`, of numbers of about 1."""
    bound = rounding(dtype, operations, amplification=amplification, is_random=is_random)
    return {"rtol": bound, "atol": bound}


def of_pass(dtype: torch.dtype, passes: int = 1) -> float:
    """The relative distance of two passes through a tiny model, or of so many in a row.

    Its norms divide by a deviation below 1 and its gates multiply, which makes three of one at most.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return rounding(dtype, passes * HALF_PASS, is_random=True)
    return rounding(dtype, passes * PASS, amplification=3, is_random=dtype == torch.float32)


def of_trajectory(steps: int) -> float:
    """The relative distance of two float64 trajectories whose coefficients are rounded to float32.

    Four a step, made of exponentials of differences of logarithms up to 10.
    """
    return rounding(torch.float32, 4 * steps, amplification=10)


def of_training(learning_rate: float, updates: int) -> dict[str, float]:
    """For `assert_close` of logits that a float32 model trained.

    An update moves a logit by the learning rate times gradient by size, and the gradient is that of the
    difference of two passes, of which it is a hundredth.
    """
    per_update = rounding(torch.float32, PASS, amplification=100, is_random=True)
    return {"rtol": 0.0, "atol": updates * learning_rate * per_update}


CLOSE = close(torch.float64, 10 * PASS, amplification=NOISIEST)
"""For `assert_close` of float64 trajectories of ten steps or fewer that share their coefficients."""
