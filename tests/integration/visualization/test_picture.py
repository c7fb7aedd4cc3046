"""The picture: what is drawn, where, and how large."""

import numpy as np
import pytest
from PIL import Image, ImageChops

from anomalib_ot.imaging.causes import Arrow, CauseShares
from anomalib_ot.imaging.heat import color_bar, draw_outline, overlay
from anomalib_ot.integration.visualization.anomaly_figure import (
    BAR_WIDTH,
    LEAST_CELL,
    TITLE_HEIGHT,
    draw_arrows,
    explain_picture,
)
from anomalib_ot.integration.visualization.header import (
    COUNTS,
    DEFECT,
    GOOD,
    LOOKS,
    PLACE,
    UNKNOWN,
    Verdict,
    cause_lines,
    header,
)

GAP = 14
HEADER = 86  # one line of cards


def maps(height: int = 32, width: int = 32) -> dict[str, np.ndarray]:
    feature_map, position_map = np.full((2, height, width), 0.05)
    feature_map[: height // 4, : width // 4] = 0.8
    position_map[-height // 4 :, -width // 4 :] = 0.7
    anomaly_map = feature_map + position_map
    matched = np.stack(np.meshgrid(np.linspace(0, 1, 8), np.linspace(0, 1, 8), indexing="ij"))
    matched[:, 6:, 6:] = 0.1
    return {
        "anomaly_map": anomaly_map,
        "feature_map": feature_map,
        "position_map": position_map,
        "matched_position": matched,
        "pred_mask": anomaly_map > 0.5,
    }


def panel(picture: Image.Image, index: int, width: int, height: int) -> np.ndarray:
    left = GAP + index * (max(width, LEAST_CELL) + GAP)
    top = picture.height - GAP - height
    return np.asarray(picture.crop((left, top, left + width, top + height))).astype(int)


def changed(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.asarray(ImageChops.difference(one.convert("RGB"), other.convert("RGB"))).any(axis=2)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1"])
@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), (320, 320)), ((300, 200), (392, 261)), ((97, 131), (275, 372))]
)
def test_panels_keep_the_aspect_ratio_and_one_area(mode, size, expected):
    picture = explain_picture(Image.new(mode, size), **maps(), verdict=Verdict(score=0.7))
    width, height = expected
    assert picture.mode == "RGB"
    assert picture.size == (GAP + 4 * (width + GAP) + BAR_WIDTH, HEADER + TITLE_HEIGHT + height + GAP)


def test_wide_images_stand_below_each_other_and_tall_ones_side_by_side():
    wide = explain_picture(Image.new("L", (1000, 100)), **maps(), verdict=Verdict(score=0.7))
    assert wide.size == (GAP + 960 + GAP + BAR_WIDTH, HEADER + 4 * (TITLE_HEIGHT + 96 + GAP))
    tall = explain_picture(Image.new("L", (100, 1000)), **maps(), verdict=Verdict(score=0.7))
    assert tall.size == (GAP + 4 * (LEAST_CELL + GAP) + BAR_WIDTH, HEADER + TITLE_HEIGHT + 960 + GAP)


def test_a_model_without_causes_gives_two_panels_and_no_cause():
    two = {"anomaly_map": maps()["anomaly_map"], "pred_mask": maps()["pred_mask"]}
    picture = explain_picture(Image.new("L", (64, 64)), **two)
    assert picture.width == GAP + 2 * (320 + GAP) + BAR_WIDTH
    bare = explain_picture(Image.new("L", (400, 400)))
    assert bare.width == 560  # room for the header


def test_each_map_is_shown_in_its_own_panel_the_right_way_up():
    picture = explain_picture(Image.new("L", (320, 320), 128), **(maps() | {"pred_mask": None}), max_arrows=0)
    part, anomaly, looks, place = (panel(picture, index, 320, 320) for index in range(4))
    top_left, bottom_right = (slice(0, 70), slice(0, 70)), (slice(250, 320), slice(250, 320))
    assert np.ptp(part) == 0
    plain = looks[160, 160]
    for drawn, here, there in ((looks, top_left, bottom_right), (place, bottom_right, top_left)):
        assert np.abs(drawn[here] - plain).mean() > 30
        assert np.abs(drawn[there] - plain).mean() < 2
    assert np.abs(anomaly[top_left] - looks[top_left]).mean() < 20
    assert np.abs(anomaly[bottom_right] - place[bottom_right]).mean() < 20


