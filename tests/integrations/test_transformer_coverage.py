"""The table of transformer classes says what each class of the installed diffusers does."""

import re

import diffusers
import pytest
import tiny_transformers
import transformer_coverage
from transformer_coverage import WORKS

NAMES = tuple(tiny_transformers.transformer_classes())
MUST_WORK = {
    "AuraFlow",
    "ChromaTransformer2D",
    "CogVideoX",
    "Flux2",
    "FluxTransformer2D",
    "HiDream",
    "HunyuanVideo15",
    "HunyuanVideoTransformer3D",
    "Kandinsky5",
    "Krea2",
    "LTXVideo",
    "Lumina2",
    "Mochi",
    "QwenImageTransformer2D",
    "SD3",
    "WanTransformer3D",
    "ZImage",
}

MUST_BE_DRAWN = {
    *("AuraFlow", "ChromaTransformer2D", "Flux2", "FluxTransformer2D", "HiDream", "Kandinsky5", "Krea2"),
    *("Lumina2", "QwenImageTransformer2D", "SD3", "ZImage"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_class_does_what_the_table_says(name):
    """A class that a newer diffusers adds is tried all the same, and only has to be no worse than untried."""
    row, known = transformer_coverage.row_of(name), transformer_coverage.committed()
    if name in known or diffusers.__version__ == transformer_coverage.committed_version():
        assert str(row) == known.get(name), f"{name} changed: write the table anew"


def test_the_families_that_people_use_work():
    rows = transformer_coverage.committed()
    for start in MUST_WORK:
        assert any(name.startswith(start) and f"| {WORKS} |" in row for name, row in rows.items()), start
    assert sum(f"| {WORKS} |" in row for row in rows.values()) >= 70


def test_the_endpoint_draws_with_the_image_models_that_people_use():
    rows = transformer_coverage.committed()
    drawn = {name for name, row in rows.items() if re.search(r"\| \w+Pipeline[^|]*\|$", row)}
    for start in MUST_BE_DRAWN:
        assert any(name.startswith(start) for name in drawn), start
    assert len(drawn) >= 25
