"""Lets the guide show files of the repository that are read there, too: the measured figures and the changelog.

Pages link to them where they lie (`../benchmarks/RESULTS.md`), which works in the repository; here the links are turned
to the copies, so that a strict build checks them and their anchors.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
COPIES = {"benchmarks/RESULTS.md": "results.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def turned(markdown: str, place: str, page: str) -> str:
    """Turn the links of a text from where it lies in the repository to where the pages lie in the guide."""

    def turn(found: re.Match) -> str:
        if "://" in found[2]:
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), found[2]))
        inside = COPIES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if inside is None:
            return found[0]  # the strict build says that it is not there
        return found[1] + posixpath.relpath(inside, posixpath.dirname(page) or ".") + found[3]

    return LINK.sub(turn, markdown)


def on_files(files, config):
    """Add the copies."""
    for place, page in COPIES.items():
        text = turned((ROOT / place).read_text(encoding="utf-8"), place, page)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    """Turn the links of a page of this folder."""
    path = page.file.src_uri
    return markdown if path in COPIES.values() else turned(markdown, f"docs/{path}", path)
