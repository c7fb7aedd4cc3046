"""A trained model says the same on the line as in Anomalib: same files, same scores, maps and verdicts."""

import numpy as np
import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

from anomalib_ot import Inspector, OTPrototypes
from anomalib_ot.integration.data.synthetic_fabric import FabricFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("fabric")
    FabricFolder(num_train=6, num_test_good=2, num_per_defect=1, image_size=(64, 64)).ensure(root / "set")
    data = Folder(
        name="fabric",
        root=root / "set",
        normal_dir="train/good",
        abnormal_dir="test/hole",
        normal_test_dir="test/good",
        num_workers=0,
        train_batch_size=4,
        eval_batch_size=4,
    )
    model = OTPrototypes(
        backbone="filter_bank",
        layers=["scale1", "scale2"],
        image_size=(64, 64),
        num_prototypes=8,
        visualizer=False,
    )
    engine = Engine(default_root_dir=root / "run", accelerator="cpu", logger=False)
    engine.fit(model=model, datamodule=data)
    post = model.post_processor  # else what is odder than the few images of the validation has score 1, whatever it is
    for value, number in {post.image_min: 0, post.image_max: 64, post.pixel_min: 0, post.pixel_max: 8}.items():
        value.fill_(number)
    post._pixel_threshold.fill_(2.0)
    return root / "set", engine, model, model.to_openvino(root / "export")


@pytest.fixture(scope="module")
def frames(trained, tmp_path_factory):
    """The part with a hole, in every way that a camera may write it."""
    folder = tmp_path_factory.mktemp("frames")
    part = Image.open(next((trained[0] / "test" / "hole").iterdir())).convert("RGB")
    part.save(folder / "rgb.png")
    part.resize((150, 111)).save(folder / "large.jpg")
    part.convert("RGBA").save(folder / "rgba.png")
    part.convert("P").save(folder / "palette.png")
    part.convert("L").save(folder / "gray.png")
    Image.fromarray(np.asarray(part.convert("L")).astype(np.uint16) * 257).save(folder / "gray16.png")
    exif = Image.Exif()
    exif[274] = 6
    part.save(folder / "turned.jpg", exif=exif)
    return folder


def test_scores_maps_and_verdicts_are_those_of_anomalib(trained, frames):
    _, engine, model, exported = trained
    expected = {}
    for batch in engine.predict(model=model, data_path=frames):
        for index, path in enumerate(batch.image_path):
            expected[path] = (batch.pred_score[index], batch.pred_label[index], batch.anomaly_map[index])
    with Inspector(exported, views=True) as inspector:
        found = list(inspector.stream(sorted(expected)))
    assert len(found) == 7
    assert len({round(one.score, 6) for one in found}) > 3
    for one in found:
        score, label, anomaly_map = expected[one.name]
        assert one.score == pytest.approx(float(score), abs=1e-3), one.name
        assert (one.verdict == "defect") == bool(label), one.name
        np.testing.assert_allclose(one.view.anomaly_map, anomaly_map.squeeze().numpy(), atol=1e-3, err_msg=one.name)
        assert one.causes is None or sum(one.causes) == 100
