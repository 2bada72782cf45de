"""The one function that decides every size: target, controls, mask; for training, cache, sampling and export.

Pure arithmetic on sizes, no pixels. A ``Size`` is ``(H, W)``; a box is ``(left, top, right, bottom)`` in the source's
pixels and may be fractional. Terms: *cover crop* = the largest centred box of a given aspect; *relative* crop = the
same box in fractions of the picture, so that pictures of one scene at different resolutions stay aligned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from qflux.errors import UserError
from qflux.types import Family, Resize, ShapeKey, Size, SizePlan

Box = tuple[float, float, float, float]

SAME_ASPECT = 0.01  # two pictures show the same frame when their aspects differ by less than this
SAME_FRAME_STRETCH = 0.1  # most that a configured control size may stretch the target's frame


def plan_sizes(
    target: Size | None,
    controls: Sequence[Size],
    *,
    data_config: Any,
    family: Family,
    label: str = "sample",
    size: Size | None = None,
) -> SizePlan:
    """Decide crop and size of a sample's target and controls from their source sizes ``(H, W)``.

    ``data_config`` has ``target_size``, ``controls_size``, ``multi_resolutions`` and ``control_plan``; ``size`` takes
    the place of ``target_size`` for one drawn sample. With ``target`` None (a sample that is drawn, not learned) the
    first control stands for it, and only then may the result be larger than the source. The returned target box is in
    the pixels of ``target``, or of the first control, or of the result, in this order of presence.

    Raises ``UserError`` for sizes that are not multiples of ``family.size_multiple``, for pictures smaller than one
    multiple, and where ``controls_size`` has too few entries.
    """
    problems = size_problems(data_config, family)
    problems += _multiple_problems(f"{label}: size", size, family)
    if problems:
        raise UserError(*problems)
    wanted = size or data_config.target_size
    source = target or (controls[0] if controls else wanted)
    if source is None:
        raise UserError(f"{label}: no target, no control and no size; give the sample a size: [height, width]")
    if size is not None and target is not None and not _fits(size, target):
        raise UserError(
            f"{label}: size {text(size)} is larger than the target picture {text(target)}; "
            "targets are never scaled up, give a smaller size"
        )
    resize = _target_resize(source, wanted, data_config.multi_resolutions, family, label, grow=target is None)
    sized = _control_resizes(source, resize, controls, data_config, family, label)
    handed = data_config.control_plan == "config"  # users then hand over controls that are sized already
    return SizePlan(resize, sized, _text_resizes(sized, family, handed), handed)


def size_problems(data_config: Any, family: Family) -> list[str]:
    """Every size in ``data_config`` that ``family`` cannot use, one line each with the nearest valid size."""
    problems = _multiple_problems("data.target_size", data_config.target_size, family)
    if data_config.controls_size and family.controls[1] == 0:
        problems.append(f"data.controls_size: {family.name} takes no controls; remove it")
    for i, pair in enumerate(data_config.controls_size or ()):
        problems += _multiple_problems(f"data.controls_size[{i}]", pair, family)
    for i, candidate in enumerate(data_config.multi_resolutions or ()):
        key = f"data.multi_resolutions[{i}]"
        try:
            fixed, area = candidate_size(candidate)
        except ValueError as error:
            problems.append(f"{key}: found {candidate!r}, {error}")
            continue
        problems += _multiple_problems(key, fixed, family)
        if fixed is None and area < family.size_multiple**2:
            problems.append(f"{key}: found {candidate!r}, an area below {family.size_multiple}*{family.size_multiple}")
    return problems


def text_problems(data_config: Any, family: Family) -> list[str]:
    """A text length that the family's pipeline does not take."""
    length = data_config.max_sequence_length
    if length is None:
        return []
    found = f"data.max_sequence_length: found {length}"
    if not family.text_length:
        return [f"{found}, but {family.pipeline_class} takes prompts whole, of any length; remove it"]
    if family.text_limit and length > family.text_limit:
        return [f"{found}, {family.pipeline_class} takes at most {family.text_limit}; lower it"]
    return []


def candidate_size(candidate: Any) -> tuple[Size | None, int]:
    """``(fixed size or None, area)`` of an entry of ``multi_resolutions``: ``n``, ``"a*b"`` or ``[H, W]``."""
    if isinstance(candidate, int) and not isinstance(candidate, bool) and candidate > 0:
        return None, candidate * candidate
    if isinstance(candidate, str):
        parts = candidate.split("*")
        if len(parts) == 2 and all(part.strip().isdecimal() for part in parts):
            return None, int(parts[0]) * int(parts[1])
    if isinstance(candidate, Sequence) and len(candidate) == 2 and all(isinstance(n, int) and n > 0 for n in candidate):
        return (candidate[0], candidate[1]), candidate[0] * candidate[1]
    raise ValueError('expected an edge length n (area n*n), an area "a*b" or a size [H, W]')


