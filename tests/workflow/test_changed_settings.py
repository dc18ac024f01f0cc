"""Settings that differ are named one by one, with both values and nothing around them."""

import pytest

from harmonica.validation.changed_settings import changed_settings

BEFORE = {"seed": 0, "train": {"batch_size": 8, "sdt": {"threshold": 0.1}}, "model": {"shape": None}}


@pytest.mark.parametrize(
    ("now", "free", "words"),
    [
        (BEFORE, (), ""),
        (BEFORE | {"seed": 7}, (), "seed was 0 and is 7"),
        (BEFORE | {"seed": 7}, ("seed",), ""),
        (
            BEFORE | {"train": {"batch_size": 8, "sdt": {"threshold": 2}}},
            (),
            "train.sdt.threshold was 0.1 and is 2",
        ),
        (BEFORE | {"train": {"batch_size": 4}}, ("train.batch_size",), ""),
        (BEFORE | {"train": {"batch_size": 4}}, ("train",), ""),
        (BEFORE | {"model": {"shape": {"depth": 3}}}, (), "model.shape was not given and is given"),
        (BEFORE | {"new": "a"}, (), "new was not given and is 'a'"),
        (
            BEFORE | {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5},
            ("a",),
            "b was not given and is 2, c was not given and is 3, d was not given and is 4 "
            "and 1 more setting differs",
        ),
    ],
)
def test_what_differs_is_named_and_nothing_else(now: dict, free: tuple[str, ...], words: str) -> None:
    assert changed_settings(BEFORE, now, free) == words
