"""The defect names of the Tianchi fabric contest ("guangdong1"), and the classes that it counts them as."""

NO_DEFECT = "无疵点"
"""The contest's name for a faultless image; it is class 0 there and no class here."""

ROUND_1: dict[str, tuple[str, ...]] = {
    "hole": ("破洞",),
    "stain": ("水渍", "油渍", "污渍"),  # water, oil, dirt
    "foreign_fibre": ("三丝",),
    "knot": ("结头",),
    "pattern_skip": ("花板跳",),
    "hundred_feet": ("百脚",),  # a row of short weft faults, like a centipede
    "nep": ("毛粒",),
    "coarse_warp": ("粗经",),
    "loose_warp": ("松经",),
    "broken_warp": ("断经",),
    "hanging_warp": ("吊经",),
    "coarse_weft": ("粗维", "粗纬"),  # the official list has the first spelling, dictionaries the second
    "weft_shrinkage": ("纬缩",),
    "size_spot": ("浆斑",),
    "warping_knot": ("整经结",),
    "star_skip": ("星跳", "跳花"),
    "broken_spandex": ("断氨纶",),
    "bar": ("稀密档", "浪纹档", "色差档"),  # density, waves, shade
    "abrasion": ("磨痕", "轧痕", "修痕", "烧毛痕"),  # rubbing, rollers, repair, singeing
    "weaving_fault": ("死皱", "云织", "双纬", "双维", "双经", "跳纱", "筘路", "纬纱不良"),
}
"""Plain fabric: 20 classes of 34 names (36 with other spellings), in the order of the official numbers 1 to 20."""

ROUND_2: dict[str, tuple[str, ...]] = {
    "smudge": ("沾污",),
    "misprint": ("错花",),
    "water_mark": ("水印",),
    "print_fuzz": ("花毛",),
    "seam": ("缝头",),
    "seam_mark": ("缝头印",),
    "insect": ("虫粘",),
    "hole": ("破洞",),
    "crease": ("褶子",),
    "weaving_fault": ("织疵",),
    "missing_print": ("漏印",),
    "wax_spot": ("蜡斑",),
    "shade_difference": ("色差",),
    "screen_fold": ("网折",),
    "other": ("其他",),
}
"""Printed fabric: 15 classes, in the order of the official numbers 1 to 15."""


ROUNDS = {1: ROUND_1, 2: ROUND_2}
"""The classes of each round, with the Chinese names that count as them."""


def class_table(contest_round: int) -> dict[str, tuple[str, ...]]:
    """Return the classes of round 1 or 2, each with the Chinese names that count as it.

    >>> len(class_table(1)), len(class_table(2))
    (20, 15)
    """
    return ROUNDS[contest_round]


def class_of_name(contest_round: int) -> dict[str, int]:
    """Map each Chinese name to its class index; the official number is one higher.

    >>> class_of_name(1)["油渍"], class_of_name(2)["其他"]
    (1, 14)
    """
    classes = class_table(contest_round).values()
    return {name: index for index, names in enumerate(classes) for name in names}