def sized_otherwise(shapes: Iterable[ShapeKey], family: Family) -> bool:
    """Whether some control's size is one that the official pipeline would change by its own rule."""
    rule = family.control_size
    return rule is not None and any(
        round_down(rule(size), family.size_multiple) != size for shape in shapes for size in shape[1:]
    )


def round_down(size: Size, multiple: int) -> Size:
    """Both sides rounded down to multiples; a side may become 0."""
    return size[0] // multiple * multiple, size[1] // multiple * multiple


def area_size(source: Size, area: int, multiple: int) -> Size:
    """The size of about ``source``'s aspect whose area is at most ``area`` and that needs no scaling up.

    Of the multiples next to the ideal height and width the pair of closest aspect is taken, then the larger one.
    Sides are at least one multiple (``source`` must be).
    """
    scale = min(1.0, math.sqrt(area / (source[0] * source[1])))
    ideal = (source[0] * scale, source[1] * scale)
    limit = round_down(source, multiple)
    heights = _neighbours(ideal[0], limit[0], multiple)
    widths = _neighbours(ideal[1], limit[1], multiple)
    pairs = [(h, w) for h in heights for w in widths if h * w <= area]
    if not pairs:  # so thin that one multiple is already more than its share
        short = multiple
        long = max(multiple, area // multiple // multiple * multiple)
        return (short, min(long, limit[1])) if source[0] < source[1] else (min(long, limit[0]), short)
    return min(pairs, key=lambda pair: (round(aspect_distance(pair, source), 9), -pair[0] * pair[1]))


def aspect_distance(a: Size, b: Size) -> float:
    """Absolute difference of the logarithms of two aspects."""
    return abs(math.log(a[1] / a[0]) - math.log(b[1] / b[0]))


def same_aspect(a: Size, b: Size, tolerance: float = SAME_ASPECT) -> bool:
    """Whether two pictures can show the same frame."""
    return aspect_distance(a, b) <= math.log1p(tolerance)


def cover_box(source: Size, aspect: Size) -> Box:
    """The largest centred box of ``aspect``'s aspect inside ``source``."""
    height, width = source
    if width * aspect[0] > height * aspect[1]:
        box_width = height * aspect[1] / aspect[0]
        left = (width - box_width) / 2
        return (left, 0.0, left + box_width, float(height))
    box_height = width * aspect[0] / aspect[1]
    top = (height - box_height) / 2
    return (0.0, top, float(width), top + box_height)


def transfer_box(box: Box, source: Size, other: Size) -> Box:
    """``box`` of a picture of size ``source`` in the pixels of a picture of size ``other`` showing the same frame."""
    if source == other:
        return box
    x, y = other[1] / source[1], other[0] / source[0]
    return (box[0] * x, box[1] * y, min(box[2] * x, float(other[1])), min(box[3] * y, float(other[0])))


def text(size: Size) -> str:
    """``HxW`` for messages."""
    return f"{size[0]}x{size[1]} (height x width)"


def _target_resize(
    source: Size, wanted: Size | None, candidates: Sequence[Any] | None, family: Family, label: str, grow: bool
) -> Resize:
    multiple = family.size_multiple
    if min(source) < multiple and not (grow and wanted):
        raise UserError(
            f"{label}: found a picture of {text(source)}, expected at least {multiple} pixels a side "
            f"({family.name} works in steps of {multiple}); replace the picture or leave it out"
        )
    if wanted is None:
        wanted, grow = _candidate(source, candidates or (), multiple), False
    if wanted is None:
        return _centre(source, round_down(source, multiple))
    return _cover(source, wanted, multiple, grow)


def _cover(source: Size, wanted: Size, multiple: int, grow: bool) -> Resize:
    """Crop to ``wanted``'s aspect; a source that is too small gets the largest size of about that aspect that fits."""
    if not grow and not _fits(wanted, source):
        box = cover_box(source, wanted)
        height, width = round(box[3] - box[1], 6), round(box[2] - box[0], 6)
        shrunk = round_down((int(height), int(width)), multiple)
        wanted = max(shrunk[0], multiple), max(shrunk[1], multiple)
    return Resize(cover_box(source, wanted), wanted)


def _centre(source: Size, size: Size) -> Resize:
    """Cut without scaling, on whole pixels."""
    top, left = (source[0] - size[0]) // 2, (source[1] - size[1]) // 2
    return Resize((float(left), float(top), float(left + size[1]), float(top + size[0])), size)


def _candidate(source: Size, candidates: Sequence[Any], multiple: int) -> Size | None:
    """The candidate for one picture, or None for its own size. Closest aspect (within 1 %), then largest."""
    parsed = [candidate_size(candidate) for candidate in candidates]
    fixed = [size for size, _ in parsed if size is not None]
    areas = [area for size, area in parsed if size is None and area <= source[0] * source[1]]
    choices = [size for size in fixed if _fits(size, source)]
    if areas:
        choices.append(area_size(source, max(areas), multiple))
    if choices:
        return min(choices, key=lambda size: (round(aspect_distance(size, source), 2), -size[0] * size[1]))
    if len(fixed) < len(parsed) or not fixed:
        return None
    return min(fixed, key=lambda size: (round(aspect_distance(size, source), 2), -size[0] * size[1]))


def _control_resizes(
    source: Size, target: Resize, controls: Sequence[Size], config: Any, family: Family, label: str
) -> tuple[Resize, ...]:
    given = config.controls_size or ()
    if config.control_plan == "config" and len(given) > 1 and len(controls) > len(given):
        raise UserError(
            f"{label}: found {len(controls)} controls, but data.controls_size has {len(given)} sizes; "
            "give one size for all or one for each"
        )
    if config.control_plan == "pipeline" and controls and family.control_size is None:
        raise UserError(f"data.control_plan: {family.name} has no control rule of its own pipeline; use config")
    resizes: list[Resize] = []
    for i, control in enumerate(controls):
        if min(control) < 1:
            raise UserError(f"{label}: control {i + 1} is empty")
        if config.control_plan == "pipeline":
            resizes.append(_pipeline_control(source, target, control, family))
        else:
            size = given[0 if len(given) == 1 else i] if given else None
            resizes.append(_config_control(source, target, control, size, family, f"{label}: control {i + 1}"))
        _check_limits(resizes[-1].size, family, f"{label}: control {i + 1}")
    return tuple(resizes)


def _check_limits(size: Size, family: Family, label: str) -> None:
    """Refuse what the official pipeline refuses."""
    if family.control_limits is None:
        return
    side, aspect = family.control_limits
    if min(size) < side or max(size) > aspect * min(size):
        raise UserError(
            f"{label}: found {text(size)}, {family.pipeline_class} takes controls of at least {side} pixels a side and "
            f"an aspect of at most {aspect:g}; use larger pictures or data.controls_size"
        )


def _text_resizes(controls: Sequence[Resize], family: Family, handed: bool) -> tuple[Resize, ...]:
    """What a text encoder that sees the controls gets, at a size of its own: of the source, or of the sized control."""
    if family.text_control_size is None:
        return ()
    whole = [(0.0, 0.0, float(part.size[1]), float(part.size[0])) for part in controls]
    boxes = whole if handed else [part.box for part in controls]
    return tuple(Resize(box, family.text_control_size(_box_size(box))) for box in boxes)


def _box_size(box: Box) -> Size:
    return max(1, round(box[3] - box[1])), max(1, round(box[2] - box[0]))


def _pipeline_control(source: Size, target: Resize, control: Size, family: Family) -> Resize:
    """Sized as the official pipeline will size the cropped control."""
    box: Box = (0.0, 0.0, float(control[1]), float(control[0]))
    if same_aspect(source, control):
        box = transfer_box(target.box, source, control)
    assert family.control_size is not None
    scaled = family.control_size(_box_size(box))
    size = round_down(scaled, family.size_multiple)
    return Resize(box, size) if size == scaled else Resize(box, size, scaled)


def _config_control(
    source: Size, target: Resize, control: Size, size: Size | None, family: Family, label: str
) -> Resize:
    """The target's frame where the control shows it, else its own centre crop; scaled up where the size asks for it."""
    wanted = size or target.size
    if same_aspect(source, control) and same_aspect(wanted, target.size, SAME_FRAME_STRETCH):
        return Resize(transfer_box(target.box, source, control), wanted)
    if size is None:
        multiple = family.size_multiple
        if min(control) < multiple:
            raise UserError(
                f"{label}: found a picture of {text(control)}, expected at least {multiple} pixels a side; "
                "replace it or set data.controls_size"
            )
        if control[0] * control[1] <= target.size[0] * target.size[1]:
            return _centre(control, round_down(control, multiple))
        wanted = area_size(control, target.size[0] * target.size[1], multiple)
    return Resize(cover_box(control, wanted), wanted)


def _fits(size: Size, source: Size) -> bool:
    return size[0] <= source[0] and size[1] <= source[1]


def _neighbours(ideal: float, limit: int, multiple: int) -> list[int]:
    low = max(multiple, math.floor(round(ideal / multiple, 6)) * multiple)
    return [side for side in (low, low + multiple) if side <= limit]


def _multiple_problems(key: str, size: Size | None, family: Family) -> list[str]:
    multiple = family.size_multiple
    if size is None or all(side > 0 and side % multiple == 0 for side in size):
        return []
    near = [max(multiple, round(side / multiple) * multiple) for side in size]
    return [
        f"{key}: found [{size[0]}, {size[1]}], expected [height, width] in multiples of {multiple} "
        f"for {family.name}; nearest is [{near[0]}, {near[1]}]"
    ]
