"""Boxes written as corners are told from sizes; few or mixed ones are left to the clipping."""

import json

import pytest

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.coco_json import read_coco
from anomalib_ot.integration.data.records import Findings

CORNERS, INNER = [60, 50, 90, 70], [5, 5, 20, 30]  # the inner ones could be either


@pytest.fixture
def read(tmp_path):
    def read(*boxes):
        content = {"images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}]}
        content["annotations"] = [
            {"id": number, "image_id": 1, "category_id": 1, "bbox": bbox} for number, bbox in enumerate(boxes)
        ]
        content["categories"] = [{"id": 1, "name": "hole"}]
        (tmp_path / "boxes.json").write_text(json.dumps(content))
        return read_coco(tmp_path / "boxes.json", Findings())

    return read


def test_corners_are_refused(read):
    with pytest.raises(InputError, match=r"6 of 10 boxes reach over .*expected bbox as in COCO") as caught:
        read(*[CORNERS] * 6, *[INNER] * 3, [0, 0, 100, 80], [float("nan")] * 4)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "boxes",
    [
        [CORNERS] * 4,
        [*[CORNERS] * 5, *[INNER] * 5],
        [*[CORNERS] * 8, [60, 50, 30, 20]],
        [*[CORNERS] * 8, [60, 50, 120, 70]],
        [[60, 50, 40, 30]] * 8,
    ],
    ids=["few", "half", "one of size", "one outside", "sizes up to the border"],
)
def test_sizes_are_read(read, boxes):
    assert len(read(*boxes).images[0].boxes) == len(boxes)
