"""Paths with letters of any language."""

from pathlib import Path

from anomalib.data.utils import path as host


def has_unprintable_characters(path: str | Path) -> bool:
    """Whether a path has characters that nobody can see, such as line breaks; letters of any language are none.

    >>> has_unprintable_characters("größe/缺陷"), has_unprintable_characters("one\\ntwo")
    (False, True)
    """
    return not str(path).isprintable()


def allow_all_letters() -> None:
    """Let Anomalib read folders with letters beyond ASCII, which it calls "non-printable".

    Its function that says so is replaced, for all models, since data are read before it is known for which model.
    What is not printable is refused as before. Repeated calls change nothing.
    """
    host.contains_non_printable_characters = has_unprintable_characters