def test_arrows_are_drawn_in_the_last_panel_only():
    with_arrows, without = (explain_picture(Image.new("L", (320, 320)), **maps(), max_arrows=most) for most in (8, 0))
    same = [(panel(with_arrows, i, 320, 320) == panel(without, i, 320, 320)).all() for i in range(4)]
    assert same == [True, True, True, False]


def test_the_header_says_the_shares_of_the_causes_in_the_predicted_defect():
    given = maps()
    given["position_map"][:8, :8] += 0.25  # above what is normal: .75 by looks and .25 by place in each pixel
    given["pred_mask"][16:] = False
    verdict = Verdict(score=0.7)
    picture = explain_picture(Image.new("L", (320, 320)), **given, verdict=verdict)
    expected = header(picture.width, verdict, CauseShares(75, 25), inside=True)
    assert not changed(picture.crop((0, 0, *expected.size)), expected).any()


def test_the_cause_bar_is_as_long_as_the_shares():
    strip = np.asarray(header(800, Verdict(score=0.7), CauseShares(75, 25), inside=True))
    looks, place = ((strip == paint).all(axis=2).any(axis=0).nonzero()[0] for paint in (LOOKS, PLACE))
    assert looks.max() < place.min()
    assert len(looks) == pytest.approx(3 * len(place), abs=4)


def test_the_same_value_has_the_same_color_in_every_panel_and_on_the_bar():
    value, looks, place = (np.full((16, 16), part) for part in (0.6, 0.4, 0.2))
    picture = explain_picture(Image.new("L", (320, 320), 128), value, looks, place)
    colors = {tuple(panel(picture, index, 320, 320)[100, 100]) for index in (1, 2, 3)}
    assert len(colors) == 1
    row = np.asarray(color_bar(16, 201))[80].mean(axis=0)  # a light and a dark square
    assert row == pytest.approx(next(iter(colors)), abs=3)


def test_each_cause_is_shown_as_if_it_were_the_only_one():
    # What is out of place by .2 shows at .2 above the normal level: just where it crosses the threshold.
    looks, place = np.full((32, 32), 0.4), np.zeros((32, 32))
    place[8:16, 8:16] = 0.2
    image = Image.new("L", (320, 320), 128)
    picture = explain_picture(image, looks + place, looks, place)
    expected = np.asarray(overlay(image, looks + place)).astype(int)
    np.testing.assert_array_equal(panel(picture, 3, 320, 320), expected)
    np.testing.assert_array_equal(panel(picture, 2, 320, 320), np.asarray(overlay(image, looks)))


def test_normal_surroundings_stay_clear_and_the_defect_stands_out():
    bright = np.asarray(overlay(Image.new("L", (1, 1), 200), np.zeros((1, 1)))).astype(int)
    change = []
    for value in np.linspace(0, 1, 11):
        drawn = np.asarray(overlay(Image.new("L", (1, 1), 200), np.full((1, 1), value))).astype(int)
        change.append(np.abs(drawn - bright).max())
    assert change[4:8] == sorted(change[4:8])
    assert max(change[:5]) == 0  # up to .4
    assert change[5] >= 15  # the threshold
    assert change[8] >= 100


def test_the_bar_shows_how_much_shines_through():
    bar = np.asarray(color_bar(16, 201)).astype(int)
    contrast = np.ptp(bar[:, [4, 12]], axis=1).max(axis=1)  # between the two squares of a row
    assert contrast[200] > 40  # value 0: clear
    assert contrast[0] < 15  # value 1: the map hides what is below
    assert (np.diff(contrast[::8]) >= -2).all()


