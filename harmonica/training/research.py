"""The rules of research settings, which no preset uses.

They are `train.sdt.student=hard`, whose trajectories follow the plan instead of the soft scores, and
`train.sdt.objective=pairwise`, the objective of Learning-to-Cache (arXiv 2406.01733), which the comparison of
methods trains too. `train.iepo=none` and `train.initial` as `constant` or `alternate` are such settings as
well; each is one condition where lambda is refreshed or the router is made, so nothing of them is here.
"""


def trains_in_pairs(i: int, num_steps: int) -> bool:
    """Return whether step i is the second one of a pair, whose row is learned.

    Steps run from `num_steps - 1` down to 0. The first step of each pair computes everything.
    """
    return (num_steps - 1 - i) % 2 == 1


def num_trained_in_pairs(num_steps: int) -> int:
    """Return the number of steps for which `trains_in_pairs` is true."""
    return num_steps // 2


def follows_plan(student: str, objective: str) -> bool:
    """Return whether a trajectory follows the plan that the scores make at tau."""
    return student == "hard" and objective == "stepwise"
