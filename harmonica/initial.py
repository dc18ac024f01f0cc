"""What training begins with: the router's first logits, and the beta that a target asks for."""

from harmonica.beta import BetaController
from harmonica.router import Router
from harmonica.samplers import Sampler
from harmonica.sdt import SdtTrainer
from harmonica.targets import even_plan, logits_of, reusable_share
from harmonica.training_config import TrainingConfig


def initial_router(sampler: Sampler, config: TrainingConfig, seed: int) -> Router:
    """The router that training starts from, or that a measured start is to replace."""
    shape = (sampler.num_steps, len(sampler.model.branches))
    if config.initial == "normal":
        return Router.normal(*shape, seed)
    if config.initial == "alternate":
        return Router.alternating(*shape, config.initial_logit)
    if config.target_speedup and config.initial in ("even", "measured"):  # until it is measured
        plan = even_plan(sampler.num_steps, sampler.model.macs(), config.target_speedup)
        return Router.from_logits(logits_of(plan, config.initial_logit))
    return Router(*shape, config.initial_logit)


def beta_controller(
    trainer: SdtTrainer, config: TrainingConfig, target_speedup: float
) -> BetaController | None:
    """Where there is a target; one in speed is a share of MACs, and counts as entries if the penalty does."""
    num_steps = trainer.sampler.num_steps
    if target_speedup:
        share = reusable_share(num_steps, trainer.sampler.model.macs(), target_speedup)
    elif config.target_cur:
        share = config.target_cur * num_steps / (num_steps - 1)  # the target counts row T-1 too
    else:
        return None
    beta = BetaController(num_steps, trainer.costs_B, share=share, threshold=config.sdt.threshold)
    for i in range(num_steps - 1):
        if not trainer.trains(i):
            beta.spare(i)
    return beta
