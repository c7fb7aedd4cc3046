"""Before the model: training and export see the same image."""

import pytest
import torch
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from anomalib_ot.integration.processing.pre_post import ExportablePreProcessor
from anomalib_ot.vision.resize import AntialiasResize

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def images(size=(90, 70), batch=2):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(90, 70), (20, 200), (64, 48)], ids=str)
def test_training_and_export_see_the_same_image(size):
    processor = ExportablePreProcessor.of((64, 48), MEAN, STD)
    trained, exported = processor.transform(images(size)), processor(images(size))
    assert exported.shape == (2, 3, 64, 48)
    torch.testing.assert_close(exported, trained, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, 2])
def test_every_name_of_the_bilinear_mode_is_known(mode):
    processor = ExportablePreProcessor(Resize((20, 16), interpolation=mode))
    torch.testing.assert_close(processor(images()), processor.transform(images()), rtol=0, atol=2e-5)


def test_anomalibs_own_export_sees_another_image():
    # What the resize here is for: if this fails, Anomalib keeps the antialias, and AntialiasResize can go.
    from anomalib.pre_processing import PreProcessor

    own = PreProcessor(ExportablePreProcessor.of((16, 12), MEAN, STD).transform)
    assert (own.transform(images()) - own(images())).abs().max() > 0.1


def test_a_checkpoint_brings_the_exportable_resize_back():
    processor = ExportablePreProcessor.of((64, 48), MEAN, STD)
    fresh = ExportablePreProcessor()
    assert fresh(images()) is not None
    fresh.load_checkpoint_config(processor.checkpoint_config())
    assert any(isinstance(part, AntialiasResize) for part in fresh.export_transform)
    assert torch.equal(fresh(images()), processor(images()))
    assert torch.equal(fresh.transform(images()), processor.transform(images()))


def test_nested_compositions_and_crops():
    transform = Compose([Compose([Resize((64, 48), antialias=True)]), CenterCrop((32, 40)), Normalize(MEAN, STD)])
    processor = ExportablePreProcessor(transform)
    torch.testing.assert_close(processor(images()), transform(images()), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "resize",
    [
        Resize((40, 30), interpolation=InterpolationMode.BICUBIC, antialias=False),
        Resize((40, 30), interpolation=InterpolationMode.NEAREST),
        Resize((40, 30), antialias=False),
        Resize(40, antialias=False),
    ],
    ids=str,
)
def test_another_kind_of_resize_stays_what_it_is(resize):
    processor = ExportablePreProcessor(Compose([resize, Normalize(MEAN, STD)]))
    torch.testing.assert_close(processor(images()), processor.transform(images()), rtol=0, atol=2e-5)


def test_no_transform_leaves_images_alone():
    x = images()
    assert ExportablePreProcessor()(x) is x
