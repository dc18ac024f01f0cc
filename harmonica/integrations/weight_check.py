"""Check that a pipeline's weights are those that a router was made for."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.models.fingerprint import Fingerprint


def matched_fingerprint(
    parameters: Sequence[Tensor],
    fingerprint: Callable[[], Fingerprint],
    artifact: RouterArtifact,
    *,
    check_weights: bool,
) -> Fingerprint:
    """Return the weights' fingerprint, rounded where the artifact's is.

    Args:
        parameters: the transformer's, for their precisions.
        fingerprint: reads it from the weights.
        check_weights: False takes the weights for the artifact's.

    Raises:
        ValueError: weights are on the meta device.
    """
    if any(parameter.is_meta for parameter in parameters):
        raise ValueError("transformer has its weights elsewhere (meta): apply first, then offload")
    found = fingerprint()
    if not check_weights:
        found = replace(found, exact=artifact.model["weights"])
    for each in {str(parameter.dtype).removeprefix("torch.") for parameter in parameters}:
        # Parts may have stayed in full precision: what counts is what rounding makes of them.
        if artifact.rounded_weights.get(each, "") == found.rounded.get(each):
            found = replace(found, exact=found.rounded[each])
    return found


def other_weights(found: Fingerprint, artifact: RouterArtifact) -> ValueError:
    """Return the error of weights that are not the router's."""
    return ValueError(
        f"model.weights is {found.exact} and the router was made for {artifact.model['weights']}: these "
        "are other weights. Where you know them to be the same in another form, as they are after "
        "quantising or with an adapter (LoRA) fused into them, apply with check_weights=False; for "
        "another model, train a router"
    )