def test_one_misplaced_thing_gets_one_arrow_even_on_a_fine_grid():
    place = np.zeros((64, 64))
    place[8:20, 8:20] = 0.2
    place[9, 15] = place[14, 10] = 0.5  # two peaks
    matched = np.stack(np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 64), indexing="ij"))
    matched[:, 8:20, 8:20] += 0.5
    image = Image.new("L", (320, 320), 128)
    given = (np.full((64, 64), 0.4) + place, np.full((64, 64), 0.4), place, matched)
    plain, drawn = (panel(explain_picture(image, *given, max_arrows=most), 3, 320, 320) for most in (0, 8))
    single = panel(explain_picture(image, *given, max_arrows=1), 3, 320, 320)
    assert (drawn != plain).any()
    assert (drawn == single).all()


def words(verdict: Verdict, shares: CauseShares | None, inside: bool | None) -> str:
    return "; ".join(cause_lines(verdict, shares, inside))


def test_a_missing_thing_is_told_plainly_and_not_as_wrong_looks():
    shares = CauseShares(100, 0)
    missing = Verdict(score=0.65, transport_score=11.8, transport_threshold=2.2)
    assert words(missing, shares, False) == "count anomaly: part missing or extra"
    unknown = Verdict(score=0.65, transport_score=11.8)  # no threshold known: no pixel explains the verdict
    assert words(unknown, shares, False) == "count anomaly: part missing or extra"
    assert words(unknown, shares, None) == "looks wrong 100 %"  # nobody has looked at the pixels
    assert words(unknown, shares, True) == "looks wrong 100 %"


def test_a_count_anomaly_is_a_cause_beside_the_others_and_only_above_their_threshold():
    both = Verdict(score=0.8, transport_score=3.5, transport_threshold=2.2)
    told = "wrong place 60 %; looks wrong 40 %; count anomaly: part missing or extra"
    assert words(both, CauseShares(40, 60), True) == told
    within = Verdict(score=0.8, transport_score=1.5, transport_threshold=2.2)
    assert words(within, CauseShares(40, 60), True) == "wrong place 60 %; looks wrong 40 %"
    assert words(within, CauseShares(40, 60), False) == "wrong place 60 %; looks wrong 40 %"


def test_a_good_part_has_no_cause():
    good = Verdict(score=0.3, transport_score=3.5, transport_threshold=4.0)
    assert words(good, CauseShares(100, 0), False) == ""
    assert words(good, CauseShares(90, 10), True) == ""  # single pixels above their threshold change nothing


def test_the_header_draws_the_third_cause():
    missing = Verdict(score=0.65, transport_score=11.8)
    strip = np.asarray(header(1408, missing, CauseShares(100, 0), inside=False))
    assert (strip == COUNTS).all(axis=2).any()
    assert not (strip == LOOKS).all(axis=2).any()
    strip = np.asarray(header(1408, missing, CauseShares(75, 25), inside=True))
    assert not (strip == COUNTS).all(axis=2).any()
    assert (strip == LOOKS).all(axis=2).any()


def test_colors_do_not_stretch_to_the_maximum_and_stop_at_the_ends():
    gray = Image.new("L", (8, 8), 128)
    weak, strong = overlay(gray, np.full((8, 8), 0.1)), overlay(gray, np.full((8, 8), 0.9))
    assert np.abs(np.asarray(weak).astype(int) - np.asarray(strong)).mean() > 50
    assert overlay(gray, np.full((8, 8), 7.0)).getpixel((0, 0)) == overlay(gray, np.ones((8, 8))).getpixel((0, 0))


def test_ground_truth_is_outlined_in_the_first_panel_only_if_there_is_one():
    image, mask = Image.new("L", (320, 320), 128), np.zeros((32, 32), bool)
    mask[8:16, 20:28] = True
    with_truth = explain_picture(image, **maps(), gt_mask=mask)
    assert np.ptp(panel(explain_picture(image, **maps()), 0, 320, 320)) == 0
    assert np.ptp(panel(explain_picture(image, **maps(), gt_mask=np.zeros((32, 32), bool)), 0, 320, 320)) == 0
    rows, columns = np.nonzero(np.ptp(panel(with_truth, 0, 320, 320), axis=2))
    assert 70 <= rows.min() <= 80 < 160 <= rows.max() <= 170
    assert 190 <= columns.min() <= 200 < 280 <= columns.max() <= 290


