"""Classes by name, synonym and number."""

import pytest

from harmonica.data.class_names import UnknownClass, find_class


def test_classes_by_name_synonym_and_number():
    names = ("tench, Tinca tinca", "crane", "crane, lifting device", "7")
    assert find_class("  TINCA   tinca ", names) == 0
    assert find_class("tench, tinca tinca", names) == 0
    assert find_class("lifting device", names) == 2
    assert find_class("2", names) == 2
    assert find_class("7", names) == 3, "a name comes before a number"
    with pytest.raises(UnknownClass, match="classes 1, 2") as refusal:
        find_class("crane", names)
    assert refusal.value.code == "ambiguous_class"


def test_near_names_of_many_classes():
    names = tuple(f"animal {i}" for i in range(30)) + ("goldfish",)
    with pytest.raises(UnknownClass, match="near are goldfish"):
        find_class("goldfsh", names)
    with pytest.raises(UnknownClass, match=r"none is near.*0 to 30") as refusal:
        find_class("zzzzzz", names)
    assert refusal.value.code == "unknown_class"
