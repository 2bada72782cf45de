"""Where the edges of two pictures coincide: the measurements behind the alignment report.

Each pixel becomes a complex number whose size says how clear an edge is and whose phase is twice the edge's angle (the
squared gradient, summed over the colour channels): an inverted or recoloured edge stays what it is, edges of other
directions cancel. Edges coincide where one field times the other's conjugate is real and large; its Fourier
correlation says where they would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Array = NDArray[np.float64]
Field = NDArray[np.complex64]

_BLOCKS = 8  # along the longest side
_STEP, _STEPS = 0.05, 6  # logarithm of the scale: 0.74 to 1.35 in steps of 5 %
_FLOOR = 4.0  # levels; weaker gradients are noise


class Model(NamedTuple):
    """Where the control has what the target has at p, both in fractions of the frame from its centre: scale·p + shift.

    ``mirrored`` controls are flipped first.
    """

    scale_x: float = 1.0
    scale_y: float = 1.0
    shift_x: float = 0.0
    shift_y: float = 0.0
    mirrored: bool = False


IDENTITY = Model()  # the control's content lies where the target has it


@dataclass(frozen=True)
class Blocks:
    """Measured in each of N blocks.

    likeness      ``[N]`` of the edges as they lie, -1..1
    peak          ``[N]`` of the edges moved by ``offset``
    offset        ``[N, 2]`` x, y in pixels: how much farther right and down the control's edges lie
    sharpness     ``[N]`` how steeply the likeness falls around its peak
    weight        ``[N]`` amount of edges in both pictures; 0 where one has none
    """

    likeness: Array
    peak: Array
    offset: Array
    sharpness: Array
    weight: Array


class Stage:
    """Both pictures at one resolution, the target's edges cut into blocks."""

    def __init__(self, target: Image.Image, control: Image.Image, side: int) -> None:
        ratio = side / max(target.size)
        self.size = (max(8, round(target.width * ratio)), max(8, round(target.height * ratio)))
        self.control = _reduced(control, self.size)
        self.block = min(max(16, side // _BLOCKS), *self.size)
        starts = [_starts(length, self.block) for length in self.size]
        self._corners = [(y, x) for y in starts[1] for x in starts[0]]
        middle = np.array(self.size) / 2
        self.centres = np.array([(x, y) for y, x in self._corners]) + self.block / 2 - middle  # [N, 2] x, y
        hann = np.hanning(self.block + 2)[1:-1].astype(np.float32)
        self._window = np.outer(hann, hann)
        cut = self._cut(edge_field(_reduced(target, self.size)))
        self._target = np.fft.fft2(cut * self._window).conj()
        self._energy = self._energies(cut)

    def control_edges(self, model: Model) -> Field:
        """The control's edges where ``model`` says that they lie on the target's; 0 where it shows nothing."""
        width, height = self.size
        picture = self.control.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if model.mirrored else self.control
        first_x = width * (0.5 - model.scale_x / 2 + model.shift_x)
        first_y = height * (0.5 - model.scale_y / 2 + model.shift_y)
        place = (model.scale_x, 0.0, first_x, 0.0, model.scale_y, first_y)
        edges = edge_field(picture.transform(self.size, Image.Transform.AFFINE, place, Image.Resampling.BICUBIC))
        for axis, length, start, scale in ((1, width, first_x, model.scale_x), (0, height, first_y, model.scale_y)):
            low, high = math.ceil(-start / scale) + 4, math.floor((length - start) / scale) - 4
            outside = np.ones(length, bool)
            outside[max(0, low) : max(0, high)] = False
            edges[(slice(None),) * axis + (outside,)] = 0
        return edges

    def measure(self, model: Model, radius: int) -> Blocks:
        """Correlate block by block, over offsets of at most ``radius`` pixels."""
        radius = min(radius, self.block // 2 - 3)
        cut = self._cut(self.control_edges(model))
        energy = self._energies(cut)
        near = np.arange(-radius - 1, radius + 2)
        surface = np.fft.ifft2(np.fft.fft2(cut) * self._target).real[:, near[:, None], near].astype(float)
        # A little is added so that blocks of hardly any edges are like nothing.
        weight = np.sqrt(self._energy * energy)
        surface /= (weight + 5e-5 * self.block**2)[:, None, None]
        count, width = len(surface), 2 * radius + 1
        rows, columns = np.divmod(surface[:, 1:-1, 1:-1].reshape(count, -1).argmax(1), width)
        peak, offset, sharpness = _peaks(surface, rows + 1, columns + 1)
        offset += np.stack([columns, rows], -1) - radius
        floor = 0.05 * self.block
        weight = np.where((self._energy > floor**2) & (energy > floor**2), weight, 0.0)
        return Blocks(surface[:, radius + 1, radius + 1], peak, offset, sharpness, weight)

    def likeness(self, model: Model) -> float:
        """How well the edges coincide, over the whole target."""
        blocks, weight = self.measure(model, 1), np.sqrt(self._energy)
        return float((np.maximum(blocks.likeness, 0) * weight).sum() / max(weight.sum(), 1e-9))

    def _cut(self, edges: Field) -> Field:
        return np.stack([edges[y : y + self.block, x : x + self.block] for y, x in self._corners])

    def _energies(self, cut: Field) -> Array:
        return ((cut.real**2 + cut.imag**2) * self._window).sum((1, 2), dtype=float)


def _reduced(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """At ``size`` (width, height), slightly blurred so that a gradient over two pixels has a meaning."""
    small = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    return small.filter(ImageFilter.GaussianBlur(0.8))


def edge_field(picture: Image.Image) -> Field:
    """``[H, W]``: size in [0, 1) saturating with the contrast, phase twice the angle of the gradient."""
    edges = np.zeros((picture.height, picture.width), np.complex64)
    for channel in picture.split():
        values = np.asarray(channel).astype(np.float32)
        right, down = np.zeros_like(values), np.zeros_like(values)
        np.subtract(values[:, 2:], values[:, :-2], out=right[:, 1:-1])
        np.subtract(values[2:], values[:-2], out=down[1:-1])
        edges.real += (right - down) * (right + down)
        edges.imag += 2 * right * down
    for border in (edges[:2], edges[-2:], edges[:, :2], edges[:, -2:]):
        border[:] = 0
    contrast = np.sqrt(np.abs(edges))
    clear = np.maximum(contrast - _FLOOR, 0)
    return edges * (clear / (clear + max(2 * _FLOOR, float(contrast.mean()))) / np.maximum(contrast**2, 1e-6))


def _starts(length: int, block: int) -> list[int]:
    """First pixels of blocks that cover ``length`` evenly, with as little overlap as that needs."""
    count = max(1, round(length / block))
    return [round(k * (length - block) / max(1, count - 1)) for k in range(count)]


def _peaks(surface: Array, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> tuple[Array, Array, Array]:
    """Value, sub-pixel offset ``[N, 2]`` and mean curvature of a quadratic around each integer peak."""

    def at(down: int, right: int) -> Array:
        return surface[np.arange(len(surface)), rows + down, columns + right]

    peak = at(0, 0)
    slope = np.stack([at(0, 1) - at(0, -1), at(1, 0) - at(-1, 0)], -1) / 2
    xx = np.maximum(2 * peak - at(0, 1) - at(0, -1), 0) + 1e-4
    yy = np.maximum(2 * peak - at(1, 0) - at(-1, 0), 0) + 1e-4
    bound = 0.95 * np.sqrt(xx * yy)
    xy = np.clip((at(1, -1) + at(-1, 1) - at(1, 1) - at(-1, -1)) / 4, -bound, bound)
    curvature = np.stack([xx, xy, xy, yy], -1).reshape(-1, 2, 2)
    offset = np.clip(np.linalg.solve(curvature, slope[..., None])[..., 0], -1, 1)
    return peak, offset, (xx + yy) / 2


def searched(target: Image.Image, control: Image.Image, side: int, aspect: float, count: int) -> list[Model]:
    """The ``count`` likeliest models, unlike each other, of all scales and shifts at a resolution of ``side``.

    ``aspect`` is the control's aspect (width / height) over the target's.
    """
    ratio = side / max(target.size)
    size = max(8, round(target.width * ratio)), max(8, round(target.height * ratio))
    width, height = size
    edges = edge_field(_reduced(target, size))
    spectrum, energy = np.fft.fft2(edges).conj(), float(np.linalg.norm(edges))
    control = _reduced(control, size)
    found = []
    widths = {x: _sampling(width, x).T for x, _ in _scales(aspect)}
    for mirrored in (False, True):
        field = edge_field(control.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else control)
        for scale_y, pairs in groupby(_scales(aspect), key=itemgetter(1)):
            squeezed = _sampling(height, scale_y) @ field
            for scale_x, _ in pairs:
                scaled = squeezed @ widths[scale_x]
                surface = np.fft.ifft2(np.fft.fft2(scaled) * spectrum).real
                down, right = divmod(int(surface.argmax()), width)
                likeness = float(surface[down, right]) / max(energy * float(np.linalg.norm(scaled)), 1e-9)
                right, down = right - width * (right > width // 2), down - height * (down > height // 2)
                shift = scale_x * right / width, scale_y * down / height
                found.append((likeness, Model(scale_x, scale_y, *shift, mirrored)))
    found.sort(key=lambda pair: -pair[0])
    chosen: list[Model] = []
    for _, model in found:
        if len(chosen) < count and all(_apart(model, other) for other in chosen):
            chosen.append(model)
    return chosen


def _scales(aspect: float) -> list[tuple[float, float]]:
    """Scales (x, y) to search, in the order of y; around those of a crop too, where the pictures' aspects differ."""
    steps = [math.exp(_STEP * k) for k in range(-_STEPS, _STEPS + 1)]
    pairs = {(x, y) for i, x in enumerate(steps) for j, y in enumerate(steps) if abs(i - j) <= _STEPS}
    if aspect != 1.0:
        pairs |= {(x * step, y * step) for x, y in ((1 / aspect, 1.0), (1.0, aspect)) for step in steps}
    return sorted(pairs, key=itemgetter(1, 0))


def _sampling(length: int, scale: float) -> NDArray[np.float32]:
    """The matrix ``[length, length]`` that reads a line at ``scale`` times the distance from its centre, linearly."""
    place = (length - 1) / 2 + scale * (np.arange(length) - (length - 1) / 2)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(length))).astype(np.float32)


def _apart(one: Model, other: Model) -> bool:
    """Whether refining one cannot be expected to end at the other."""
    scales = max(abs(math.log(one[k] / other[k])) for k in (0, 1))
    shifts = max(abs(one[k] - other[k]) for k in (2, 3))
    return one.mirrored != other.mirrored or scales > 0.08 or shifts > 0.03
