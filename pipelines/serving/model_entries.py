"""Describe the served models in the endpoint's own answers."""

from dataclasses import asdict

from . import schemas as api
from .requests import Catalog, ModelCard, ModelState


def model_entry(state: ModelState) -> api.Model | api.UnavailableModel:
    """Describe a model as an entry of `GET /v1/models`."""
    card = state.card
    if card is None:
        return api.UnavailableModel(id=state.model, error=state.failure)
    return api.Model(
        id=card.model,
        size=card.size,
        class_names=list(card.class_names),
        sizes=api.Sizes(**asdict(card.sizes)) if card.sizes else None,
        max_pictures=card.max_pictures,
    )


def router_entries(card: ModelCard) -> list[api.RouterEntry]:
    """Describe a model's routers as entries of `GET /v1/routers`."""
    entries = [asdict(router) for router in card.routers]
    return [api.RouterEntry(id=entry.pop("version"), **entry) for entry in entries]


def health(catalog: Catalog, *, has_answered: bool) -> api.Health:
    """Describe the state of the endpoint, and of each model if it has several."""
    card = catalog.cards[0]
    of_first = api.Health(
        status="ok" if has_answered else "busy",
        model=card.model,
        router_version=card.router_version,
        cur=card.cur,
        waiting=card.waiting,
        refused=_refused(card),
    )
    if len(catalog.states) == 1:
        return of_first
    return api.HealthOfSeveral(**dict(of_first), models=[_model_health(state) for state in catalog.states])


def _model_health(state: ModelState) -> api.ModelHealth:
    card = state.card
    return api.ModelHealth(
        model=state.model,
        status="loaded" if state.is_loaded else "failed" if state.failure else "unloaded",
        router_version=card.router_version if card else "",
        cur=card.cur if card else 0.0,
        waiting=card.waiting if card else 0,
        refused=_refused(card) if card else None,
        error=state.failure,
    )


def _refused(card: ModelCard) -> api.RefusedRouter | None:
    return api.RefusedRouter(**asdict(card.rejected)) if card.rejected else None
