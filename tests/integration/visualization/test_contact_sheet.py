"""The sheet: every part in a row of its own, with the panels of its picture."""

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.integration.visualization.contact_sheet import BAR_WIDTH, TITLE_HEIGHT, contact_sheet
from anomalib_ot.integration.visualization.header import DEFECT, GOOD, Verdict


def part(shade: int, size: tuple[int, int] = (64, 64), **more: object) -> dict[str, object]:
    looks, place = np.full((8, 8), 0.3), np.zeros((8, 8))
    looks[0, 0] = 0.9
    maps = {"anomaly_map": looks + place, "feature_map": looks, "position_map": place}
    return {"image": Image.new("L", size, shade), **maps, **more}


def test_rows_stand_below_each_other_in_order_each_with_its_verdict():
    rows = [("one", part(40, verdict=Verdict(score=0.8))), ("two", part(220, verdict=Verdict(score=0.2)))]
    sheet = contact_sheet(rows)
    assert sheet.width == 1200
    pixels = np.asarray(sheet)
    half = (sheet.height + TITLE_HEIGHT) // 2
    for paint, inside, outside in ((DEFECT, pixels[:half], pixels[half:]), (GOOD, pixels[half:], pixels[:half])):
        assert (inside[:, :200] == paint).all(axis=2).any()
        assert not (outside[:, :200] == paint).all(axis=2).any()
    assert (pixels[:half, 250] == 40).all(axis=1).sum() > 100
    assert (pixels[half:, 250] == 220).all(axis=1).sum() > 100


@pytest.mark.parametrize("width", [600, 1200, 1500])
@pytest.mark.parametrize("size", [(64, 64), (200, 100), (100, 200)])
def test_nothing_is_cut_off(width, size):
    sheet = np.asarray(contact_sheet([("part", part(128, size))], width=width))
    first = (sheet == 128).all(axis=2)
    rows, columns = first.any(axis=1).sum(), first.any(axis=0).sum()
    assert columns / rows == pytest.approx(size[0] / size[1], rel=0.05)
    assert (sheet[-4:] == 255).all()  # air below the last row
    assert (sheet[TITLE_HEIGHT + 5 :, width - BAR_WIDTH - 6 : width - BAR_WIDTH - 2] == 255).all()  # and before the bar


def test_what_does_not_fit_on_one_sheet_is_refused():
    with pytest.raises(ValueError, match="rows has 0 entries"):
        contact_sheet([])
    with pytest.raises(ValueError, match="width is 300"):
        contact_sheet([("part", part(1))], width=300)
    with pytest.raises(ValueError, match=r"row 'two' has the panels \['Part'\]; expected those of row 'one'"):
        contact_sheet([("one", part(1)), ("two", {"image": Image.new("L", (8, 8))})])
