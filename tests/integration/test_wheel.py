"""From a wheel, with no checkout near: every verb of the README and the guide runs."""

import re
import shutil

import pytest
import yaml

from anomalib_ot.integration.data.synthetic_fabric import FabricFolder

from .conftest import ROOT, Anomalib, run

pytestmark = pytest.mark.slow

OURS = "anomalib_ot.__main__"
FILTERS = {"backbone": "filter_bank", "layers": ["scale1", "scale2"], "image_size": [64, 64], "num_prototypes": 8}


@pytest.fixture(scope="module")
def bolts(tmp_path_factory):
    """A folder of one's own, as the guide has it: good and bad parts, and good ones that are held out."""
    folder = tmp_path_factory.mktemp("bolts")
    drawn = folder / "drawn"
    FabricFolder(num_train=8, num_test_good=4, num_per_defect=4, image_size=(64, 64), defects=("hole",)).ensure(drawn)
    for name, place in {"train/good": "bolts/good", "test/hole": "bolts/bad", "test/good": "held_out_good"}.items():
        shutil.copytree(drawn / name, folder / place)
    return folder


@pytest.fixture(scope="module")
def command(installed, bolts):
    """The command of the environment that has the wheel, in the folder above the parts."""
    runner = Anomalib(bolts, installed.python, PYTHONPATH="", HF_HOME=str(bolts / "hub"))
    yield runner
    runner.close()


def verbs_of_the_guide():
    """The commands that the README and the guide name, as (script, verb)."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return set(re.findall(r"^(anomalib|anomalib-ot) +([a-z]+)", text, flags=re.MULTILINE))


def test_every_verb_runs(command, installed, bolts):
    ran = set()

    def call(line, **options):
        script, verb, *words = line.split()
        ran.add((script, verb))
        module = {"module": OURS} if script == "anomalib-ot" else {}
        done = command(verb, *words, **module, **options)
        assert done.code == 0, f"{line}\n{done.out}\n{done.err}"
        return done.out

    latest = "results/OTPrototypes/bolts/latest"
    settings = " ".join(f"--model.{name} {value}".replace(", ", ",") for name, value in FILTERS.items())
    model = "--model OTPrototypes --trainer.accelerator cpu"
    data = "--data Folder --data.seed 0 --data.name bolts --data.root ./bolts --data.num_workers 0"
    data += " --data.normal_dir good --data.abnormal_dir bad"

    assert "failed" not in call("anomalib-ot doctor")
    call(f"anomalib train {model} {settings} {data}")
    checkpoint = bolts / "MODEL.ckpt"
    shutil.copy(bolts / latest / "weights/lightning/model.ckpt", checkpoint)
    assert "escapes" in call(f"anomalib test {model} --ckpt_path MODEL.ckpt {data}")
    call(f"anomalib predict {model} --ckpt_path MODEL.ckpt --data ./bolts/bad")

    run_folder = bolts / "results/OTPrototypes/latest"
    (run_folder / "report.html").unlink()
    call("anomalib-ot report results/OTPrototypes/latest")
    assert "000.png" in (run_folder / "report.html").read_text(encoding="utf-8")

    before = checkpoint.read_bytes()
    told = call("anomalib-ot calibrate MODEL.ckpt --good ./held_out_good --bad ./bolts/bad --max-false-alarms 0.2")
    assert "escapes" in told
    assert checkpoint.read_bytes() != before
    call("anomalib-ot update MODEL.ckpt --good ./held_out_good --output NEW.ckpt")
    call(f"anomalib export {model} --ckpt_path NEW.ckpt --export_type openvino --export_root exported")

    # The installed script itself, and what it runs on the line: neither torch nor Anomalib is imported for it.
    script = installed.python.with_name("anomalib-ot")
    words = ["inspect", "exported/weights/openvino", "bolts/bad", "--output", "results.jsonl"]
    assert run(script, "--version", cwd=bolts).stdout.startswith("anomalib-ot ")
    run(script, *words, cwd=bolts)
    ran.add(("anomalib-ot", "inspect"))
    assert len((bolts / "results.jsonl").read_text().splitlines()) == 4
    call("anomalib-ot report results.jsonl")

    folder = {"name": "bolts", "root": "bolts", "normal_dir": "good", "abnormal_dir": "bad"}
    job = {
        "data": {"class_path": "Folder", "init_args": folder | {"seed": 0, "num_workers": 0}},
        "model": {"class_path": "anomalib_ot.OTPrototypes", "init_args": FILTERS},
    }
    (bolts / "benchmark.yaml").write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": {"seed": 0, **job}}))
    call("anomalib-ot benchmark --config benchmark.yaml --out sweep")
    assert "OTPrototypes" in (bolts / "sweep/table.md").read_text(encoding="utf-8")
    call("anomalib benchmark --config benchmark.yaml")

    assert verbs_of_the_guide() <= ran, f"not run here: {sorted(verbs_of_the_guide() - ran)}"
