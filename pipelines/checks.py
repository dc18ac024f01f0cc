"""Refusing a setting, with its name, its value and what to do about it."""


def require(condition: bool, field_name: str, value: object, cure: str) -> None:
    """
    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(f"{field_name} is {value!r}: {cure}")
