"""The demo's pictures, drawn by code: one flat shape on a flat background, and edits of it.

The task ``segment`` answers the prompt ``segment the shape`` with a white shape on black. The task ``pretrain`` holds
the edits the demo model learns beforehand; its answers are all in clear colours, never black, white or grey.
Every scene is a function of ``(seed, index)``, so the same call writes the same bytes on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Task = Literal["segment", "pretrain"]

SIZE = 64
KINDS = ("circle", "square", "triangle")
COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 70, 230),
    "yellow": (235, 220, 50),
    "purple": (150, 50, 190),
    "orange": (240, 140, 30),
}
# More colours for the pretraining answers: a network that can aim at many colours learns a new one sooner.
MORE_COLOURS: dict[str, Colour] = {
    "pink": (250, 170, 200),
    "cyan": (60, 210, 230),
    "brown": (110, 60, 25),
    "navy": (15, 25, 95),
    "olive": (110, 115, 30),
    "teal": (10, 110, 105),
    "tan": (225, 190, 140),
    "lime": (170, 240, 80),
    "magenta": (220, 40, 170),
    "violet": (190, 150, 250),
    "sky": (150, 205, 250),
    "rose": (120, 15, 60),
}
ALL_COLOURS = COLOURS | MORE_COLOURS
SEGMENT_PROMPT = "segment the shape"
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """One shape on a background. ``x, y`` (its centre) and ``side`` in pixels of a picture ``size`` wide and high."""

    kind: str
    x: float
    y: float
    side: float
    colour: Colour
    background: Colour
    size: int = SIZE

    def coverage(self) -> np.ndarray:
        """The shape's area, ``[size, size]`` in 0..255: edges anti-aliased by averaging 4 x 4 finer pixels."""
        scale = _SUPERSAMPLING
        canvas = Image.new("L", (self.size * scale,) * 2)
        pen = ImageDraw.Draw(canvas)
        half = self.side / 2
        left, top = (self.x - half) * scale, (self.y - half) * scale
        right, bottom = (self.x + half) * scale - 1, (self.y + half) * scale - 1
        if self.kind == "circle":
            pen.ellipse((left, top, right, bottom), fill=255)
        elif self.kind == "square":
            pen.rectangle((left, top, right, bottom), fill=255)
        else:
            pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=255)
        return np.asarray(canvas.reduce(scale))

    def mask(self) -> Image.Image:
        """The shape's area as an 8-bit grey image."""
        return Image.fromarray(self.coverage())

    def image(self) -> Image.Image:
        """The RGB picture."""
        share = self.coverage()[..., None].astype(np.float64) / 255.0
        pixels = share * np.array(self.colour) + (1.0 - share) * np.array(self.background)
        return Image.fromarray(np.rint(pixels).astype(np.uint8))


@dataclass(frozen=True)
class Pair:
    """A scene, the prompt and the scene after the edit."""

    before: Scene
    prompt: str
    after: Scene


def random_scene(rng: random.Random, palette: list[Colour], size: int = SIZE) -> Scene:
    """A scene wholly inside the picture, in two different colours of ``palette``; side size/4 to size/2."""
    side = rng.randint(size, 2 * size) / 4
    x, y = (rng.randint(round(2 * side) + 4, round(4 * size - 2 * side) - 4) / 4 for _ in range(2))
    colour, background = rng.sample(palette, 2)
    return Scene(rng.choice(KINDS), x, y, side, colour, background, size)


def random_colour(rng: random.Random) -> Colour:
    """Any RGB colour, the corners of the cube included."""
    return (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))


def pairs(task: Task, seed: int, size: int = SIZE) -> Iterator[Pair]:
    """The endless stream of pairs of a task and seed; no scene occurs twice in it."""
    seen: set[Scene] = set()
    index = 0
    while True:
        rng = random.Random(f"{task}/{seed}/{index}")
        index += 1
        pair = _segment_pair(rng, size) if task == "segment" else _pretraining_pair(rng, size)
        if pair.before not in seen:
            seen.add(pair.before)
            yield pair


def write_pairs(
    folder: str | Path,
    count: int,
    seed: int,
    task: Task = "segment",
    *,
    start: int = 0,
    size: int = SIZE,
    controls: bool = True,
) -> list[Pair]:
    """Write pairs ``start .. start + count`` of the stream as a plain data set folder; return them.

    ``training_images/`` holds ``<stem>.png`` (the answer), ``<stem>.txt`` (the prompt) and ``<stem>_mask.png`` (the
    shape's area); ``control_images/`` the scene before the edit, unless ``controls`` is off. Ranges that do not overlap
    share no scene.
    """
    folder = Path(folder)
    targets, before = folder / "training_images", folder / "control_images"
    for part in (targets, before) if controls else (targets,):
        part.mkdir(parents=True, exist_ok=True)
    written = list(islice(pairs(task, seed, size), start, start + count))
    for number, pair in enumerate(written, start):
        stem = f"{number:05d}"
        pair.after.image().save(targets / f"{stem}.png")
        pair.after.mask().save(targets / f"{stem}_mask.png")
        (targets / f"{stem}.txt").write_text(pair.prompt + "\n", encoding="utf-8")
        if controls:
            pair.before.image().save(before / f"{stem}.png")
    return written


def _segment_pair(rng: random.Random, size: int) -> Pair:
    scene = random_scene(rng, list(COLOURS.values()), size)
    return Pair(scene, SEGMENT_PROMPT, replace(scene, colour=WHITE, background=BLACK))


def _pretraining_pair(rng: random.Random, size: int) -> Pair:
    """One edit the demo model knows: recolour the shape, the background or both, swap the two colours, keep all."""
    palette = COLOURS if rng.random() < 0.6 else ALL_COLOURS
    scene = random_scene(rng, list(palette.values()), size)
    shape = rng.choice((scene.kind, "shape"))
    fresh = [name for name, colour in ALL_COLOURS.items() if colour not in (scene.colour, scene.background)]
    first, second = rng.sample(fresh, 2)
    verb = rng.choice(("make", "make", "paint"))
    edit = rng.choices(("shape", "background", "both", "swap", "keep"), (30, 20, 40, 6, 4))[0]
    if edit == "shape":
        return Pair(scene, f"{verb} the {shape} {first}", replace(scene, colour=ALL_COLOURS[first]))
    if edit == "background":
        return Pair(scene, f"{verb} the background {first}", replace(scene, background=ALL_COLOURS[first]))
    if edit == "both":
        words = [f"the {shape} {first}", f"the background {second}"]
        rng.shuffle(words)
        after = replace(scene, colour=ALL_COLOURS[first], background=ALL_COLOURS[second])
        return Pair(scene, f"{verb} {words[0]} and {words[1]}", after)
    if edit == "swap":
        return Pair(scene, "swap the colours", replace(scene, colour=scene.background, background=scene.colour))
    return Pair(scene, "keep the picture", scene)
