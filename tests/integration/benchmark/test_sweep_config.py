"""Jobs of a sweep: the files and grids of Anomalib's benchmark, and short names."""

import pytest
import yaml
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict

from anomalib_ot.integration.benchmark.config import SweepJob, SweepLabels, read_configs, sweep_jobs
from anomalib_ot.integration.checks.errors import InputError

GRID = {
    "accelerator": ["cpu"],
    "benchmark": {
        "seed": {"grid": [0, 1]},
        "model": {"grid": [{"class_path": "Padim"}, {"class_path": "Padim", "init_args": {"backbone": "resnet50"}}]},
        "data": {"class_path": "MVTecAD", "init_args": {"root": "here", "category": {"grid": ["bottle", "cable"]}}},
    },
}


def written(folder, config, name="benchmark.yaml"):
    (folder / name).write_text(config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False))
    return folder / name


def job(**parts) -> SweepJob:
    usual = {"accelerator": "cpu", "seed": 0, "model": {"class_path": "Padim"}, "data": {"class_path": "Folder"}}
    return SweepJob(usual | parts)


def test_the_jobs_are_those_of_anomalib(tmp_path):
    jobs = sweep_jobs(read_configs([written(tmp_path, GRID)]))
    expected = [flatten_dict(single) for single in get_iterator_from_grid_dict(GRID["benchmark"])]
    assert [job.flat for job in jobs] == [{"accelerator": "cpu", **single} for single in expected]
    assert len({job.key for job in jobs}) == len(jobs) == 8


def test_files_are_joined_and_a_job_that_comes_twice_is_one(tmp_path):
    other = {**GRID, "benchmark": {**GRID["benchmark"], "seed": {"grid": [1, 2]}}}
    paths = [written(tmp_path, GRID), written(tmp_path, other, "other.yaml")]
    assert [job.config["seed"] for job in sweep_jobs(read_configs(paths))] == [0] * 4 + [1] * 4 + [2] * 4


def test_arguments_as_one_text_are_the_same_job():
    text = {"class_path": "Padim", "init_args": "${oc.create:{backbone: resnet50, layers: [layer1]}}"}
    usual = {"class_path": "Padim", "init_args": {"backbone": "resnet50", "layers": ["layer1"]}}
    assert job(model=text).key == job(model=usual).key != job().key
    assert job(model=usual, seed=1).key != job(model=usual).key


def test_labels_have_no_more_than_tells_jobs_apart(tmp_path):
    jobs = sweep_jobs(read_configs([written(tmp_path, GRID)]))
    labels = SweepLabels(jobs)
    found = {(labels.of(job, "model"), labels.of(job, "data")) for job in jobs}
    assert found == {(m, d) for m in ("Padim", "Padim backbone=resnet50") for d in ("bottle", "cable")}
    paper = {"class_path": "OTPrototypes", "init_args": {"preset": "paper", "image_size": [8, 8]}}
    few = [job(model={"class_path": "OTPrototypes"}), job(model=paper), job(model="Padim", accelerator="cuda")]
    labels = SweepLabels(few)
    assert [labels.of(each, "model") for each in few] == [
        "OTPrototypes (cpu)",
        "OTPrototypes preset=paper (cpu)",
        "Padim (cuda)",
    ]


def test_data_that_one_model_reads_differently_keep_their_name():
    def data(category, size):
        return {"class_path": "MVTecAD", "init_args": {"train_batch_size": size, "category": category}}

    other = {"class_path": "EfficientAd"}
    jobs = [job(data=data(category, 16)) for category in ("bottle", "cable")]
    jobs += [job(data=data(category, 1), model=other) for category in ("bottle", "cable")]
    labels = SweepLabels(jobs)
    assert [labels.of(each, "data") for each in jobs] == ["bottle", "cable"] * 2
    jobs.append(job(data=data("cable", 1)))  # now one model meets both sizes
    labels = SweepLabels(jobs)
    assert labels.of(jobs[-1], "data") == "MVTecAD category=cable train_batch_size=1"


def changed(**parts):
    return {**GRID, "benchmark": {**GRID["benchmark"], **parts}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("a: [", "is not YAML"),
        ([1], "is list; expected a mapping with accelerator, benchmark"),
        ({**GRID, "benchmarks": 1}, "has 'benchmarks', which it does not know: did you mean 'benchmark'?"),
        ({"benchmark": GRID["benchmark"]}, "has no 'accelerator'"),
        ({**GRID, "accelerator": "tpu"}, "is 'tpu'; expected one or a list of cpu, cuda"),
        (changed(modle=1), "has 'modle', which it does not know: did you mean 'model'?"),
        (changed(seed={"grid": []}), "has no jobs: a grid in it is empty"),
        (changed(model={"class": "Padim"}), "benchmark.model is ['class']; expected class_path"),
        (changed(data="MVTecAD"), "benchmark.data is 'MVTecAD'; expected class_path"),
    ],
)
def test_what_is_no_benchmark_is_refused_in_one_line(tmp_path, config, said):
    with pytest.raises(InputError) as caught:
        sweep_jobs(read_configs([written(tmp_path, config)]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named_with_one_that_is(tmp_path):
    path = written(tmp_path, GRID)
    with pytest.raises(InputError, match=r"benchmrk\.yaml', which is no file: did you mean '.*benchmark\.yaml'"):
        read_configs([tmp_path / "benchmrk.yaml"])
    assert read_configs([path]) == [GRID]
