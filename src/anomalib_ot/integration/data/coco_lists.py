"""The lists of a COCO file, as they are in the file."""

import json
from collections.abc import Mapping
from pathlib import Path

from anomalib_ot.integration.checks.errors import InputError

__all__ = ["load_lists"]

PARTS = ("images", "annotations", "categories")


def load_lists(path: Path) -> dict[str, list]:
    """Load a COCO file; its lists hold objects, and there is an image and a category.

    Args:
        path: The file.

    Returns:
        Its content, with the lists ``images``, ``annotations`` and ``categories``.

    Raises:
        InputError: If there is no such file, or it is not JSON in UTF-8 or not COCO.
    """
    if not path.is_file():
        near = sorted(path.parent.glob("*.json")) if path.parent.is_dir() else []
        there = f", where there is {', '.join(entry.name for entry in near[:5])}" if near else ""
        msg = f"annotations {path} do not exist{there}; expected a COCO file: correct the path"
        raise InputError(msg)
    data = path.read_bytes()
    try:
        if b"\0" in data[:4]:
            msg = "two or four bytes per character"
            raise ValueError(msg)
        text = data.decode("utf-8-sig")
    except ValueError as error:
        form = "UTF-16 or UTF-32" if b"\0" in data[:8] else "another encoding"
        msg = f"annotations {path} are text in {form}; expected UTF-8: save the file again in UTF-8"
        raise InputError(msg) from error
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        what = "are empty (0 bytes)" if not data else f"are not JSON ({error})"
        msg = f"annotations {path} {what}; expected a COCO file: export it again"
        raise InputError(msg) from error
    if not isinstance(content, Mapping):
        msg = f"annotations {path} hold a {_kind(content)}; expected a COCO file, an object with {', '.join(PARTS)}"
        raise InputError(msg)
    for part in PARTS:
        if not isinstance(content.get(part), list):
            came = "no" if part not in content else f"a {_kind(content[part])} as"
            msg = f"annotations {path} have {came} {part!r}; expected a COCO file, with the lists {', '.join(PARTS)}"
            raise InputError(msg)
        for index, entry in enumerate(content[part]):
            if not isinstance(entry, Mapping):
                msg = f"annotations {path}: entry {index} of {part!r} is a {_kind(entry)}; expected an object"
                raise InputError(msg)
    for part in ("images", "categories"):
        if not content[part]:
            msg = f"annotations {path} have an empty list of {part}; expected at least one: export it with its {part}"
            raise InputError(msg)
    return content


def _kind(value: object) -> str:
    return {list: "list", dict: "object", str: "text", type(None): "null"}.get(type(value), type(value).__name__)
