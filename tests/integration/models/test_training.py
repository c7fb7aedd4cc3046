"""Training OTPrototypes through Lightning: epochs, resuming, processes, precision, checkpoints."""

import copy
import math
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import timm
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Padim
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from anomalib_ot import OTPrototypes, SyntheticFabric
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.batches import ExplainedBatch

SIZE = (64, 64)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def model(**changes) -> OTPrototypes:
    arguments = {"backbone": "filter_bank", "layers": ["scale1", "scale2"], "image_size": SIZE, "num_prototypes": 8}
    return OTPrototypes(**arguments | changes)


def network(**changes) -> OTPrototypes:
    return model(**{"backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False} | changes)


@pytest.fixture
def data(fabric):
    def make(**changes) -> SyntheticFabric:
        arguments = {"num_train": 6, "num_test_good": 2, "num_per_defect": 1, "train_batch_size": 4}
        return SyntheticFabric(root=fabric, image_size=SIZE, **arguments | changes)

    return make


@pytest.fixture
def engine(tmp_path):
    def make(**changes) -> Engine:
        quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
        return Engine(default_root_dir=tmp_path, **quiet | changes)

    return make


@pytest.fixture
def fit(engine, data):
    """Train a model and return its engine."""

    def run(trained: OTPrototypes, datamodule=None, checkpoint=None, **trainer) -> Engine:
        used = engine(**trainer)
        used.fit(model=trained, datamodule=datamodule or data(), ckpt_path=checkpoint)
        return used

    return run


@pytest.fixture
def reference(fit):
    """A model trained on one process in one go."""
    trained = model()
    fit(trained)
    return trained


def assert_equal(one: OTPrototypes, other: OTPrototypes, tolerance: float = 0.0) -> None:
    """Compare all that is saved; NaN (a threshold without validation) equals NaN."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=tolerance, equal_nan=True, msg=name)


def written(used: Engine) -> Path:
    return Path(used.trainer.checkpoint_callback.best_model_path)


def prototypes(trained: OTPrototypes) -> torch.Tensor:
    return trained.model.banks[0].prototypes


# ---- epochs and steps


def test_as_many_epochs_as_the_trainer_says(fit, reference):
    trained = model()
    assert fit(trained, max_epochs=3).trainer.current_epoch == 3
    assert not torch.equal(prototypes(trained), prototypes(reference))


@pytest.mark.parametrize("epochs", [1, 2])
def test_as_many_epochs_as_the_model_says_where_the_trainer_says_nothing(epochs, fit):
    assert fit(model(advanced={"epochs": epochs})).trainer.current_epoch == epochs


def test_every_batch_is_a_step(fit):
    assert fit(model(advanced={"epochs": 2})).trainer.global_step == 4


@pytest.mark.parametrize(
    "trainer",
    [
        {"val_check_interval": 0.5},
        {"barebones": True, "enable_progress_bar": None, "enable_model_summary": None},
        {"max_time": "00:01:00:00"},
        {"inference_mode": False},
        {"num_sanity_val_steps": 2},
        {"detect_anomaly": True},
    ],
    ids=lambda trainer: next(iter(trainer)),
)
def test_what_the_trainer_is_told_does_not_change_the_model(trainer, fit, reference, data):
    trained = model()
    used = fit(trained, **trainer)
    assert_equal(trained, reference)
    assert 0 <= used.test(model=trained, datamodule=data(), verbose=False)[0]["image_AUROC"] <= 1


@pytest.mark.parametrize(
    ("trainer", "images"),
    [
        ({"max_steps": 1}, 2),
        ({"limit_train_batches": 1}, 2),
        ({"fast_dev_run": True}, 2),
        ({"overfit_batches": 1}, 2),
        ({"limit_val_batches": 0}, 6),
        ({"check_val_every_n_epoch": 2}, 6),
    ],
    ids=str,
)
def test_the_trainer_may_cut_a_pass_short(trainer, images, fit, data, monkeypatch):
    seen = []
    trained = model()
    fit_model = trained.model.fit
    monkeypatch.setattr(
        trained.model,
        "fit",
        lambda patches, *args, **kwargs: (
            seen.extend(len(known.embeddings) for known in patches.values()) or fit_model(patches, *args, **kwargs)
        ),
    )
    used = fit(trained, data(train_batch_size=2), **trainer)
    assert set(seen) == {images}
    assert 0 <= used.test(model=trained, datamodule=data(), verbose=False)[0]["image_AUROC"] <= 1


def test_a_validation_within_the_first_pass_fits_to_what_there_is(fit, data):
    trained, counts = model(), []
    fit_model = trained.model.fit

    def count(patches, *args, **kwargs):
        counts.append(len(next(iter(patches.values())).embeddings))
        return fit_model(patches, *args, **kwargs)

    trained.model.fit = count
    fit(trained, data(train_batch_size=2), val_check_interval=1)
    assert counts == [2, 6]


# ---- equal trainings


@pytest.mark.parametrize("make", [model, network])
def test_batches_and_their_order_do_not_matter(make, fit, data):
    one, other = make(), make()
    fit(one, data(train_batch_size=3))
    fit(other, data(train_batch_size=2))
    assert_equal(one, other, tolerance=1e-5)
    again = make()
    fit(again, data(train_batch_size=3))
    assert_equal(one, again)


@pytest.mark.parametrize(
    "changes",
    [{}, {"advanced": {"transport_score": True}}, {"preset": "paper", "advanced": {"num_global": 1}}],
    ids=str,
)
def test_resuming_equals_going_on(changes, fit):
    if "preset" in changes:
        changes = changes | {"num_prototypes": None, "layers": ["scale2"]}
    whole, half, resumed = (model(**changes) for _ in range(3))
    fit(whole, max_epochs=2)
    checkpoint = written(fit(half, max_epochs=1))
    used = fit(resumed, max_epochs=2, checkpoint=checkpoint)
    assert used.trainer.current_epoch == 2
    assert_equal(resumed, whole)
    assert not torch.equal(prototypes(half), prototypes(whole))


def test_a_second_training_of_the_same_model_starts_anew(fit, reference, tmp_path):
    other = SyntheticFabric(root=tmp_path / "other", num_train=4, num_test_good=2, num_per_defect=1, image_size=SIZE)
    trained = model()
    fit(trained, other)
    assert not torch.equal(prototypes(trained), prototypes(reference))
    fit(trained)
    assert_equal(trained, reference)


def test_the_seed_of_the_model_is_the_only_one(fit):
    members = [{"num_global": 1, "start": "random", "passes": 1}]
    arguments = {"advanced": {"members": members}, "num_prototypes": None}
    one, same, other = model(seed=1, **arguments), model(seed=1, **arguments), model(seed=2, **arguments)
    for number, trained in enumerate((one, same, other)):
        torch.manual_seed(number)
        fit(trained)
    assert_equal(one, same)
    assert not torch.equal(prototypes(one), prototypes(other))


# ---- several processes


@pytest.fixture
def odd(tmp_path):
    """Five training images: two processes cannot share them evenly."""
    arguments = {"num_train": 5, "num_test_good": 2, "num_per_defect": 1, "image_size": SIZE, "train_batch_size": 2}
    return SyntheticFabric(root=tmp_path / "odd", **arguments)


def test_two_processes_train_what_one_does(fit, odd, in_two_processes):
    alone, together = network(), network()
    fit(alone, odd)
    used = fit(together, odd, **in_two_processes)
    assert_equal(alone, together, tolerance=1e-5)
    assert not [name for name, _ in together.named_parameters() if "anchor" in name]
    saved = torch.load(written(used), weights_only=True)["state_dict"]
    assert saved.keys() == together.state_dict().keys()


def test_a_failing_fit_ends_all_processes(fit, odd, in_two_processes):
    with pytest.raises(Exception, match="only 1280 training patches"):
        fit(model(num_prototypes=9000), odd, **in_two_processes)


@pytest.mark.cli
def test_two_processes_of_the_command_line(anomalib, small_model, small_data, reference, tmp_path):
    several = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.train_batch_size", "2"]
    done = anomalib.fresh("fit", *small_model, *small_data, *several, cwd=tmp_path)
    assert done.code == 0, done.err
    (checkpoint,) = (tmp_path / "results").rglob("model.ckpt")
    assert_equal(OTPrototypes.load_from_checkpoint(checkpoint), reference, tolerance=1e-5)


# ---- precision and memory


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_near(precision, fit, data):
    trained, exact = network(), network()
    used, _ = fit(trained, precision=precision), fit(exact)
    scores = {}
    for name, tested in (("mixed", trained), ("exact", exact)):
        batches = used.predict(model=tested, datamodule=data())
        scores[name] = torch.cat([batch.anomaly_map for batch in batches])
        assert scores[name].dtype == torch.float32
    assert torch.corrcoef(torch.stack([scores["mixed"].flatten(), scores["exact"].flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_true_half_precision_is_refused(precision, fit):
    with pytest.raises(InputError, match=rf"trainer.precision is '{precision}'.*expected '32-true', or '16-mixed'"):
        fit(model(), precision=precision)


def test_the_cache_keeps_to_its_bound_and_is_gone_afterwards(fit, caplog):
    embedded = model().model.embed(torch.zeros(1, 3, *SIZE))
    size = sum(embeddings.nbytes for embeddings, _ in embedded.values())
    trained = model(advanced={"max_cached_gb": 3.5 * size / 1e9})
    used = fit(trained)
    assert "The fit uses 3 of 6 training images" in caplog.text
    assert len(trained._cache) == 0
    assert written(used).stat().st_size < 100_000


@pytest.fixture
def little():
    """The memory for two and a half images of `model()`, in GB."""
    embedded = model().model.embed(torch.zeros(1, 3, *SIZE))
    return 2.5 * sum(embeddings.nbytes for embeddings, _ in embedded.values()) / 1e9


def test_with_a_folder_the_fit_uses_all_images_and_leaves_no_file(fit, reference, little, tmp_path, caplog):
    trained = model(advanced={"max_cached_gb": little, "cache_dir": tmp_path / "cache"})
    fit(trained)
    assert_equal(trained, reference)
    assert "The fit uses" not in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_two_processes_with_a_folder_train_what_one_does(fit, odd, little, in_two_processes, tmp_path):
    alone, together = model(), model(advanced={"max_cached_gb": little, "cache_dir": tmp_path / "cache"})
    fit(alone, odd)
    fit(together, odd, **in_two_processes)
    assert_equal(alone, together, tolerance=1e-5)
    assert not list((tmp_path / "cache").iterdir())


def test_a_fit_that_fails_leaves_no_file(fit, little, tmp_path):
    with pytest.raises(InputError, match="only 1536 training patches"):
        fit(model(advanced={"max_cached_gb": little, "cache_dir": tmp_path}, num_prototypes=9000))
    assert not list(tmp_path.glob("embeddings_*"))


def test_a_pass_that_fails_leaves_no_file(fit, little, tmp_path, monkeypatch):
    trained = model(advanced={"max_cached_gb": little, "cache_dir": tmp_path / "cache"})
    add, written = trained._cache.add, []

    def fail_late(*args):
        add(*args)
        written.extend((tmp_path / "cache").rglob("*.f32"))
        if written:
            raise RuntimeError("the light went out")

    monkeypatch.setattr(trained._cache, "add", fail_late)
    with pytest.raises(RuntimeError, match="light"):
        fit(trained)
    assert written
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_written_to_stops_the_training_at_once(fit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache_dir .* cannot be written to"):
        fit(model(advanced={"cache_dir": tmp_path / "file"}))


# ---- checkpoints


def test_a_checkpoint_is_plain_data_and_restores_every_bit(fit):
    trained = model(num_prototypes=5, advanced={"transport_score": True})
    checkpoint = written(fit(trained))
    saved = torch.load(checkpoint, weights_only=True)
    assert not [name for name in saved["state_dict"] if "cache" in name]
    restored = OTPrototypes.load_from_checkpoint(checkpoint)
    assert len(prototypes(restored)) == 5
    assert_equal(restored, trained)
    image = torch.rand(2, 3, 80, 80)
    with torch.inference_mode():
        for one, other in zip(trained.eval()(image), restored.eval()(image), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("version", ["0.1", "nested"])
def test_checkpoints_with_all_arguments_beside_each_other_load(version, fit):
    options = {
        "alpha": 0.2,
        "smoothing": 2.0,
        "transport_score": False,
        "epochs": 3,
        "max_cached_gb": 2.0,
        "score": "max",
    }
    trained = model(advanced=options)
    checkpoint = written(fit(trained, max_epochs=1))
    saved = torch.load(checkpoint, weights_only=True)
    if version == "0.1":
        saved["hyper_parameters"] |= saved["hyper_parameters"].pop("advanced")
        torch.save(saved, checkpoint)
    loaded = OTPrototypes.load_from_checkpoint(checkpoint)
    assert_equal(loaded, trained)
    assert loaded.hparams == trained.hparams
    assert loaded.epochs == 3
    other = OTPrototypes.load_from_checkpoint(checkpoint, advanced={"smoothing": 1.0, "epochs": 2})
    assert other.epochs == 2
    assert (other.hparams["advanced"]["smoothing"], other.hparams["advanced"]["max_cached_gb"]) == (1.0, 2.0)


def test_arguments_given_on_loading_win(fit):
    checkpoint = written(fit(model()))
    assert OTPrototypes.load_from_checkpoint(checkpoint, advanced={"alpha": 0.9}).model.banks[0].member.alpha == 0.9


def test_a_checkpoint_needs_no_weights_and_no_hub(fit, data, engine, tmp_path, monkeypatch):
    weights = tmp_path / "resnet18.safetensors"
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), weights)
    trained = network(pre_trained=True, backbone_weights=weights)
    used = fit(trained, max_epochs=1)
    checkpoint, before = written(used), used.test(model=trained, datamodule=data(), verbose=False)
    weights.unlink()
    fetch = "anomalib_ot.integration.models.ot_prototypes.fill_weights"
    monkeypatch.setattr(fetch, lambda *_, **__: pytest.fail("weights are looked for"))
    assert_equal(OTPrototypes.load_from_checkpoint(checkpoint), trained)
    unlike = OTPrototypes()
    assert engine().test(model=unlike, datamodule=data(), ckpt_path=checkpoint, verbose=False) == before
    fit(network(pre_trained=True, backbone_weights=weights), checkpoint=checkpoint, max_epochs=2)


def test_a_checkpoint_brings_its_size_to_the_data(fit, data, engine):
    trained = model(image_size=(64, 48))
    used = fit(trained)
    checkpoint, before = written(used), used.test(model=trained, datamodule=data(), verbose=False)
    other = model(image_size=(96, 96), advanced={"alpha": 0.8})
    datamodule = data()
    assert engine().test(model=other, datamodule=datamodule, ckpt_path=checkpoint, verbose=False) == before
    assert tuple(datamodule.test_data[0].image.shape[-2:]) == (64, 48)
    assert list(other.hparams["image_size"]) == [64, 48]


def test_a_checkpoint_of_another_model_is_refused(data, engine):
    other = engine()
    other.fit(model=Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=10), datamodule=data())
    with pytest.raises(InputError, match="of another model, not of OTPrototypes"):
        OTPrototypes.load_from_checkpoint(written(other))


def test_copies_are_equal_trained_or_not(reference):
    for original in (reference, model()):
        for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert_equal(twin, original)
            assert twin.hparams == original.hparams


# ---- predictions


def test_predictions_carry_their_explanation(reference, engine, data, fabric):
    batches = engine().predict(model=reference, datamodule=data())
    batches += engine().predict(model=reference, data_path=fabric / "test/misplaced_motif")
    assert sum(len(batch.image_path) for batch in batches) == 5
    for batch in batches:
        assert isinstance(batch, ExplainedBatch)
        assert torch.equal(batch.feature_map + batch.position_map + batch.missing_map, batch.anomaly_map)
        assert batch.matched_position.shape == (len(batch.image_path), 2, 16, 16)
        assert batch.pred_label is not None
        item = batch.items[0]
        assert item.feature_map.shape == item.anomaly_map.shape == SIZE


def test_plain_data_loaders_do_as_well(reference, engine, data):
    datamodule = data()
    datamodule.setup()
    trained, used = model(), engine()
    loader = DataLoader(datamodule.train_data, batch_size=3, collate_fn=datamodule.train_data.collate_fn)
    used.fit(model=trained, train_dataloaders=loader)
    assert_equal_banks(trained, reference)


def assert_equal_banks(one: OTPrototypes, other: OTPrototypes) -> None:
    for first, second in zip(one.model.banks.buffers(), other.model.banks.buffers(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_patchcore_style_use_with_worker_processes(fabric, tmp_path, engine):
    root = Path(shutil.copytree(fabric, tmp_path / "cloth"))
    folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/stain"}
    datamodule = Folder(name="cloth", root=root, **folders)
    assert datamodule.num_workers == 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used, trained = engine(), model()
        used.train(model=trained, datamodule=datamodule)
    assert not math.isnan(float(trained.post_processor.image_threshold))


# ---- defective images among the good ones


def test_images_unlike_all_others_are_named(fit, tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    kinds = {"good": range(24), "fine": range(24, 26), "bad": range(26, 28)}
    for kind, numbers in kinds.items():
        (tmp_path / "parts" / kind).mkdir(parents=True)
        for number in numbers:
            pixels = (110 + 20 * torch.rand(*SIZE, 3, generator=generator)).to(torch.uint8)
            if number in (5, 11) or kind == "bad":
                pixels[24:40, 24:40] = torch.tensor([250, 8 * number, 0], dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "parts" / kind / f"{number:02}.png")
    folders = {"normal_dir": "good", "normal_test_dir": "fine", "abnormal_dir": "bad"}
    datamodule = Folder(name="parts", root=tmp_path / "parts", **folders, num_workers=0, val_split_mode="same_as_test")
    trained = OTPrototypes(backbone="resnet18", layers=["layer1", "layer2"], image_size=SIZE, pre_trained=False)
    with caplog.at_level("WARNING"):
        fit(trained, datamodule)
    (message,) = [record.getMessage() for record in caplog.records if "look unlike all others" in record.getMessage()]
    assert message.startswith("2 of 24 training images look unlike all others")
    assert "05.png" in message
    assert "11.png" in message
    kept = trained.model.banks[0].num_prototypes
    trained = OTPrototypes(
        backbone="resnet18",
        layers=["layer1", "layer2"],
        image_size=SIZE,
        pre_trained=False,
        advanced={"drop_outliers": True},
    )
    with caplog.at_level("WARNING"):
        fit(trained, datamodule)
    assert trained.model.banks[0].num_prototypes < kept
