"""The report: what it says, that it needs no network, and that names in it are only names."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_ot import __main__ as script
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.report.command import run
from anomalib_ot.integration.report.page import report_page
from anomalib_ot.integration.report.summary import MOST_SHOWN, Selection, histogram, summarized
from anomalib_ot.integration.report.table import as_line, read_rows, thumbnail_name

NASTY = "/data/bad/<script>document.title='taken'</script> & \"Tür\".png"


def row(path: str, score: float | None, truth: str | None = None, **more) -> dict:
    verdict = "unknown" if score is None else "defective" if score > 0.5 else "good"
    return {"path": path, "verdict": verdict, "score": score, "threshold": 0.5, "truth": truth} | more


def rows_of_a_run() -> list[dict]:
    causes = {"causes": {"feature": 80, "position": 20}, "cause_words": ["looks wrong 80 %", "wrong place 20 %"]}
    return [
        row("/data/good/1.png", 0.2, "good", sha256="0" * 15 + "1"),
        row("/data/good/2.png", 0.7, "good", sha256="0" * 15 + "2", **causes),
        row(NASTY, 0.9, "defective", sha256="0" * 15 + "3", regions=[{"box": [1, 2, 3, 4], "score": 0.9}], **causes),
        row("/data/bad/3.png", 0.4, "defective", sha256="0" * 15 + "4"),
        row("/data/new/4.png", 0.1, sha256="0" * 15 + "5"),
    ]


def written(folder: Path, rows: list[dict], name: str = "predictions.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"".join(map(as_line, rows)))
    return folder / name


@pytest.fixture
def lines(tmp_path):
    """A run of five images, with a picture of one."""
    path = written(tmp_path / "run", rows_of_a_run())
    settings = {"backbone": "resnet18", "note": "<img src=x onerror=alert(1)>"}
    content = {"made": "2026-01-02 03:04 UTC", "stage": "test", "model": "OTPrototypes", "data": "bolts"}
    content |= {"checkpoint": "m.ckpt", "checkpoint_sha256": "ab" * 32, "settings": settings}
    path.with_name("run.json").write_bytes(as_line(content | {"versions": {"torch": "2.10"}}))
    (path.parent / "thumbnails").mkdir()
    Image.new("RGB", (64, 48), (200, 40, 40)).save(path.parent / "thumbnails" / thumbnail_name(NASTY), "JPEG")
    return path


class Elements(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "head"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


# ---- what it says


def test_it_says_how_many_what_and_why(lines):
    words = Elements(report_page(lines)[0]).words
    assert "OTPrototypes on bolts" in words
    assert "5 images 2 defective 3 good 1 missed defects 1 false alarms" in words
    assert "known to be called good called defective good 1 1 defective 1 1" in words
    assert "Of 1 of 5 images the truth is not known" in words
    assert "threshold 0.5" in words
    assert "looks wrong 80 % wrong place 20 %" in words
    assert "Images in /data" in words
    assert f"{15:016x}" in words, "the fingerprint is the sum of the files' checksums"
    assert "backbone resnet18" in words
    assert "torch 2.10" in words


def test_the_highest_score_comes_first(lines):
    page, summary = report_page(lines)
    assert [shown["score"] for shown in summary.shown] == [0.9, 0.7, 0.4, 0.2, 0.1]
    places = [page.index(f"score {score:.3f}") for score in (0.9, 0.7, 0.4, 0.2, 0.1)]
    assert all(before < after for before, after in pairwise(places))


def test_names_are_only_names(lines):
    elements = Elements(report_page(lines)[0])
    assert "script" not in elements.tags
    assert not [name for _, name, _ in elements.attributes if name.startswith("on")]
    assert NASTY in [value for tag, name, value in elements.attributes if (tag, name) == ("h3", "title")]
    assert "<img src=x onerror=alert(1)>" in elements.words


def test_nothing_in_it_refers_to_the_network_or_to_other_files(lines):
    page = report_page(lines)[0]
    elements = Elements(page)
    assert not {"link", "iframe", "object", "embed", "base", "a", "form"} & set(elements.tags)
    loaded = [value for _, name, value in elements.attributes if name in ("src", "srcset", "href", "data", "poster")]
    assert len(loaded) == 1
    assert all(value.startswith("data:image/jpeg;base64,") for value in loaded)
    assert Image.open(io.BytesIO(base64.b64decode(loaded[0].partition(",")[2]))).size == (64, 48)
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in elements.attributes


def test_many_images_are_bounded_and_what_is_left_out_is_counted(tmp_path):
    rows = [row(f"{number}.png", number / 1000) for number in range(400)]
    rows.append(row("missed.png", 0.0001, "defective"))
    page, summary = report_page(written(tmp_path, rows))
    assert len(summary.shown) == MOST_SHOWN == page.count('class="part"')
    assert f"{MOST_SHOWN} of 401 images: {401 - MOST_SHOWN} are left out" in Elements(page).words
    kept = {shown["path"] for shown in summary.shown}
    assert kept == {"missed.png"} | {f"{number}.png" for number in range(301, 400)}


def test_a_selection_takes_no_more_than_its_limit_of_many():
    selection = Selection(3)
    for number in np.random.default_rng(0).permutation(1000).tolist():
        entry = {"score": float(number), "verdict": "good"}
        if selection.takes(entry):
            selection.add(entry, number)
        assert len(selection._kept) <= 3
    assert selection.best() == [999, 998, 997]


def test_the_fingerprint_is_of_the_content_and_not_of_the_order(lines):
    rows = rows_of_a_run()
    known = summarized(rows).fingerprint
    assert summarized(rows[::-1]).fingerprint == known
    assert summarized([*rows[1:], rows[0] | {"sha256": "0" * 15 + "9"}]).fingerprint != known
    assert summarized([*rows, row("x", 0.1)]).fingerprint is None


@pytest.mark.parametrize("scores", [[0.1, 0.5, 1.0], [3.0, -2.0, 7.5], [4.0, 4.0], [0.5]])
def test_every_score_is_in_one_bin(scores):
    bins = histogram(summarized([row(str(score), score) for score in scores]))
    assert sum(sum(bar.counts) for bar in bins.bars) == len(scores)
    for score in scores:
        own = [bar for bar in bins.bars if bar.start - 1e-9 <= score <= bar.end + 1e-9 and sum(bar.counts)]
        assert own
    assert bins.threshold == 0.5


def test_rows_without_scores_have_no_histogram(tmp_path):
    page, _ = report_page(written(tmp_path, [row("a", None)]))
    assert 'id="scores"' not in page
    assert "NO VERDICT" in page


# ---- the command


def test_the_command_makes_the_report_again(lines, capsys, monkeypatch):
    report = lines.with_name("report.html")
    monkeypatch.setattr(sys, "argv", ["anomalib-ot", "report", str(lines.parent)])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == str(report)
    assert "OTPrototypes on bolts" in report.read_text(encoding="utf-8")


def test_lines_of_the_inspector_have_a_report_too(tmp_path):
    inspected = [
        {"name": "a/ü.png", "verdict": "defect", "score": 0.75, "causes": {"feature": 60, "position": 40}},
        {"name": "b.png", "verdict": "good", "score": 0.2, "threshold": 0.5, "boxes": []},
        {"name": "c.png", "verdict": "error", "error": "c.png is no image"},
    ]  # fmt: skip
    path = written(tmp_path, inspected, "line 1.jsonl")
    assert run([str(path)]) == 0
    words = Elements((tmp_path / "line 1.html").read_text(encoding="utf-8")).words
    assert "3 images 1 defective 1 good 1 error" in words
    assert "looks wrong 60 % wrong place 40 %" in words
    assert "c.png is no image" in words


def test_pictures_of_an_inspection_are_put_in(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (640, 480), (200, 40, 40)).save(pictures / "a.jpg")
    inspected = [
        {"name": "a.png", "verdict": "defect", "score": 0.75, "overlay": "a.jpg"},
        {"name": "b.png", "verdict": "good", "score": 0.2},
    ]
    path = written(tmp_path, inspected, "line.jsonl")
    assert run([str(path), "--overlays", str(pictures)]) == 0
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    (shown,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == (320, 240)
    assert page.count("no picture kept") == 1
    capsys.readouterr()
    (pictures / "a.jpg").write_bytes(b"no picture")
    assert f"--overlays: {pictures / 'a.jpg'} cannot be read" in refusal(capsys, path, "--overlays", pictures)


def refusal(capsys, *words) -> str:
    assert run([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_no_run_is_refused_in_one_line(lines, tmp_path, capsys):
    assert "does not exist; expected the folder of a run" in refusal(capsys, tmp_path / "nothing")
    assert f"did you mean '{lines.parent}'?" in refusal(capsys, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "a folder without predictions.jsonl" in refusal(capsys, tmp_path / "empty")
    written(tmp_path / "none", [])
    assert "has no rows" in refusal(capsys, tmp_path / "none")
    lines.with_name("run.json").write_text("{")
    assert "run.json is damaged" in refusal(capsys, lines.parent)
    lines.with_name("run.json").write_text('{"made": ""}')
    assert "run.json is damaged (without stage, model" in refusal(capsys, lines.parent)


@pytest.mark.parametrize("damage", ["cut off", "another file"])
def test_a_damaged_thumbnail_is_refused_and_one_that_is_removed_is_left_out(lines, damage, capsys):
    thumbnail = lines.parent / "thumbnails" / thumbnail_name(NASTY)
    content = thumbnail.read_bytes()
    thumbnail.write_bytes(content[: len(content) // 2] if damage == "cut off" else b"<svg onload='alert(1)'/>")
    words = refusal(capsys, lines.parent)
    assert f"{thumbnail} is damaged (" in words
    assert words.endswith("; remove it, or test or predict again")
    assert not lines.with_name("report.html").exists()
    thumbnail.unlink()
    assert run([str(lines.parent)]) == 0
    assert "data:image/jpeg" not in lines.with_name("report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"path": "a", "verdict": "good", "sco', "Unterminated"),
        ('{"path": "a", "verdict": "good", "score": NaN}', "NaN is not JSON"),
        ('{"path": "a", "verdict": "fine", "score": 1}', "no 'fine'"),
        ('{"verdict": "good", "score": 1}', "no path"),
        ('{"path": "a", "verdict": "good", "score": "high"}', "number"),
        ('{"path": "a", "verdict": "good", "score": 1, "truth": "yes"}', "truth is 'yes'"),
        ('{"path": "a", "verdict": "good", "score": 1, "boxes": [{"box": [1, 2]}]}', "four sides"),
        ('{"path": "a", "verdict": "good", "score": 1, "boxes": 3}', "iterable"),
        ('{"path": "a", "verdict": "good", "score": 1, "sha256": "Tuesday"}', "Tuesday"),
        ("[1]", "not an object"),
        ("\xff", "codec"),
    ],
)
def test_a_line_that_is_no_result_is_named(tmp_path, line, why):
    good = as_line(row("a", 0.1))
    (tmp_path / "predictions.jsonl").write_bytes(good + line.encode("latin-1"))
    with pytest.raises(InputError, match=r"predictions.jsonl, line 2 is no result") as refused:
        report_page(tmp_path / "predictions.jsonl")
    assert why in str(refused.value)


def test_a_path_that_is_no_unicode_is_kept(tmp_path):
    path = written(tmp_path, [row("caf\udce9.png", 0.1)])
    assert next(read_rows(path))["path"] == "caf\udce9.png"
    assert json.loads(path.read_bytes())["path"] == "caf\udce9.png"
    report_page(path)[0].encode("utf-8")


def test_the_template_is_in_the_package():
    assert files("anomalib_ot.integration.report").joinpath("templates/report.html").is_file()


# ---- in a browser


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it(lines, tmp_path, browser, width):
    assert run([str(lines.parent)]) == 0
    shot, report = tmp_path / "shot.png", lines.with_name("report.html")
    command = [*browser, "--hide-scrollbars", f"--window-size={width},1600", f"--screenshot={shot}", report.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert (np.abs(pixels - (200, 40, 40)).max(axis=2) < 12).sum() > 500, "the thumbnail is not to be seen"
    done = subprocess.run([*command[:-2], "--dump-dom", report.as_uri()], check=True, capture_output=True, timeout=120)
    elements = Elements(done.stdout.decode())
    assert "script" not in elements.tags
    assert "OTPrototypes on bolts" in elements.words
