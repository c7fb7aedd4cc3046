"""What the pictures of both subjects share: repeatable, all different, with the boxes of their masks, no framework."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import ndimage

from anomalib_ot.synthetic import fabric, tray

SUBJECTS = {"fabric": (fabric.render_fabric, fabric.DEFECTS), "tray": (tray.render_tray, tray.DEFECTS)}


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]


def test_same_arguments_give_the_same_bytes_on_any_thread_and_in_any_order(subject):
    render, defects = subject
    tasks = [(seed, index, defect) for seed in (0, 3) for index in (0, 7) for defect in (None, *defects)]
    alone = [render(*task, size=(64, 64)) for task in tasks]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda task: render(*task, size=(64, 64)), tasks[::-1]))[::-1]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.mask, other.mask)
        np.testing.assert_array_equal(one.boxes, other.boxes)


def test_every_image_differs_from_every_other(subject):
    render, defects = subject
    images = [
        render(seed, index, defect, size=(64, 64)).image.astype(int)
        for seed in (0, 1)
        for index in (0, 1, 10**8)
        for defect in (None, *defects)
    ]
    for k, image in enumerate(images):
        assert all(np.abs(image - other).max() > 20 for other in images[:k])


@pytest.mark.parametrize(
    ("render", "defect"), [(render, defect) for render, defects in SUBJECTS.values() for defect in defects]
)
def test_boxes_are_those_of_the_connected_parts(render, defect):
    for index in range(4):
        sample = render(5, index, defect, size=(128, 160))
        parts, count = ndimage.label(sample.mask, structure=np.ones((3, 3)))
        expected = [(c.start, r.start, c.stop, r.stop) for r, c in ndimage.find_objects(parts)]
        assert sorted(map(tuple, sample.boxes.tolist())) == sorted(expected)
        assert sample.labels == [defect] * count
        assert sample.boxes.dtype == np.float32
        areas = np.bincount(parts.ravel())[1:]
        assert areas.min() >= min(12, areas.max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"index": -2}, "index is -2"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"defect": "holes"}, "defect is 'holes'.*{}"),
        ({"size": (63, 64)}, r"size is \(63, 64\).*at least 64"),
        ({"size": (64,)}, r"size is \(64,\).*height, width"),
    ],
)
def test_bad_arguments_are_named(subject, arguments, message):
    render, defects = subject
    with pytest.raises(ValueError, match=message.format(", ".join(defects[:3]))):
        render(**{"seed": 0, "index": 0, **arguments})


@pytest.mark.parametrize("module", SUBJECTS)
def test_importing_the_generator_loads_no_framework(module):
    code = f"import sys, anomalib_ot.synthetic.{module} as _; "
    code += "print({'anomalib', 'lightning', 'torch', 'cv2'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "set()"
