"""Find class labels by class name."""

import difflib

_NAMED_CLASSES = 20  # more than these are not listed in an error


class UnknownClass(ValueError):
    """Raised for a name that no class has, or several have."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code
        """The error code, `unknown_class` or `ambiguous_class`."""


def find_class(name: str, class_names: tuple[str, ...]) -> int:
    """Return the label of a class by its name, one of its synonyms or its number.

    Upper and lower case are the same.

    Raises:
        UnknownClass: unknown, or a synonym of several classes.
    """
    wanted = _normalize(name)
    labels: dict[str, set[int]] = {}
    for label, synonyms in enumerate(class_names):
        for key in {synonyms, *synonyms.split(",")}:
            labels.setdefault(_normalize(key), set()).add(label)
    found = sorted(labels.get(wanted, set()))
    if len(found) == 1:
        return found[0]
    if found:
        numbers = ", ".join(map(str, found))
        raise UnknownClass(
            f"{name!r}: it names the classes {numbers}, give one of these numbers", "ambiguous_class"
        )
    if wanted.isascii() and wanted.isdigit() and len(wanted) < 10 and int(wanted) < len(class_names):
        return int(wanted)
    known = ", ".join(class_names)
    if len(class_names) > _NAMED_CLASSES:
        near = difflib.get_close_matches(wanted, labels, n=3)
        known = f"near are {', '.join(near)}" if near else "none is near"
    raise UnknownClass(
        f"{name!r}: give a class name ({known}) or a number from 0 to {len(class_names) - 1}", "unknown_class"
    )


def _normalize(name: str) -> str:
    return " ".join(name.split()).casefold()
