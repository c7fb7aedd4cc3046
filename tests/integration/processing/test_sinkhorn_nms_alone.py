"""SinkhornNMS on its own: lists as torchvision's detectors return them, and arguments that mean nothing."""

import pytest
import torch

from anomalib_ot import SinkhornNMS
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.processing.sinkhorn_nms import CHECKPOINT_KEY, sinkhorn_nms_of


def image_of(*scores):
    boxes = torch.tensor([[10.0, 10, 50, 50], [12, 10, 52, 50], [70, 10, 90, 30]])[: len(scores)]
    return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.full((len(scores),), 3)}


def test_lists_of_any_lengths():
    nms = SinkhornNMS("merge")
    assert nms([]) == []
    found = nms([image_of(), image_of(0.9, 0.7, 0.6), image_of(0.3)])
    assert [len(image["scores"]) for image in found] == [0, 2, 1]
    assert [tuple(image["boxes"].shape) for image in found] == [(0, 4), (2, 4), (1, 4)]
    torch.testing.assert_close(found[1]["boxes"][0], torch.tensor([11.0, 10, 51, 50]), atol=0.2, rtol=0)
    assert found[1]["labels"].tolist() == [3, 3]
    (alone,) = nms([image_of(0.3)])
    torch.testing.assert_close(alone["boxes"], found[2]["boxes"])
    (empty,) = nms([image_of()])
    assert empty["boxes"].shape == (0, 4)


def test_order_does_not_matter():
    image = image_of(0.6, 0.9, 0.7)
    shuffled = {name: value[[1, 2, 0]] for name, value in image.items()}
    for one, other in zip(SinkhornNMS()([image])[0].values(), SinkhornNMS()([shuffled])[0].values(), strict=True):
        assert torch.equal(one, other)


def test_what_a_torchvision_detector_returns():
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3, score_thresh=0.0, nms_thresh=1.0, detections_per_img=150
    ).eval()
    with torch.no_grad():
        raw = model([torch.rand(3, 96, 80), torch.rand(3, 60, 60)])
    found = SinkhornNMS(threshold=0.5, score_threshold=0.0)(raw)
    for one, other in zip(found, raw, strict=True):
        assert set(one) == {"boxes", "scores", "labels"}
        assert 0 < len(one["scores"]) < len(other["scores"])
        assert (one["scores"].diff() <= 0).all()
        assert one["labels"].unique().tolist() == other["labels"].unique().tolist()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"loss": 1.0}, "expected Detections, or a list.*; dict came"),
        (torch.zeros(3, 4), "Tensor came"),
        ([{"boxes": torch.zeros(0, 4)}], r"image 0 has \['boxes'\]"),
        ([image_of(0.5), torch.zeros(4)], "image 1 has Tensor"),
        ([image_of(0.5) | {"boxes": torch.zeros(1, 5)}], r"image 0 has boxes \(1, 5\).*expected \(N, 4\)"),
        ([image_of(0.5) | {"scores": torch.zeros(2)}], r"scores \(2,\)"),
        ([image_of(0.5) | {"labels": torch.zeros(1)}], "labels of image 0 are torch.float32"),
        ([image_of(0.5) | {"scores": torch.tensor(0.5)}], r"scores \(\), labels \(1,\); expected"),
        ([image_of(0.5) | {"scores": torch.tensor([1])}], "scores of image 0 are torch.int64; expected floating"),
        ([image_of(0.5) | {"boxes": [[1.0, 2, 3, 4]]}], "boxes of image 0 come as list; expected a tensor"),
        (
            [{name: value.numpy() for name, value in image_of(0.5).items()}],
            "image 0 come as numpy.ndarray; .*as_tensor",
        ),
        (
            [image_of(0.5, 0.4) | {"boxes": torch.tensor([[0.0, 0, 9, 9], [9, 0, 5, 9]])}],
            r"^box 1 of image 0 is \[9.0, 0.0, 5.0, 9.0\], and 1 of 2 end before they begin",
        ),
        ([image_of(1.5)], r"scores\[0, 0\] is 1.5; expected a number in \[0, 1\]"),
        ([image_of(0.5, float("nan"))], "scores.* is nan"),
    ],
)
def test_what_are_no_detections(found, message):
    with pytest.raises(ValueError, match=message) as caught:
        SinkhornNMS()(found)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_candidates": "many"}, "^max_candidates is 'many'; expected a whole number of at least 1"),
        ({"max_candidates": 2.5}, "^max_candidates is 2.5"),
        ({"max_candidates": True}, "^max_candidates is True"),
        ({"max_detections": 0}, "^max_detections is 0"),
        ({"decode": "best"}, "^decode is 'best'; expected one of 'select', 'merge'"),
        ({"threshold": 60}, "^threshold is 60; expected a number above 0 and below 1"),
        ({"threshold": None}, "^threshold is None"),
        ({"threshold": "0.5"}, "^threshold is '0.5'"),
        ({"score_threshold": [0.1]}, r"^score_threshold is \[0.1\]; expected a number from 0 to 1"),
        ({"class_aware": 1}, "^class_aware is 1; expected true or false"),
        ({"settings": "epsilon"}, "^settings is 'epsilon'; expected names with values"),
        ({"settings": {"epsilonn": 1.0}}, "^settings is 'epsilonn'.*did you mean 'epsilon'"),
        ({"settings": {"epsilon": None}}, "^epsilon is None; expected a finite number above 0"),
        ({"settings": {"decode": "merge"}}, "^settings has 'decode'; .*give it as decode alone"),
        ({"settings": {"max_regions": 9}}, "^settings has 'max_regions'; .*give it as max_detections alone"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        SinkhornNMS(**arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_arguments_of_an_older_checkpoint_are_read_and_the_removed_preset_is_refused():
    kept = SinkhornNMS(decode="merge", threshold=0.5).checkpoint_config()[CHECKPOINT_KEY]
    assert sinkhorn_nms_of(kept | {"preset": "sinkhorn"}).arguments == kept
    spelled = kept | {"settings": kept["settings"] | {"spatial": "centre"}}
    assert sinkhorn_nms_of(spelled).settings["spatial"] == "center"
    with pytest.raises(InputError, match=r"keeps a SinkhornNMS with preset 'paper', .* expected 'sinkhorn'"):
        sinkhorn_nms_of(kept | {"preset": "paper"})
