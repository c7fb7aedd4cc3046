"""COCO files: what is read, what is put right and counted, what is refused, and what is written."""

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomalib_ot.integration.data.coco_json import read_coco, write_coco
from anomalib_ot.integration.data.records import Findings


def image(key=1, name="a.png", width=100, height=80, **more):
    return {"id": key, "file_name": name, "width": width, "height": height, **more}


def annotation(key=1, bbox=(10, 20, 30, 40), image_id=1, category_id=1, **more):
    return {"id": key, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), **more}


def coco(annotations=(), images=None, categories=None):
    return {
        "images": [image()] if images is None else images,
        "annotations": list(annotations),
        "categories": [{"id": 1, "name": "hole"}] if categories is None else categories,
    }


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "boxes.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        findings = Findings()
        return read_coco(path, findings), findings.warnings

    return read


def test_boxes_become_corners_and_categories_indices(read):
    categories = [{"id": 90, "name": "scratch"}, {"id": 7, "name": "hole"}]
    content = coco(
        [annotation(1, (10.5, 20.25, 30, 40), category_id=90), annotation(2, (0, 0, 100, 80), category_id=7)],
        [image(), image(5, "sub/b.png", 20, 10, date_captured="now")],
        categories,
    )
    file, warnings = read(content)
    assert file.class_names == ["hole", "scratch"]
    assert [entry.file_name for entry in file.images] == ["a.png", "sub/b.png"]
    assert file.images[0].boxes == [(10.5, 20.25, 40.5, 60.25), (0.0, 0.0, 100.0, 80.0)]
    assert file.images[0].labels == [1, 0]
    assert file.images[1].boxes == []
    assert warnings == []


FAULTS = {
    "zero": ((10, 10, 0, 5), "of zero area dropped"),
    "negative": ((10, 10, -4, 5), "of negative width or height dropped"),
    "outside": ((100, 10, 5, 5), "outside the image dropped"),
    "far outside": ((-50, -50, 5, 5), "outside the image dropped"),
    "short": ((10, 10, 5), "without four finite numbers dropped"),
    "empty": ((), "without four finite numbers dropped"),
    "words": (("a", 1, 2, 3), "without four finite numbers dropped"),
    "nan": ((float("nan"), 1, 2, 3), "without four finite numbers dropped"),
    "infinite": ((1, 1, float("inf"), 3), "without four finite numbers dropped"),
}


@pytest.mark.parametrize(("bbox", "what"), FAULTS.values(), ids=FAULTS)
def test_faulty_boxes_are_dropped_and_counted(read, bbox, what):
    file, warnings = read(coco([annotation(1), annotation(17, bbox), annotation(18, bbox)]))
    assert file.images[0].boxes == [(10, 20, 40, 60)]
    assert warnings == [f"2 boxes {what}, first: image a.png, annotation 17"]


def test_boxes_are_clipped(read):
    file, warnings = read(coco([annotation(3, (-5, 70, 20, 30)), annotation(4, (90, 10, 10.6, 8))]))
    assert file.images[0].boxes == [(0, 70, 15, 80), (90, 10, 100, 18)]
    assert warnings == ["1 box reaching over the border of the image clipped (image a.png, annotation 3)"]


def test_crowds_are_dropped_and_other_fields_are_not_needed(read):
    file, warnings = read(
        coco([annotation(1, iscrowd=1), annotation(2, iscrowd=0, area=3.5, score=0.4, segmentation=[])])
    )
    assert len(file.images[0].boxes) == 1
    assert warnings == ["1 box marked iscrowd (a region of many objects) dropped (image a.png, annotation 1)"]


def test_an_image_that_lost_all_its_boxes_is_no_negative(read):
    file, warnings = read(coco([annotation(1, (10, 10, 0, 0))], [image(), image(2, "b.png")]))
    assert [entry.file_name for entry in file.images] == ["b.png"]
    assert warnings[1] == "1 image left out for lack of a usable box (a.png)"


