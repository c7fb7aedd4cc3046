"""The guide says what is true: commands parse, messages exist, links lead somewhere, no name is missing."""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import anomalib_ot
import anomalib_ot.ot
import anomalib_ot.postprocess

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"```bash\n(.*?)```", re.DOTALL)
ENTRY = re.compile(r"^### `(.+)`$", re.MULTILINE)

pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="this is not a checkout: no docs/ here")


# ---- commands


def commands(start: str = "anomalib ") -> list[tuple[str, str]]:
    """Find the command lines of the guide and the README that begin so, each with the page that it is on."""
    found = []
    for page in [*PAGES, ROOT / "README.md"]:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.relative_to(ROOT).as_posix(), line) for line in lines if line.startswith(start)]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def parse():
    """The real command line, made once: it reads words and runs nothing."""
    from anomalib.cli import AnomalibCLI

    from anomalib_ot.integration.cli import register_classes

    register_classes()  # what the start-up hook does, which does not run for a package that lies on PYTHONPATH
    cli = AnomalibCLI.__new__(AnomalibCLI)
    cli.parser, cli.subcommand_parsers, cli.subcommand_method_arguments = cli.init_parser(), {}, {}
    cli.add_subcommands()
    return cli.parser.parse_args


@pytest.mark.parametrize(("page", "line"), commands())
@pytest.mark.slow
def test_a_command_parses(page, line, parse, monkeypatch):
    del page
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)[1:]
    if words[-1] == "...":  # "and the rest as above": what is needed, at least
        words[-1:] = ["SyntheticFabric"] if words[-2] == "--data" else ["--data.train_json", "train.json"]
    assert parse(words)["subcommand"] == words[0]


@pytest.mark.parametrize(("page", "line"), commands("anomalib-ot inspect "))
def test_a_command_of_the_inspector_parses(page, line):
    from anomalib_ot.edge.command import check_options, read_options

    del page
    options = read_options(shlex.split(line, comments=True)[2:])
    if options.mqtt is None or importlib.util.find_spec("paho") is not None:
        check_options(options)


def test_a_command_with_a_wrong_argument_does_not_parse(parse, capsys):
    with pytest.raises(SystemExit):
        parse(["train", "--model", "OTADetector", "--model.assinger", "ota", "--data", "SyntheticFabricBoxes"])
    assert "assinger" in capsys.readouterr().err


# ---- error messages


@cache
def templates() -> list[str]:
    """Return every text in the sources, with a mark where values are put in."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_in_order(pieces: list[str], text: str) -> bool:
    """Say whether a text holds all pieces, one after the other."""
    place = 0
    for piece in pieces:
        place = text.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def quoted() -> list[str]:
    page = DOCS / "troubleshooting.md"
    return ENTRY.findall(page.read_text(encoding="utf-8")) if page.is_file() else []


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_of_ours(message):
    pieces = [piece.strip() for piece in message.split("...") if len(piece.strip()) > 1]
    assert sum(map(len, pieces)) > 15, "too little is quoted to be found again"
    assert any(is_in_order(pieces, text) for text in templates()), "no message of the sources reads like that"


def test_a_message_that_nobody_writes_is_not_found():
    assert not any(is_in_order(["the moon is", "made of cheese"], text) for text in templates())


# ---- the reference


def test_every_public_name_has_its_place_in_the_reference():
    listed = re.findall(r"^::: ([\w.]+)$", "\n".join(page.read_text("utf-8") for page in PAGES), flags=re.MULTILINE)
    documented = set()
    for name in listed:
        module, _, attribute = name.rpartition(".")
        documented.add(getattr(importlib.import_module(module), attribute))
    for package in (anomalib_ot, anomalib_ot.ot, anomalib_ot.postprocess):
        for name in package.__all__:
            if not name.startswith("_"):
                assert getattr(package, name) in documented, f"{package.__name__}.{name} is in no page"


# ---- the build


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The guide, built as `make docs` does."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_page_fetches_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|icon)"[^>]*href="([^"]+)"', text)
        assert loaded
        assert not [address for address in loaded if "//" in address], page.name


@pytest.mark.slow
def test_search_works_in_pages_opened_as_files(site):
    assert (site / "search" / "search_index.js").read_text("utf-8").startswith("var __index = {")
    for page in (site / "index.html", site / "howto" / "train.html"):
        scripts = re.findall(r'<script src="([^"]*iframe-worker.js)"', page.read_text("utf-8"))
        assert [(page.parent / script).resolve() for script in scripts] == [site / "assets" / "iframe-worker.js"]


@pytest.mark.slow
def test_a_browser_searches_in_a_page_opened_as_a_file(site, browser):
    command = [*browser, "--virtual-time-budget=20000", "--dump-dom"]
    address = (site / "howto" / "train.html").as_uri() + "?q=false+alarms"
    done = subprocess.run([*command, address], check=True, capture_output=True, text=True, timeout=120)
    assert re.search(r"[1-9]\d* matching documents", done.stdout)


@pytest.mark.slow
def test_commands_wrap(site):
    text = (site / "howto" / "train.html").read_text("utf-8")
    assert 'href="../assets/code.css"' in text
    assert 'class="language-bash highlight"' in text
    assert ".language-bash pre > code" in (site / "assets" / "code.css").read_text("utf-8")


@pytest.mark.slow
def test_measured_figures_and_changes_are_in_the_guide(site):
    assert "OTADetector passes an AP50" in (site / "results.html").read_text("utf-8")
    assert "Keep a Changelog" in (site / "changelog.html").read_text("utf-8")


@pytest.mark.slow
def test_doctests_of_the_reference_are_code(site):
    text = (site / "reference" / "ot.html").read_text("utf-8")
    assert "Examples:" in text
    assert "<blockquote>" not in text


def test_a_doctest_at_the_end_of_a_docstring_gets_a_heading(monkeypatch):
    pytest.importorskip("griffe", reason="the extra `docs` is not installed")
    monkeypatch.syspath_prepend(DOCS)
    docstrings = importlib.import_module("_docstrings")
    assert docstrings.with_examples("One.\n\n>>> 1 + 1\n2") == "One.\n\nExamples:\n    >>> 1 + 1\n    2"
    assert docstrings.with_examples("Examples:\n    >>> 1") == "Examples:\n    >>> 1"


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (DOCS / "pictures").iterdir()}
    assert sizes
    assert max(sizes.values()) < 150_000
