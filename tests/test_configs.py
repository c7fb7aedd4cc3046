"""Every file in configs/ becomes an object, read the way the command line reads it."""

import inspect
from pathlib import Path

import anomalib.models
import pytest
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule, Folder, MVTecAD, get_datamodule
from anomalib.data.datasets.image.mvtecad import CATEGORIES
from anomalib.models import AnomalibModule
from anomalib.utils.config import flatten_dict
from omegaconf import OmegaConf

from anomalib_ot import OTADetector, OTPrototypes, SparseMDOD, SyntheticFabric, SyntheticTray, TianchiFabric
from anomalib_ot.integration.benchmark.config import SweepLabels, read_configs, sweep_jobs
from anomalib_ot.integration.checks.advanced import flat
from anomalib_ot.integration.cli import register_classes
from anomalib_ot.vision.augment import DefectAugmentation

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[1] / "configs"
BOXES = ("coco_boxes", "mask_boxes", "synthetic_fabric_boxes", "tianchi_fabric")  # data with boxes, for detectors
MODELS, DATA, BENCHMARKS = (sorted((CONFIGS / room).glob("*.yaml")) for room in ("model", "data", "benchmark"))


@pytest.fixture(autouse=True)
def registered():
    """Do what the start-up hook does, which does not run for a package that lies on PYTHONPATH."""
    register_classes()


def read(command: str, **parts: Path) -> tuple[AnomalibModule, AnomalibDataModule | None]:
    """Let the command line read files and build what they describe, and run nothing."""
    words = [word for name, path in parts.items() for word in (f"--{name}", str(path))]
    cli = AnomalibCLI(args=[command, *words], run=False)
    cli.instantiate_classes()
    return cli.model, getattr(cli, "datamodule", None)


def model_of(name: str) -> OTPrototypes | OTADetector:
    model, _ = read("train", model=CONFIGS / "model" / f"{name}.yaml", data=CONFIGS / "data" / "synthetic_fabric.yaml")
    return model


def test_there_is_a_file_for_everything_the_readme_names():
    names = {"ot_prototypes", "ot_prototypes_paper", "ot_prototypes_filter_bank", "ot_prototypes_members"}
    names |= {"ota_detector", "ota_detector_paper", "ota_detector_sinkhorn", "ota_detector_tiles"}
    names |= {"ot_prototypes_tiles", "sparse_mdod", "sparse_mdod_paper"}
    assert {path.stem for path in MODELS} == names
    assert {path.stem for path in DATA} == {"synthetic_fabric", "synthetic_tray", "folder", "mvtec_ad", *BOXES}
    assert {path.stem for path in BENCHMARKS} == {
        "ot_prototypes",
        "mvtec_ad",
        "mvtec_ad_efficient_ad",
        "tianchi_fabric",
    }


@pytest.mark.parametrize("path", [*MODELS, *DATA], ids=lambda path: path.stem)
def test_a_file_holds_a_class_and_its_arguments_and_nothing_else(path):
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == {"class_path", "init_args"}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_is_built_with_every_argument_of_its_file(path):
    model, described = model_of(path.stem), yaml.safe_load(path.read_text(encoding="utf-8"))
    assert type(model).__name__ == described["class_path"].rsplit(".", 1)[-1]
    given = described["init_args"]
    if "post_processor" in given:  # a part of its own, no hyperparameter
        part = given.pop("post_processor")
        assert type(model.post_processor).__name__ == part["class_path"].rsplit(".", 1)[-1]
        assert model.post_processor.arguments.items() >= part["init_args"].items()
    for name, value in flat(given).items():
        assert _plain(flat(model.hparams)[name]) == value


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("synthetic_fabric", SyntheticFabric),
        ("synthetic_tray", SyntheticTray),
        ("folder", Folder),
        ("mvtec_ad", MVTecAD),
    ],
)
def test_data_is_built_with_every_argument_of_its_file(name, kind):
    path = CONFIGS / "data" / f"{name}.yaml"
    _, datamodule = read("train", model=CONFIGS / "model" / "ot_prototypes_filter_bank.yaml", data=path)
    assert type(datamodule) is kind
    given = yaml.safe_load(path.read_text(encoding="utf-8"))["init_args"]
    assert datamodule.train_batch_size == given["train_batch_size"] == 16
    assert datamodule.seed == given["seed"] == 0
    assert datamodule.val_split_mode == given["val_split_mode"]
    if kind not in (SyntheticFabric, SyntheticTray):
        assert Path(datamodule.root) == Path(given["root"])


@pytest.mark.parametrize("name", BOXES)
def test_data_with_boxes_is_built_with_every_argument_of_its_file(name):
    path = CONFIGS / "data" / f"{name}.yaml"
    _, datamodule = read("train", model=CONFIGS / "model" / "ot_prototypes_filter_bank.yaml", data=path)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))["init_args"]
    for argument in ("train_batch_size", "eval_batch_size", "num_workers", "seed"):
        assert getattr(datamodule, argument) == given[argument]
    augmentation = given["train_augmentations"]
    assert type(datamodule.train_augmentations) is DefectAugmentation
    for argument, value in augmentation["init_args"].items():
        if argument != "flip":
            assert _plain(getattr(datamodule.train_augmentations, argument)) == value


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_a_data_file_is_read_in_python_too(path):
    datamodule = AnomalibDataModule.from_config(path)
    assert type(datamodule).__name__ == yaml.safe_load(path.read_text())["class_path"].rpartition(".")[2]


