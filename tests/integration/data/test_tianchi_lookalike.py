"""Drawn cloth in the contest's folders: TianchiFabric reads it, and finds the faults that were drawn."""

import pytest

from anomalib_ot import TianchiFabric
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.tianchi_classes import class_of_name
from anomalib_ot.integration.data.tianchi_lookalike import FAULTS, write_lookalike
from anomalib_ot.synthetic.fabric import render_fabric


def test_the_contests_reader_finds_what_was_drawn(tmp_path):
    root = write_lookalike(tmp_path / "tianchi", num_per_fault=3, num_normal=4, image_size=(64, 96))
    content = TianchiFabric(root, num_workers=0, duplicate_distance=None).content
    records = {
        record.image_path[-9:-4]: record for part in (content.train, content.val, content.test) for record in part
    }
    assert sorted(records) == [*(f"d{number:04}" for number in range(12)), *(f"n{number:04}" for number in range(4))]
    for number, fault in enumerate([*FAULTS, *FAULTS, *FAULTS]):
        record, drawn = records[f"d{number:04}"], render_fabric(0, number, fault, (64, 96))
        assert record.boxes.tolist() == drawn.boxes.tolist()
        assert set(record.labels.tolist()) == {class_of_name(1)[FAULTS[fault]]}
    assert all(len(records[f"n{number:04}"].boxes) == 0 for number in range(4))


def test_nothing_is_overwritten(tmp_path):
    write_lookalike(tmp_path, num_per_fault=1, num_normal=0, image_size=(64, 64))
    with pytest.raises(InputError, match="holds guangdong1_round1_train1_20190818 already"):
        write_lookalike(tmp_path)
