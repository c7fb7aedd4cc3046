"""The benchmark file for the contest's cloth, run by Anomalib's own benchmark on a look-alike: smaller, same keys."""

from pathlib import Path

import pytest
import yaml
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator

from anomalib_ot.integration.cli import register_classes
from anomalib_ot.integration.data.tianchi_lookalike import write_lookalike

CONFIG = Path(__file__).parents[3] / "configs" / "benchmark" / "tianchi_fabric.yaml"
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.skipif(not CONFIG.is_file(), reason="this is not a checkout: configs/ is not here"),
]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The file with fewer jobs, small images, and no weights to fetch."""
    register_classes()
    root = write_lookalike(tmp_path_factory.mktemp("contest"), num_per_fault=3, num_normal=12, image_size=(64, 96))
    given = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["benchmark"]
    given["model"]["init_args"] |= {"image_size": [64, 96], "advanced": {"epochs": 1}, "pre_trained": False}
    given["model"]["init_args"]["nms"] = {"grid": ["hard", "sinkhorn_merge"]}
    given["model"]["class_path"] = "anomalib_ot.OTADetector"
    given["data"]["init_args"] |= {"root": str(root), "num_workers": 0}
    return given


@pytest.mark.slow
def test_the_jobs_run_and_make_one_table(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = list(BenchmarkJobGenerator(accelerator="cpu").generate_jobs(given, None))
    table = jobs[0].collect([job.run() for job in jobs])
    assert table["model.init_args.nms"].tolist() == ["hard", "sinkhorn_merge"]
    for name in ("map", "map_50", "tianchi_score", "tianchi_accuracy", "tianchi_map", "false_positives_per_good_image"):
        assert table[name].between(0, 1).all()


def test_a_class_below_init_args_stays_words(given):
    """Why the file has `nms`: Anomalib builds nothing below `init_args`."""
    model = {"class_path": "anomalib_ot.OTADetector", "init_args": {"pre_trained": False}}
    model["init_args"]["post_processor"] = {"class_path": "anomalib_ot.SinkhornNMS"}
    with pytest.raises(TypeError, match="Passed object should be"):
        next(BenchmarkJobGenerator(accelerator="cpu").generate_jobs({**given, "model": model}, None))
