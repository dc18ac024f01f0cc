"""Describe the routers that an image sampler generates under, for the model card."""

from typing import Any

from .image_request import Quality
from .planned_sampler import PlannedSampler
from .requests import RouterCard
from .served_plan import ServedPlan


def router_cards(images: PlannedSampler[Any]) -> tuple[RouterCard, ...]:
    """Return a card for each router in use, with the qualities that it is used for."""
    return tuple(_card(served, quality) for served, quality in images.plans.items())


def _card(served: ServedPlan, quality: tuple[Quality, ...]) -> RouterCard:
    config = served.config
    return RouterCard(
        version=served.version,
        quality=quality,
        cur=served.plan.cur,
        ideal_speedup=served.ideal_speedup,
        sampler=config.name,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        plan=tuple(served.plan.to_strings()),
        scores=served.scores,
    )
