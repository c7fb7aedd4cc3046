"""The archive by Ray Data, on a local Ray: a line per image, that of the inspector, also after it was stopped."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from anomalib_ot import Inspector

from .edge.conftest import ENV, bright_graph, frame, without_latency

pytest.importorskip("ray.data", reason="the extra `archive` (ray[data]) is not installed")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "samples" / "score_archive.py"
IMAGES = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPT.is_file(), reason="this is not a checkout: samples/ is not here"),
]


def start(*words):
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows(out):
    return [json.loads(line) for part in out.glob("*.jsonl") for line in part.read_text("ascii").splitlines()]


def test_every_image_has_one_line_also_after_a_run_that_was_stopped(tmp_path):
    model, archive, out = (tmp_path / name for name in ("model", "archive", "scores"))
    for folder in (model, archive / "1999", archive / "2000"):
        folder.mkdir(parents=True)
    bright_graph(model)
    for number in range(IMAGES - 1):
        image = Image.fromarray(frame(number, 0.9 if number % 5 == 0 else 0.3))
        image.save(archive / ("1999" if number % 2 else "2000") / f"{number:03d}.png")
    (archive / "1999" / "broken.png").write_text("lot 17")

    # What a run that was stopped leaves: whole files of lines, and one that it had not finished.
    out.mkdir()
    with Inspector(model) as inspector:
        before = [one.line() for one in inspector.stream(map(str, sorted(archive.rglob("*.png"))[:9]))]
    (out / "of-a-stopped-run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before), "ascii")
    (out / f"of-a-killed-run.{'0' * 32}.unfinished").write_text('{"name": "half')

    second = start(model, archive, out, "--block", 7)
    said, err = second.communicate()
    assert second.returncode == int(not any(row["verdict"] == "error" for row in before)), err
    assert f"{IMAGES - len(before)} images to score, {len(before)} have a line already" in said
    assert f"{IMAGES - len(before)} images scored (" in said
    found = sorted(rows(out), key=lambda row: row["name"])
    assert not list(out.glob("*unfinished"))
    with Inspector(model) as inspector:
        wanted = [one.line() for one in inspector.stream(sorted(map(str, archive.rglob("*.png"))))]
    assert without_latency(found) == json.loads(json.dumps(without_latency(wanted)))

    third = start(model, archive, out)
    assert f"0 images to score, {IMAGES} have a line already" in third.communicate()[0]
    assert third.returncode == 0

    page = (ROOT / "docs" / "howto" / "archive.md").read_text("utf-8")
    (shown,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", shown], env=ENV, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    defects = [row for part in (tmp_path / "defects").iterdir() for row in part.read_text().splitlines()[1:]]
    assert len(defects) == sum(row["verdict"] == "defect" for row in wanted) == 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("no_model", "."), "the model no_model does not exist"),
        (("MODEL", "no_folder"), "FOLDER is 'no_folder', which is no folder"),
        (("MODEL", ".", "--block", "0"), "--machines and --block are numbers from 1"),
    ],
)
def test_bad_input_is_told_before_ray_starts(words, said, tmp_path):
    model = bright_graph(tmp_path)
    process = start(*[model if word == "MODEL" else word for word in words[:2]], tmp_path / "out", *words[2:])
    assert said in process.communicate()[1]
    assert process.returncode == 2
    assert not (tmp_path / "out").exists()