def test_doubles_are_merged_and_counted(read):
    double = annotation(1)
    file, warnings = read(
        coco([double, double, annotation(1, (1, 1, 5, 5)), {**annotation(), "id": 9}], [image(), image()])
    )
    assert file.images[0].boxes == [(10, 20, 40, 60), (1, 1, 6, 6), (10, 20, 40, 60)]
    assert [line.partition(" (")[0] for line in warnings] == [
        "1 image listed more than once merged",
        "1 annotation listed more than once merged",
        "1 annotation with an id that another one has kept",
    ]


@pytest.mark.parametrize("name", ["a.png", "./a.png", ".\\a.png"])
def test_one_file_under_two_ids_is_one_image_unless_both_are_annotated(read, name):
    file, warnings = read(
        coco([annotation(1, image_id=2), annotation(2, (1, 1, 5, 5), image_id=2)], [image(), image(2, name)])
    )
    assert len(file.images) == 1
    assert len(file.images[0].boxes) == 2
    assert len(warnings) == 1
    with pytest.raises(ValueError, match=r"the image a\.png has annotations under the ids 1 and 2; .*two videos"):
        read(coco([annotation(1), annotation(2, (1, 1, 5, 5), image_id=2)], [image(), image(2, name)]))


UNIT = st.floats(0.01, 1.0)
PIXELS = st.tuples(st.integers(0, 70), st.integers(0, 50), st.integers(2, 30), st.integers(2, 30))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(UNIT, UNIT, UNIT, UNIT), min_size=1, max_size=5), st.lists(PIXELS, max_size=9))
def test_fractions_are_never_taken_as_pixels(read, parts, boxes):
    content = coco([annotation(number, box) for number, box in enumerate([*parts, *boxes])])
    if len(parts) > len(boxes):
        with pytest.raises(ValueError, match=f"{len(parts)} of {len(parts) + len(boxes)} boxes lie within 0 to 1"):
            read(content)
    else:
        file, warnings = read(content)
        assert file.images[0].boxes == [(x, y, x + w, y + h) for x, y, w, h in boxes]
        assert warnings[0].startswith(f"{len(parts)} box")
        assert "in fractions of the image, not pixels, dropped" in warnings[0]