def test_the_models_are_what_their_names_say():
    plain = [bank.member for bank in model_of("ot_prototypes").model.banks]
    assert plain == [bank.member for bank in OTPrototypes(backbone="resnet18").model.banks]
    paper = [bank.member for bank in model_of("ot_prototypes_paper").model.banks]
    assert [(member.layers, member.alpha) for member in paper] == [
        (("layer2",), 0.0),
        (("layer2",), 0.3),
        (("layer3",), 0.0),
        (("layer3",), 0.3),
    ]
    assert {(member.num_global, member.passes, member.rho) for member in paper} == {(16, 50, None)}
    own = [bank.member for bank in model_of("ot_prototypes_members").model.banks]
    assert [(member.layers, member.num_prototypes, member.num_global) for member in own] == [
        (("layer2",), 256, None),
        (("layer3",), 64, None),
        (("layer2", "layer3"), None, 0.5),
    ]
    filters = model_of("ot_prototypes_filter_bank").model
    assert filters.transport_score is not None
    assert not list(filters.feature_extractor.parameters())


def jobs_of(name: str) -> list:
    """Make the jobs of a benchmark file as `anomalib benchmark` does, and hold them to what its table takes."""
    from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator

    given = yaml.safe_load((CONFIGS / "benchmark" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert set(given) == {"accelerator", "benchmark"}
    jobs = list(BenchmarkJobGenerator(accelerator="cpu").generate_jobs(given["benchmark"], None))
    assert all(job.flat_cfg.keys() == jobs[0].flat_cfg.keys() for job in jobs), "one table needs the same columns"
    return jobs


def test_the_benchmark_of_prototypes_makes_its_jobs():
    jobs = jobs_of("ot_prototypes")
    assert {type(job.model) for job in jobs} == {OTPrototypes}
    assert {type(job.datamodule) for job in jobs} == {SyntheticFabric}
    settings = {(job.model.model.banks[0].member.alpha, job.model.model.transport_score is not None) for job in jobs}
    assert settings == {(0.0, False), (0.0, True), (0.3, False), (0.3, True)}


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_suits_both_commands(path):
    """Models are not built, since most fetch weights for it: their classes must take the arguments."""
    jobs = sweep_jobs(read_configs([path]))
    for job in jobs:
        described = OmegaConf.to_container(OmegaConf.create(job.config["model"]), resolve=True)
        kind = getattr(anomalib.models, described["class_path"].rpartition(".")[2])
        inspect.signature(kind).bind(**described["init_args"])
        assert isinstance(get_datamodule(job.config["data"]), MVTecAD | SyntheticFabric | TianchiFabric)
    # Anomalib's table takes the names of the first row and loses all rows if another has others.
    assert len({tuple(flatten_dict(job.config)) for job in jobs}) == 1


def test_mvtec_ad_is_judged_whole():
    paths = [CONFIGS / "benchmark" / f"{name}.yaml" for name in ("mvtec_ad", "mvtec_ad_efficient_ad")]
    jobs = sweep_jobs(read_configs(paths))
    labels = SweepLabels(jobs)
    models = {"OTPrototypes", "OTPrototypes preset=paper", "Patchcore", "Padim", "Dinomaly", "EfficientAd"}
    wanted = {(model, category) for model in models for category in CATEGORIES}
    assert {(labels.of(job, "model"), labels.of(job, "data")) for job in jobs} == wanted
    assert len(wanted) == len(jobs) == 6 * 15
    batches = {job.flat["model.class_path"]: job.flat["data.init_args.train_batch_size"] for job in jobs}
    assert batches.pop("EfficientAd") == 1  # it refuses others
    assert set(batches.values()) == {16}
    paper = next(job for job in jobs if job.flat.get("model.init_args.preset") == "paper")
    told = {name.rpartition(".")[2]: value for name, value in paper.flat.items() if name.startswith("model.init_args.")}
    model = yaml.safe_load((CONFIGS / "model/ot_prototypes_paper.yaml").read_text())["init_args"]
    assert told == {**model, "visualizer": False}


def test_the_benchmark_on_tianchi_makes_its_jobs():
    jobs = jobs_of("tianchi_fabric")
    assert {type(job.datamodule) for job in jobs} == {TianchiFabric}
    ways = {(type(job.model), getattr(job.model.post_processor, "arguments", {}).get("decode")) for job in jobs}
    assert ways == {(model, decode) for model in (OTADetector, SparseMDOD) for decode in (None, "select", "merge")}
    assert {job.model.suppression()["nms"] for job in jobs if job.model.post_processor is None} == {"hard"}
    assert {job.model.epochs for job in jobs} == {12}
