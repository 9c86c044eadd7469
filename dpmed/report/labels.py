"""Where to set the names in a scatter plot so that they cover neither each other nor the marks."""

from __future__ import annotations

from collections.abc import Sequence

Box = tuple[float, float, float, float]

_CHARACTER_WIDTH = 6.6
_HALF_HEIGHT = 8.0
_MARK = 8.0


def place_labels(
    marks: Sequence[tuple[float, float, str]], *, width: float, height: float
) -> list[tuple[float, float]]:
    """Choose a place for each label, one after the other, at the candidate that covers least.

    Args:
        marks: x and y of the mark in pixels from the upper left, and its text.
        width, height: of the plot in pixels; labels stay inside where that is possible.

    Returns: left end and vertical middle of each label in pixels, in the order of `marks`.
    """
    taken: list[Box] = [(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y, _ in marks]
    places = []
    for x, y, text in marks:
        length = _CHARACTER_WIDTH * len(text)
        options = _candidates(x, y, length)
        costs = [_cost(_box(place, length), taken, width, height) + 2 * rank for rank, place in enumerate(options)]
        best = options[costs.index(min(costs))]
        taken.append(_box(best, length))
        places.append(best)
    return places


def _candidates(x: float, y: float, length: float) -> list[tuple[float, float]]:
    """Right, left, above, below, then ever further off."""
    places = [(x + 12, y - 11), (x + 12, y + 11), (x - 12 - length, y - 11), (x - 12 - length, y + 11)]
    for off in (26, 42, 58, 74):
        places += [(x + 14, y - off), (x + 14, y + off), (x - 14 - length, y - off), (x - 14 - length, y + off)]
    return places


def _box(place: tuple[float, float], length: float) -> Box:
    return place[0], place[1] - _HALF_HEIGHT, place[0] + length, place[1] + _HALF_HEIGHT


def _cost(box: Box, taken: Sequence[Box], width: float, height: float) -> float:
    """Area covered twice, and area outside of the plot, in square pixels."""
    covered = sum(_shared(box, other) for other in taken)
    area = (box[2] - box[0]) * (box[3] - box[1])
    return covered + 3 * (area - _shared(box, (0.0, 0.0, width, height)))


def _shared(first: Box, second: Box) -> float:
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    return across * down if across > 0 and down > 0 else 0.0