@pytest.mark.parametrize("name", ["gr\u00f6\u00dfe.png", "a.png"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_other_encodings_are_named(tmp_path, encoding, name):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(coco(images=[image(name=name)]), ensure_ascii=False), encoding)
    if (encoding, name) == ("cp1252", "a.png"):  # which is UTF-8, too
        assert read_coco(path, Findings()).images[0].file_name == name
        return
    with pytest.raises(ValueError, match=r"boxes\.json are text in (UTF-16|another).*save the file again in UTF-8"):
        read_coco(path, Findings())


def test_categories_of_one_name_are_one_class(read):
    categories = [{"id": 0, "name": "hole"}, {"id": 1, "name": "hole"}, {"id": 2, "name": "tear"}]
    file, warnings = read(coco([annotation(1), annotation(2, category_id=0)], categories=categories))
    assert file.class_names == ["hole", "tear"]
    assert file.images[0].labels == [0, 0]
    assert "merged" in warnings[0]


def test_annotations_without_an_id_and_names_with_backslashes(read):
    plain = annotation()
    del plain["id"]
    file, _ = read(coco([plain, plain], [image(name="images\\1\\a.png")]))
    assert len(file.images[0].boxes) == 2
    assert file.images[0].file_name == "images/1/a.png"


REFUSED = {
    "empty file": ("", "are empty (0 bytes)"),
    "not json": ("<xml>", "are not JSON"),
    "a list": ([annotation()], "hold a list; expected a COCO file"),
    "a number": ("3", "hold a int"),
    "an empty object": ({}, "have no 'images'"),
    "no annotations": ({"images": [], "categories": []}, "have no 'annotations'"),
    "no list": (coco() | {"images": "a"}, "have a text as 'images'"),
    "no object": (coco(images=[3]), "entry 0 of 'images' is a int"),
    "no images": (coco(images=[]), "have an empty list of images"),
    "no categories": (coco(categories=[]), "have an empty list of categories"),
    "category without name": (coco(categories=[{"id": 1}]), "category 0 is {'id': 1}"),
    "category of two names": (
        coco(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]),
        "category id 1 has the names ['a', 'b']",
    ),
    "unknown category": (coco([annotation(4, category_id=3)]), "annotation 4 (image a.png) has category_id 3"),
    "unknown image": (coco([annotation(4, image_id=3)]), "annotation 4 has image_id 3, which none of the 1 images"),
    "image id as text": (coco([annotation(4, image_id="1")]), "there is 1, a number, where this is a text: write both"),
    "image ids as texts": (coco([annotation(4)], [image("1")]), "there is '1', a text, where this is a number: write"),
    "category as text": (coco([annotation(4, category_id="1")]), "there is 1, a number, where this is a text: write"),
    "image without name": (coco(images=[{"id": 1}]), "image 0 has id 1, file_name None"),
    "image without size": (coco(images=[{"id": 1, "file_name": "a.png"}]), "has width None and height None"),
    "image of no size": (coco(images=[image(width=0)]), "image a.png has width 0"),
    "image of infinite size": (coco(images=[image(width=float("inf"))]), "image a.png has width inf"),
    "image of two sizes": (coco(images=[image(), image(2, width=99)]), "a.png (100 x 80) and for a.png (99 x 80)"),
    "id of two images": (coco(images=[image(), image(1, "b.png")]), "the id 1 stands for a.png (100 x 80) and for b"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(read, tmp_path, content, message):
    with pytest.raises(ValueError) as caught:
        read(content)
    said = str(caught.value)
    assert message in said
    assert str(tmp_path / "boxes.json") in said
    assert "\n" not in said
    assert any(word in said for word in ("expected", "correct it", "remove it", "write both"))


def test_a_missing_file_is_refused_and_its_neighbors_are_named(tmp_path):
    (tmp_path / "instances.json").write_text("{}")
    with pytest.raises(ValueError, match=r"train\.json do not exist, where there is instances\.json"):
        read_coco(tmp_path / "train.json", Findings())
    with pytest.raises(ValueError, match=r"other/train\.json do not exist; expected a COCO file"):
        read_coco(tmp_path / "other" / "train.json", Findings())


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "deep" / "out.json"
    boxes = [torch.tensor([[1.25, 2, 30.5, 40], [0, 0, 0, 0]]), np.zeros((0, 4)), [[5, 5, 9, 9]]]
    labels = [torch.tensor([1, -1]), [], [0]]
    scores = [torch.tensor([0.75, 0.0]), [], [0.5]]
    images = [("a.png", 100, 80), ("sub/b.png", 50, 40), ("c.png", 10, 10)]
    write_coco(path, images, boxes, labels, scores, ["hole", "tear"])
    findings = Findings()
    file = read_coco(path, findings)
    assert file.class_names == ["hole", "tear"]
    assert [(entry.file_name, entry.width, entry.height) for entry in file.images] == images
    assert [entry.boxes for entry in file.images] == [[(1.25, 2, 30.5, 40)], [], [(5, 5, 9, 9)]]
    assert [entry.labels for entry in file.images] == [[1], [], [0]]
    assert findings.warnings == []
    assert [entry["score"] for entry in json.loads(path.read_text())["annotations"]] == [0.75, 0.5]
    write_coco(path, images[2:], boxes[2:], labels[2:], None, ["hole", "tear"])
    assert "score" not in json.loads(path.read_text())["annotations"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": []}, "'labels': 0"),
        ({"labels": [[0, 1]]}, "1 boxes, 2 labels"),
        ({"scores": [[]]}, "1 boxes, 1 labels; expected as many of each, and of scores"),
        ({"labels": [[2]]}, "has label 2; expected at most 1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, changes, message):
    arguments = {"boxes": [[[1, 1, 2, 2]]], "labels": [[0]], "scores": [[0.5]]} | changes
    with pytest.raises(ValueError, match=message):
        write_coco(tmp_path / "a.json", [("a.png", 9, 9)], class_names=["a", "b"], **arguments)
    assert not (tmp_path / "a.json").exists()


@pytest.mark.slow
def test_ten_thousand_images_are_read_in_seconds(read):
    images = [image(key, f"{key}.png") for key in range(10_000)]
    content = coco([annotation(key, image_id=key % 10_000) for key in range(40_000)], images)
    started = time.process_time()
    file, _ = read(content)
    assert len(file.images) == 10_000
    assert time.process_time() - started < 10
