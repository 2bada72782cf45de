"""Contact sheets: layout by arithmetic, pixels where they belong."""

from __future__ import annotations

import numpy as np
from PIL import Image

from qflux.data.sheet import MAX_ROWS, contact_sheet, evenly


def flat(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def test_pictures_stand_under_their_titles_and_gaps_are_grey():
    sheet = contact_sheet([[flat("red"), None], [None, flat("blue")]], ["control", "target"], cell=64)
    assert sheet.size == (8 + 2 * 72, 22 + 8 + 2 * 72)
    centres = [[sheet.getpixel((8 + 72 * x + 32, 30 + 72 * y + 32)) for x in (0, 1)] for y in (0, 1)]
    assert centres == [[(255, 0, 0), (208, 208, 208)], [(208, 208, 208), (0, 0, 255)]]
    assert np.asarray(sheet)[:22].min() < 100  # titles are drawn


def test_small_pictures_grow_by_whole_factors_and_large_ones_shrink():
    checks = Image.fromarray((np.indices((4, 4)).sum(0) % 2 * 255).astype(np.uint8))
    sheet = np.asarray(contact_sheet([[checks]], ["x"], cell=64))[30:94, 8:72, 0]
    assert set(np.unique(sheet)) == {0, 255}
    assert sheet[:16, 16:32].min() == 255
    wide = np.asarray(contact_sheet([[flat("red", (500, 100))]], ["x"], cell=64))[30:94, 8:72]
    assert (wide[32] == [255, 0, 0]).all()
    assert (wide[10] == 255).all()


def test_row_labels_any_text_and_short_rows():
    labels = ["a very long caption " * 60, "\u65e5\u672c\u8a9e \u2014 x\ny"]
    sheet = contact_sheet([[flat("red")], []], ["control", "target"], row_labels=labels, cell=64)
    assert sheet.height == 22 + 8 + 2 * (72 + 22)
    assert sheet.getpixel((8 + 72 + 32, 30 + 22 + 32)) == (208, 208, 208)


def test_many_rows_are_thinned_evenly_with_both_ends():
    rows = [[flat((i, 0, 0), (8, 8))] for i in range(200)]
    sheet = contact_sheet(rows, ["x"], cell=8)
    first, last = sheet.getpixel((12, 34)), sheet.getpixel((12, 30 + 16 * (MAX_ROWS - 1) + 4))
    assert (first, last) == ((0, 0, 0), (199, 0, 0))
    assert evenly(3, 24) == [0, 1, 2]
    assert evenly(100, 1) == [0]
    assert len(set(evenly(1000, 24))) == 24


def test_an_empty_sheet_is_still_a_picture():
    assert contact_sheet([], ["x"], cell=16).size == (32, 22 + 8 + 24)
