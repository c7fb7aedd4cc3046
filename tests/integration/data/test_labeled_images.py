"""Cleaning of boxes, counting of what was found, and the check of image files."""

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.integration.data.records import Findings, LabeledImage, check_image_files, clean_box


def record(path, size=(40, 30)):
    return LabeledImage.of(str(path), size, [], [])


def save(path, size=(40, 30), mode="RGB", **arguments):
    Image.new(mode, size).save(path, **arguments)
    return path


def test_records_hold_arrays_of_the_right_shape():
    empty = LabeledImage.of("a.png", (4, 3), [], [])
    assert (empty.boxes.shape, empty.boxes.dtype) == ((0, 4), np.float32)
    assert (empty.labels.shape, empty.labels.dtype) == ((0,), np.int64)


def test_findings_count_by_kind():
    findings = Findings()
    for number in range(3):
        findings.add("box", "dropped", f"image {number}")
    findings.add("image", "merged", "b.png", count=2)
    findings.add("class", "missing", "'hole'")
    assert findings.warnings == [
        "3 boxes dropped, first: image 0",
        "2 images merged, first: b.png",
        "1 class missing ('hole')",
    ]


def test_findings_go_to_the_log(caplog):
    findings = Findings()
    findings.add("box", "dropped", "image a.png")
    findings.log("data boards")
    assert caplog.messages == ["data boards: 1 box dropped (image a.png)"]


def test_small_boxes_are_dropped_after_clipping():
    findings = Findings()
    assert clean_box((-50, 0, 2, 10), (100, 100), findings, "a", min_area=21) is None
    assert clean_box((0, 0, 3, 7), (100, 100), findings, "b", min_area=21) == (0, 0, 3, 7)
    assert findings.warnings[1] == "1 box of less than 21 square pixels dropped (a)"


def test_files_of_the_right_size_pass(tmp_path):
    findings = Findings()
    paths = [save(tmp_path / f"{mode}.png", mode=mode) for mode in ("RGB", "L", "P", "RGBA", "I;16", "1")]
    check_image_files([record(path) for path in paths], findings)
    assert findings.warnings == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png does not exist; restore it"):
        check_image_files([record(save(tmp_path / "a.png")), record(tmp_path / "gone.png")], Findings())


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"a\.png is text, not an image"):
        check_image_files([record(tmp_path / "a.png")], Findings())


def test_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png is 40 x 30 pixels, its annotations say 80 x 60; expected the same"):
        check_image_files([record(save(tmp_path / "a.png"), (80, 60))], Findings())


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_boxes_drawn_on_the_turned_image_are_refused(tmp_path):
    path = save(tmp_path / "a.jpg", exif=exif(6))
    with pytest.raises(ValueError, match=r"say 30 x 40: .* turned by its EXIF orientation \(6\).*exif_transpose"):
        check_image_files([record(path, (30, 40))], Findings())


def test_turned_images_with_fitting_boxes_are_counted(tmp_path):
    findings = Findings()
    check_image_files([record(save(tmp_path / f"{i}.jpg", exif=exif(3))) for i in range(2)], findings)
    (warning,) = findings.warnings
    assert warning.startswith("2 images turned by EXIF orientation 3 read as stored")


def test_huge_images_are_counted_or_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    findings = Findings()
    check_image_files([record(path)], findings)
    assert "slow to read" in findings.warnings[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.png has more pixels than Pillow opens.*cut it into tiles"):
        check_image_files([record(path)], Findings())
