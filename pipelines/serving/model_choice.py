"""Choose the model that a request names."""

from . import schemas as api
from .api_requests import GenerateRequest
from .http_errors import ApiError
from .requests import Catalog, ModelState

_MAX_ECHO = 100


def choose_model(
    body: GenerateRequest, catalog: Catalog, *, lenient: bool = False
) -> tuple[ModelState, list[api.Warned]]:
    """Choose the model that a request names, or the first if it names none.

    Args:
        body: the request as it was parsed.
        catalog: the served models.
        lenient: choose the first, and warn, where there is no such model.

    Returns:
        The model, and the warnings.

    Raises:
        ApiError: there is no such model.
    """
    first = catalog.states[0]
    if not body.model:
        return first, []
    found = catalog.find(body.model)
    if found is not None:
        return found, []
    error = unknown_model(body.model, catalog)
    if not lenient:
        cure = "give one of those" if len(catalog.states) > 1 else "give that"
        raise ApiError(404, f"{error.message}, {cure} or leave it out", "model", error.code)
    which = f"and {first.model!r}" if len(catalog.states) > 1 else "which"
    return first, [api.Warned(param="model", message=f"{error.message}, {which} has generated the images")]


def unknown_model(model: str, catalog: Catalog) -> ApiError:
    """Return the error of a model that is not served."""
    message = f"model is {model[:_MAX_ECHO]!r}: this endpoint serves {catalog.names}"
    return ApiError(404, message, "model", "model_not_found")
