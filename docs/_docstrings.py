"""Teaches the API reference the docstrings of this package: doctests at their end, and the fields of named tuples."""

import griffe


class Docstrings(griffe.Extension):
    """Rewrite docstrings before they are parsed."""

    def on_instance(self, *, obj, **_):
        """Give a doctest that stands alone a heading: without it `>>>` would be a quotation within a quotation."""
        if obj.docstring is not None:
            obj.docstring.value = with_examples(obj.docstring.value)

    def on_class(self, *, cls, **_):
        """Make the fields of a named tuple the parameters of its class."""
        if "NamedTuple" in map(str, cls.bases):
            fields = [member for member in cls.members.values() if member.is_attribute and member.annotation]
            kind = griffe.ParameterKind.positional_or_keyword
            given = [griffe.Parameter(f.name, annotation=f.annotation, kind=kind, default=f.value) for f in fields]
            made = griffe.Function("__init__", parameters=griffe.Parameters(*given))
            made.runtime = False
            cls.set_member("__init__", made)


def with_examples(text: str) -> str:
    """Put the lines from a first `>>>` at the margin on under the heading "Examples"."""
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if line.startswith(">>> ")), None)
    if first is None:
        return text
    return "\n".join([*lines[:first], "Examples:", *(f"    {line}" if line else line for line in lines[first:])])
