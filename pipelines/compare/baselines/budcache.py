"""Search the schedule of whole steps with the least error, as BudCache does.

BudCache is arXiv 2606.13496: the budget of computed steps is fixed. Simulated annealing over moves of one
step, then hill climbing, as there. Each candidate is sampled, and judged by the mean squared error of the
latents of some images; nothing is learned of why a schedule is good.
"""

from collections.abc import Sequence

import numpy as np
import torch

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import even_steps, steps_for, stepwise_plan
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.samplers import Sampler

_HEAT = 0.3  # of the start's error, falling to zero over the annealing


def budcache(
    sampler: Sampler,
    batches: Sequence[Batch],
    speedup: float,
    reuse: Reuse,
    *,
    trials: int = 60,
    seed: int = 0,
) -> Plan:
    """Return the best plan found for a speed.

    Args:
        trials: how many schedules are sampled; the first two thirds anneal.
    """
    macs, num_steps = sampler.model.macs(), sampler.num_steps
    count, _ = steps_for(num_steps, macs, speedup)
    full = [sample(sampler, b.noise_NCHW, b.condition_N, keys=b.keys).clone() for b in batches]
    random = np.random.default_rng(seed)

    def plan_of(steps: Sequence[int]) -> Plan:
        return stepwise_plan(num_steps, len(macs.branches), steps)

    def error(steps: Sequence[int]) -> float:
        plan, errors = plan_of(steps), []
        for batch, wanted in zip(batches, full, strict=True):
            inputs = (batch.noise_NCHW, batch.condition_N, plan)
            found = sample(sampler, *inputs, reuse=reuse, keys=batch.keys)
            errors.append(float(torch.nn.functional.mse_loss(found, wanted)))
        return sum(errors)

    best = chosen = even_steps(num_steps, count)
    best_error = chosen_error = start = error(chosen)
    for trial in range(trials):
        heat = max(0.0, 1 - trial / (trials * 2 / 3)) * _HEAT * start
        if heat == 0 and chosen is not best:
            chosen, chosen_error = best, best_error
        free = sorted(set(range(num_steps - 1)) - set(chosen))
        moved = list(chosen)
        moved[int(random.integers(len(moved)))] = free[int(random.integers(len(free)))]
        found = error(moved)
        if found < chosen_error or (heat and random.random() < np.exp((chosen_error - found) / heat)):
            chosen, chosen_error = moved, found
        if found < best_error:
            best, best_error = moved, found
    return plan_of(best)
