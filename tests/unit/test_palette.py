"""Colours of models can be told from both backgrounds, and from each other."""

from __future__ import annotations

import itertools

from components.palette import (
    BASE,
    DARK_BACKGROUND,
    LIGHT_BACKGROUND,
    MERGED,
    SPECIALISTS,
    WARNING,
    contrast,
    css_variables,
    model_colors,
)


def test_black_on_white_has_the_highest_contrast_there_is() -> None:
    assert round(contrast("#000000", "#FFFFFF"), 2) == 21


def test_every_colour_stands_out_on_both_backgrounds() -> None:
    for color in (BASE, MERGED, WARNING, *SPECIALISTS):
        assert contrast(color, LIGHT_BACKGROUND) >= 3, color
        assert contrast(color, DARK_BACKGROUND) >= 3, color


def test_neighbours_differ_for_people_who_see_no_red_or_no_green() -> None:
    """Viénot, Brettel and Mollon 1999: what remains of a colour without one kind of cone, in linear RGB."""
    without = {
        "red": ((0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1)),
        "green": ((0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1)),
    }
    for matrix in without.values():
        seen = [see(color, matrix) for color in (BASE, *SPECIALISTS[:3])]
        for one, other in itertools.combinations(seen, 2):
            assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 0.1


def see(color: str, matrix: tuple[tuple[float, float, float], ...]) -> list[float]:
    linear = [(int(color[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
    mixed = [sum(weight * value for weight, value in zip(row, linear, strict=True)) for row in matrix]
    return [max(value, 0) ** (1 / 2.2) for value in mixed]


def test_the_base_is_grey_and_specialists_keep_their_place() -> None:
    assert model_colors([True, False, False]) == (BASE, *SPECIALISTS[:2])
    assert model_colors([False, True, False]) == (SPECIALISTS[0], BASE, SPECIALISTS[1])


def test_style_sheets_get_the_same_colours() -> None:
    sheet = css_variables()
    assert f"--model-base:{BASE};" in sheet
    assert f"--model-8:{SPECIALISTS[7]};" in sheet
