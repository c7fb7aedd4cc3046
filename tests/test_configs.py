"""Every configuration file builds what it names, the way the command line builds it."""

from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_model_configuration_builds_its_model(path, tmp_path):
    from anomalib.models import AnomalibModule

    from anomalib_ot import OTPrototypes

    given = yaml.safe_load(path.read_text())
    given = given.get("model", given)
    assert set(given) <= {"class_path", "init_args"}
    whole = tmp_path / path.name
    whole.write_text(yaml.safe_dump({"model": given}))
    model = AnomalibModule.from_config(whole)
    assert isinstance(model, OTPrototypes)
    for name, value in given.get("init_args", {}).items():
        assert model.hparams[name] == value or list(model.hparams[name]) == value


@pytest.mark.parametrize("path", sorted((CONFIGS / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_data_configuration_builds_its_datamodule(path):
    from anomalib.data import AnomalibDataModule

    given = yaml.safe_load(path.read_text())
    given = given.get("data", given)
    assert set(given) <= {"class_path", "init_args"}
    datamodule = AnomalibDataModule.from_config(path)
    assert type(datamodule).__name__ == given["class_path"].rpartition(".")[2]


def test_the_benchmark_configuration_names_our_model_and_data():
    text = (CONFIGS / "benchmark" / "ot_prototypes.yaml").read_text()
    assert yaml.safe_load(text)
    assert "OTPrototypes" in text
    assert "SyntheticFabric" in text
