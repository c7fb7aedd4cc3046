"""Augmentations: an image and its boxes stay aligned, labels stay in step, sizes stay fixed, nothing is lost."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from anomalib_ot.vision.augment import BoxSafeCrop, DefectAugmentation, keep_boxes, seen_parts

# Whole pixels, disjoint, with gaps: each rectangle is drawn in the brightness that its label stands for.
BOXES = [[12, 8, 30, 20], [50, 10, 60, 44], [8, 40, 40, 46], [70, 30, 78, 38]]
SIZE = (52, 90)


def scene(boxes=BOXES, size=SIZE):
    image = torch.zeros(3, *size)
    for label, (x1, y1, x2, y2) in enumerate(boxes):
        image[:, y1:y2, x1:x2] = level(label)
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes).float().reshape(-1, 4), format="XYXY", canvas_size=size),
        "labels": torch.arange(len(boxes)),
    }


def level(label):
    return 0.4 + 0.15 * label


def extent(image, label, tolerance):
    """Where the rectangle of a label is seen, xyxy."""
    rows, columns = torch.nonzero((image[0] - level(label)).abs() < tolerance, as_tuple=True)
    if not len(rows):
        return None
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def check(out, size):
    assert out["image"].shape == (3, *size)
    assert out["boxes"].canvas_size == size
    assert len(out["boxes"]) == len(out["labels"])
    assert (out["boxes"][:, 2:] > out["boxes"][:, :2]).all()
    assert (out["boxes"] >= 0).all()
    assert (out["boxes"] <= torch.tensor([*size[::-1], *size[::-1]])).all()


@pytest.mark.parametrize("size", [(24, 32), (20, 90), (52, 90), (60, 100), (30, 120), (200, 200)])
@pytest.mark.parametrize("seed", range(4))
def test_boxes_enclose_exactly_their_rectangles_after_a_crop(size, seed):
    torch.manual_seed(seed)
    out = BoxSafeCrop(size)(scene())
    check(out, size)
    for box, label in zip(out["boxes"].tolist(), out["labels"].tolist(), strict=True):
        assert extent(out["image"], label, 0.01) == box
    if size[0] >= SIZE[0] and size[1] >= SIZE[1]:
        assert out["labels"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(12))
def test_boxes_stay_on_their_rectangles_through_all_steps(seed):
    torch.manual_seed(seed)
    boxes = [[20, 20, 60, 50], [90, 16, 120, 76]]
    augmentation = DefectAugmentation(crop_size=(70, 90), scale=(0.7, 1.4), brightness=0.0, contrast=0.0)
    out = augmentation(scene(boxes, (96, 140)))
    check(out, (70, 90))
    for box, label in zip(out["boxes"].tolist(), out["labels"].tolist(), strict=True):
        # Edges blur by a pixel under the resize: the flat inner part is seen, at most 2 pixels off.
        assert all(abs(a - b) <= 2 for a, b in zip(box, extent(out["image"], label, 0.05), strict=True))


def test_the_output_has_the_size_of_the_input_by_default():
    for seed in range(10):
        torch.manual_seed(seed)
        check(DefectAugmentation()(scene()), SIZE)


def test_a_box_is_either_whole_or_clipped_or_gone_with_its_label():
    torch.manual_seed(0)
    counts = {"whole": 0, "clipped": 0, "gone": 0}
    crowd = [[1, 1, 30, 24], [31, 1, 60, 24], [1, 25, 30, 48], [31, 25, 60, 48]]
    for _ in range(200):
        out = BoxSafeCrop((32, 40), min_part=0.6, focus=0.5)(scene(crowd, (50, 62)))
        found = dict(zip(out["labels"].tolist(), out["boxes"].tolist(), strict=True))
        for label, (x1, y1, x2, y2) in enumerate(crowd):
            shown = extent(out["image"], label, 0.01)
            area = 0 if shown is None else (shown[2] - shown[0]) * (shown[3] - shown[1])
            possible = min(x2 - x1, 40) * min(y2 - y1, 32)
            if area >= 0.6 * possible:
                assert found[label] == shown
                counts["whole" if area == possible else "clipped"] += 1
            else:
                assert label not in found
                counts["gone"] += 1
    assert min(counts.values()) > 0


def test_the_window_cuts_no_box_where_it_need_not():
    torch.manual_seed(0)
    for _ in range(100):
        out = BoxSafeCrop((40, 60), focus=0.0)(scene([[30, 20, 50, 40]], (100, 120)))
        for box in out["boxes"]:
            assert (box[2:] - box[:2]).tolist() == [20, 20]


def test_focus_shows_a_box_and_no_focus_any_place():
    torch.manual_seed(0)
    far = scene([[400, 300, 410, 308]], (600, 800))
    assert all(len(BoxSafeCrop((32, 32), focus=1.0)(far)["boxes"]) == 1 for _ in range(30))
    assert sum(len(BoxSafeCrop((32, 32), focus=0.0)(far)["boxes"]) for _ in range(30)) <= 3


def test_a_defect_longer_than_the_window_stays_labeled():
    torch.manual_seed(0)
    for _ in range(20):
        out = BoxSafeCrop((32, 32), focus=1.0)(scene([[0, 60, 400, 64]], (120, 400)))
        assert (out["boxes"][0, 2:] - out["boxes"][0, :2]).tolist() == [32, 4]


def test_padding_has_the_mean_color_and_the_image_lies_anywhere():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.tensor([0.2, 0.4, 0.6])[:, None, None].expand(3, 4, 6).clone())
    image[:, 0] += 0.1
    places = set()
    for _ in range(60):
        out = BoxSafeCrop((8, 9))(image)
        mean = image.mean(dim=(1, 2))
        inside = (out - mean[:, None, None]).abs().amax(0) > 1e-3
        assert int(inside.sum()) == 24
        rows, columns = torch.nonzero(inside, as_tuple=True)
        places.add((int(rows.min()), int(columns.min())))
    assert {place[0] for place in places} == set(range(5))
    assert {place[1] for place in places} == set(range(4))


def test_images_without_boxes_and_images_alone_work():
    empty = scene([])
    out = DefectAugmentation(crop_size=(16, 20))(empty)
    check(out, (16, 20))
    assert len(out["boxes"]) == 0
    assert DefectAugmentation(crop_size=(16, 20))(torch.rand(3, 40, 40)).shape == (3, 16, 20)
    image, target = BoxSafeCrop((16, 20))(scene()["image"], {k: v for k, v in scene().items() if k != "image"})
    assert image.shape == (3, 16, 20)
    assert len(target["boxes"]) == len(target["labels"])


def test_masks_go_with_the_image():
    torch.manual_seed(1)
    sample = scene() | {"mask": tv_tensors.Mask((scene()["image"][0] > 0).to(torch.uint8))}
    out = BoxSafeCrop((60, 40))(sample)
    assert isinstance(out["mask"], tv_tensors.Mask)
    for box in out["boxes"].int().tolist():
        assert out["mask"][box[1] : box[3], box[0] : box[2]].all()


def test_the_same_seed_gives_the_same_picture():
    def draw(seed):
        torch.manual_seed(seed)
        return DefectAugmentation(crop_size=(32, 32))(scene())

    assert torch.equal(draw(3)["image"], draw(3)["image"])
    assert torch.equal(draw(3)["boxes"], draw(3)["boxes"])
    assert not torch.equal(draw(3)["image"], draw(4)["image"])


def test_flip_can_be_turned_off():
    plain = DefectAugmentation(flip=False, scale=(1.0, 1.0), brightness=0.0, contrast=0.0)
    assert torch.equal(plain(scene())["image"], scene()["image"])
    assert torch.equal(plain(scene())["boxes"], scene()["boxes"])
    mirrored = DefectAugmentation(scale=(1.0, 1.0), brightness=0.0, contrast=0.0)
    torch.manual_seed(0)
    seen = {tuple(mirrored(scene())["boxes"][0].tolist()) for _ in range(40)}
    h, w = SIZE
    x1, y1, x2, y2 = BOXES[0]
    assert seen == {
        (x1, y1, x2, y2),
        (w - x2, y1, w - x1, y2),
        (x1, h - y2, x2, h - y1),
        (w - x2, h - y2, w - x1, h - y1),
    }


@settings(max_examples=60, deadline=None)
@given(
    box=st.tuples(*[st.floats(0, 60)] * 2, *[st.floats(0.5, 60)] * 2),
    window=st.tuples(*[st.integers(-20, 80)] * 2, *[st.integers(1, 50)] * 2),
)
def test_seen_parts_are_parts(box, window):
    x, y, w, h = box
    left, top, width, height = window
    boxes = torch.tensor([[x, y, x + w, y + h]])
    windows = torch.tensor([[left, top, left + width, top + height]]).float()
    (part,) = seen_parts(boxes, windows).flatten().tolist()
    overlap_x = max(0.0, min(x + w, left + width) - max(x, left))
    overlap_y = max(0.0, min(y + h, top + height) - max(y, top))
    assert math.isclose(part, overlap_x * overlap_y / (min(w, width) * min(h, height)), abs_tol=1e-4)
    assert 0 <= part <= 1


def test_keep_boxes_keeps_labels_in_step():
    out = keep_boxes([{"image": scene()["image"], "target": scene()}], torch.tensor([True, False, False, True]))
    assert out[0]["target"]["labels"].tolist() == [0, 3]
    assert out[0]["target"]["boxes"].tolist() == [BOXES[0], BOXES[3]]
    assert out[0]["target"]["boxes"].canvas_size == SIZE


def test_the_augmentation_is_a_part_of_a_composition():
    out = v2.Compose([v2.Resize((104, 180)), DefectAugmentation(crop_size=(64, 64))])(scene())
    check(out, (64, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": (0, 5)}, r"size is \(0, 5\)"),
        ({"crop_size": 32}, "size is 32; expected \\(height, width\\)"),
        ({"scale": (1.2, 0.8)}, "scale is"),
        ({"scale": (0.0, 1.0)}, "scale is"),
        ({"brightness": -0.1}, r"brightness is -0\.1"),
        ({"contrast": 2.0}, r"contrast is 2\.0"),
        ({"min_part": 0.0}, "min_part is 0"),
        ({"focus": 1.5}, r"focus is 1\.5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DefectAugmentation(**arguments)


def test_other_samples_are_refused():
    with pytest.raises(TypeError, match="put ToImage"):
        BoxSafeCrop((8, 8))(Image.new("RGB", (20, 20)))
    boxes = tv_tensors.BoundingBoxes([[1, 1, 2, 2]], format="XYWH", canvas_size=(9, 9))
    with pytest.raises(ValueError, match=r"XYWH.*expected one, in XYXY"):
        BoxSafeCrop((8, 8))(tv_tensors.Image(torch.zeros(3, 9, 9)), boxes)