def test_the_outline_leaves_the_defect_itself_in_view():
    image, mask = Image.new("RGB", (100, 100), (90, 90, 90)), np.zeros((100, 100), bool)
    mask[40:60, 30:70] = True
    touched = changed(draw_outline(image, mask, (255, 255, 255)), image)
    assert not touched[42:58, 32:68].any()
    assert touched[36:40, 35:65].any(axis=0).all()  # closed along the upper side
    dot = np.zeros((100, 100), bool)
    dot[50, 50] = True
    assert changed(draw_outline(image, dot, (255, 255, 255)), image).any()  # one pixel is not lost


def test_the_arrow_is_drawn_from_dot_to_tip_with_a_dark_rim():
    image = Image.new("RGB", (400, 200), (128, 128, 128))
    drawn = draw_arrows(image, [Arrow(0.2, 0.1, 0.8, 0.9, 1.0)])
    touched = changed(drawn, image)
    assert touched[38:43, 38:43].all()  # y = .2 of 200, x = .1 of 400
    assert touched[148:165, 345:362].any()  # near y = .8, x = .9
    assert not touched[150:, :50].any()
    assert not touched[:50, 350:].any()
    pixels = np.asarray(drawn).astype(int)[touched].sum(axis=1)
    assert pixels.min() < 3 * 40
    assert pixels.max() > 3 * 240
    assert len(np.unique(pixels)) > 10  # soft edges
    assert not changed(draw_arrows(image, []), image).any()


def test_an_arrow_along_the_border_stays_inside():
    image = Image.new("RGB", (300, 300), (128, 128, 128))
    for y in (0.02, 0.98):
        for x0, x1 in ((0.05, 0.95), (0.95, 0.05)):
            touched = changed(draw_arrows(image, [Arrow(y, x0, y, x1, 1.0)]), image)
            assert touched.any(axis=0)[30:270].all()  # no column of the shaft is cut away


@pytest.mark.parametrize(
    ("verdict", "paint"),
    [
        (Verdict(score=0.7), DEFECT),
        (Verdict(score=0.5), GOOD),
        (Verdict(score=0.7, threshold=0.8), GOOD),
        (Verdict(score=0.7, defect=False), GOOD),
        (Verdict(), UNKNOWN),
    ],
)
def test_the_badge_says_the_verdict(verdict, paint):
    assert header(800, verdict).getpixel((GAP + 3, GAP + 3)) == paint


def test_the_words_differ_not_only_the_color():
    badges = [
        header(800, Verdict(defect=defect)).convert("L").point(lambda v: 255 * (v > 200)) for defect in (True, False)
    ]
    assert changed(*badges)[:, :180].sum() > 300


def test_every_known_thing_adds_to_the_header():
    verdicts = [Verdict(score=0.7)]
    for more in ({"transport_score": 0.3}, {"truth": True}, {"name": "bad/000.png"}):
        verdicts.append(Verdict(**{**vars(verdicts[-1]), **more}))
    strips = [header(2000, verdict) for verdict in verdicts]
    strips.append(header(2000, verdicts[-1], normalized=False))
    ink = [int((np.asarray(strip.convert("L")) < 200).sum()) for strip in strips]
    assert ink == sorted(set(ink))
    assert header(300, verdicts[-1]).height > header(2000, verdicts[-1]).height  # goes on in a new line


@pytest.mark.parametrize(
    ("score", "truth", "outcome"),
    [
        (0.7, True, "found"),
        (0.3, True, "missed"),
        (0.7, False, "false alarm"),
        (0.3, False, "agreed"),
        (None, True, ""),
        (0.7, None, ""),
    ],
)
def test_the_outcome(score, truth, outcome):
    assert Verdict(score=score, truth=truth).outcome() == outcome


def test_wrong_input_is_named():
    image = Image.new("L", (8, 8))
    with pytest.raises(ValueError, match=r"feature_map has shape \(1, 4, 4\)"):
        explain_picture(image, feature_map=np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match="panel_size is 10"):
        explain_picture(image, panel_size=10)
    with pytest.raises(ValueError, match="max_arrows is -1"):
        explain_picture(image, max_arrows=-1)
