"""The fingerprint of the weights of a pipeline's transformers."""

from collections.abc import Sequence

from torch import nn

from harmonica.models.dit.diffusers_view import base_parameters
from harmonica.models.fingerprint import Fingerprint


def fingerprint_of(transformers: Sequence[nn.Module]) -> Fingerprint:
    """Return one fingerprint of all transformers of a pipeline, without adapters."""
    first, *others = [base_parameters(each) for each in transformers]
    both = dict(first)
    for number, parameters in enumerate(others, 2):
        both |= {f"{number}.{name}": each for name, each in parameters.items()}
    return Fingerprint.of(both)
