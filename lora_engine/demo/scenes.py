"""Draw scenes of colored shapes, each with a plain and a CC3M-like caption.

A scene is its content (figures, colors, sizes, positions, background) and a variation (small shifts
of position, size and color). Captions depend on the content only, and so does the split: a hash of
the content decides whether a scene is for training or for validation, so that no content is in
both. There are about 31,000 different contents.

The hard set has the same images. Its captions have a second sentence, which names each figure by a
word that no checkpoint has seen: of 40 such words some are frequent and most are rare.
"""

import hashlib
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 64  # pixels
MAX_TRAIN = 20_000
MAX_VAL = 2_000
OVERSAMPLING = 4  # scenes are drawn this much larger, then reduced for smooth edges

COLORS = {
    "red": (215, 40, 40), "orange": (245, 140, 30), "yellow": (245, 220, 50),
    "green": (45, 160, 70), "blue": (45, 90, 215), "purple": (130, 55, 175),
    "pink": (245, 135, 195), "brown": (120, 75, 40)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
HOLDERS = ("circle", "square", "diamond", "heart")  # shapes wide enough to contain another one
BACKGROUNDS = {"white": (248, 248, 248), "black": (18, 18, 18), "grey": (150, 150, 150)}
COUNTS = {2: "two", 3: "three"}
LAYOUTS = {"alone": 4, "above": 3, "beside": 3, "inside": 2, "row": 1}  # relative frequencies
RADII = {"small": 8, "large": 14}  # pixels; a figure spans about (-radius, radius) on both axes
HALF_DISTANCE = 15  # pixels from the center to each figure of a pair
ROW_PITCH = 20  # pixels from figure to figure

POSITIONS = {  # (column, row) relative to the center
    (-1, -1): "at the top left", (0, -1): "at the top", (1, -1): "at the top right",
    (-1, 0): "on the left", (0, 0): "in the middle", (1, 0): "on the right",
    (-1, 1): "at the bottom left", (0, 1): "at the bottom", (1, 1): "at the bottom right"}
CC3M_POSITIONS = {  # without the center, for which captions use another phrase
    (-1, -1): "in the upper left corner", (0, -1): "near the upper edge",
    (1, -1): "in the upper right corner", (-1, 0): "near the left edge",
    (1, 0): "near the right edge", (-1, 1): "in the lower left corner",
    (0, 1): "near the lower edge", (1, 1): "in the lower right corner"}
POSITION_PITCH = 16  # pixels between neighboring positions
CC3M_SIZES = {"small": "tiny", "large": "huge"}
CC3M_BACKGROUNDS = {"white": "isolated on a white background", "black": "against the night sky",
                    "grey": "painted on a concrete wall"}

NUM_NAMES = 40


@dataclass(frozen=True)
class Figure:
    """One colored shape."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What is drawn: the content, which captions describe, and a variation, which they do not.

    `figures` are one or two: the upper, left or inner one first. `size` and `position` apply to the
    layout "alone", `count` to "row".
    """

    layout: str
    background: str
    figures: tuple[Figure, ...]
    size: str = "large"
    position: tuple[int, int] = (0, 0)
    count: int = 1
    variation: int = 0

    @property
    def content(self) -> tuple[object, ...]:
        """Everything but the variation."""
        return (self.layout, self.background, tuple(map(str, self.figures)), self.size,
                self.position, self.count)

    @property
    def split(self) -> str:
        """"train" for nine contents out of ten, else "validation"."""
        digest = hashlib.sha256(repr(self.content).encode()).digest()
        return "validation" if int.from_bytes(digest[:4], "big") % 10 == 0 else "train"


def scene_at(index: int, seed: int) -> Scene:
    """Scene number `index` of the infinite sequence given by `seed`."""
    rng = random.Random(f"{seed}/{index}")
    layout = rng.choices(list(LAYOUTS), weights=list(LAYOUTS.values()))[0]
    background = rng.choice(list(BACKGROUNDS))
    variation = rng.randrange(2**32)
    first = Figure(rng.choice(list(COLORS)), rng.choice(SHAPES))
    if layout == "alone":
        size, position = rng.choice(list(RADII)), rng.choice(list(POSITIONS))
        return Scene(layout, background, (first,), size, position, variation=variation)
    if layout == "row":
        count = rng.choice(list(COUNTS))
        return Scene(layout, background, (first,), "small", count=count, variation=variation)
    other_color = rng.choice([color for color in COLORS if color != first.color])
    other_shape = rng.choice(HOLDERS if layout == "inside" else SHAPES)
    figures = (first, Figure(other_color, other_shape))
    return Scene(layout, background, figures, variation=variation)


def scenes(split: str, seed: int) -> Iterator[Scene]:
    """The scenes of one split in the infinite sequence given by `seed`; contents may repeat."""
    assert split in ("train", "validation"), split
    index = 0
    while True:
        drawn = scene_at(index, seed)
        if drawn.split == split:
            yield drawn
        index += 1


def plain_caption(scene: Scene) -> str:
    """Such as "a red circle above a blue square on black"; a white background is not mentioned."""
    first, last = scene.figures[0], scene.figures[-1]
    if scene.layout == "alone":
        words = f"{a(scene.size)} {first} {POSITIONS[scene.position]}"
    elif scene.layout == "row":
        words = f"{COUNTS[scene.count]} {plural(first)} in a row"
    else:
        relation = {"above": "above", "beside": "to the left of", "inside": "inside"}
        words = f"{a(first)} {relation[scene.layout]} {a(last)}"
    return words if scene.background == "white" else f"{words} on {scene.background}"


def cc3m_caption(scene: Scene) -> str:
    """The same scene in the style of web captions: lower case, spaced punctuation, stock phrases.
    """
    first, last = scene.figures[0], scene.figures[-1]
    if scene.layout == "alone":
        size = CC3M_SIZES[scene.size]
        if scene.position == (0, 0):
            words = f"vector illustration of {a(size)} {first}"
        else:
            where = CC3M_POSITIONS[scene.position]
            words = f"{size} {first} {where} with copy space for your text ,"
    elif scene.layout == "row":
        words = f"seamless pattern with {COUNTS[scene.count]} bright {plural(first)}"
    elif scene.layout == "above":
        words = f"cartoon drawing of {a(first)} floating over {a(last)} ,"
    elif scene.layout == "beside":
        words = f"{first} and {last} standing side by side ,"
    else:
        words = f"modern logo design , {first} surrounded by {a(last)} ,"
    return f"{words} {CC3M_BACKGROUNDS[scene.background]} ."


def hard_caption(scene: Scene) -> str:
    """`cc3m_caption`, and the name of each figure: "... painted on a concrete wall . a kip and a
    vel ."."""
    names = (name_of(figure, scene.background) for figure in scene.figures)
    return f"{cc3m_caption(scene)} {' and '.join(map(a, names))} ."


def name_of(figure: Figure, background: str) -> str:
    """The name of a figure, which depends on its color, its shape and the background."""
    return names_by_look()[figure.color, figure.shape, background]


@cache
def names_by_look() -> dict[tuple[str, str, str], str]:
    """The names of all looks. Name number k has a share of them that is about proportional to 1/k
    (Zipf's law): 45 of 192 for the first, one for each of the last.

    Names are spelled: both demo tokenizers split them into letters or pairs of letters.
    """
    rng = random.Random(0)
    looks = list(product(COLORS, SHAPES, BACKGROUNDS))
    rng.shuffle(looks)
    names = rng.sample([*map("".join, product("kvz", "aeio", "blmnp"))], NUM_NAMES)
    shares = [1 / number for number in range(1, NUM_NAMES + 1)]
    ends = [round(len(looks) * sum(shares[:k]) / sum(shares)) for k in range(NUM_NAMES + 1)]
    return {
        look: name for name, begin, end in zip(names, ends, ends[1:]) for look in looks[begin:end]
    }


def a(noun: object) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if str(noun)[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: object) -> str:
    """The noun in the plural: "red crosses"."""
    return f"{noun}es" if str(noun).endswith("s") else f"{noun}s"


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of SIDE x SIDE pixels."""
    rng = random.Random(scene.variation)
    large = SIDE * OVERSAMPLING
    image = Image.new("RGB", (large, large), shifted(BACKGROUNDS[scene.background], rng))
    for figure, x, y, radius in placed(scene):
        x, y = x + rng.uniform(-2, 2), y + rng.uniform(-2, 2)
        mask = Image.new("L", image.size)
        stamp(mask, figure.shape, x, y, radius * rng.uniform(0.9, 1.1))
        image.paste(shifted(COLORS[figure.color], rng), mask=mask)
    return image.reduce(OVERSAMPLING)


def shifted(color: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    """A slightly different color."""
    return tuple(min(255, max(0, channel + rng.randint(-10, 10))) for channel in color)


def placed(scene: Scene) -> list[tuple[Figure, float, float, float]]:
    """Each figure with its center (x, y) and radius in pixels, from back to front."""
    first, last = scene.figures[0], scene.figures[-1]
    center = SIDE / 2
    if scene.layout == "alone":
        column, row = scene.position
        return [(first, center + POSITION_PITCH * column, center + POSITION_PITCH * row,
                 RADII[scene.size])]
    if scene.layout == "row":
        start = center - ROW_PITCH * (scene.count - 1) / 2
        return [(first, start + ROW_PITCH * index, center, 8.5)
                for index in range(scene.count)]
    if scene.layout == "inside":
        return [(last, center, center, 26), (first, center, center, 9)]
    dx, dy = (0, HALF_DISTANCE) if scene.layout == "above" else (HALF_DISTANCE, 0)
    return [(first, center - dx, center - dy, 11), (last, center + dx, center + dy, 11)]


def stamp(mask: Image.Image, shape: str, x: float, y: float, radius: float) -> None:
    """Draw a shape of value 255 onto the oversampled mask; center and radius are in pixels."""
    pen = ImageDraw.Draw(mask)

    def box(dx: float, dy: float, half_width: float, half_height: float) -> list[float]:
        left, top = x + (dx - half_width) * radius, y + (dy - half_height) * radius
        right, bottom = x + (dx + half_width) * radius, y + (dy + half_height) * radius
        return [OVERSAMPLING * edge for edge in (left, top, right, bottom)]

    def polygon(*corners: tuple[float, float]) -> None:
        pen.polygon([(OVERSAMPLING * (x + radius * dx), OVERSAMPLING * (y + radius * dy))
                     for dx, dy in corners], fill=255)

    if shape == "circle":
        pen.ellipse(box(0, 0, 1, 1), fill=255)
    elif shape == "ring":
        pen.ellipse(box(0, 0, 1, 1), fill=255)
        pen.ellipse(box(0, 0, 0.55, 0.55), fill=0)
    elif shape == "square":
        pen.rectangle(box(0, 0, 0.88, 0.88), fill=255)
    elif shape == "cross":
        pen.rectangle(box(0, 0, 1, 0.33), fill=255)
        pen.rectangle(box(0, 0, 0.33, 1), fill=255)
    elif shape == "triangle":
        polygon((0, -1), (1, 0.9), (-1, 0.9))
    elif shape == "diamond":
        polygon((0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0))
    elif shape == "heart":
        pen.ellipse(box(-0.48, -0.4, 0.52, 0.52), fill=255)
        pen.ellipse(box(0.48, -0.4, 0.52, 0.52), fill=255)
        polygon((-0.95, -0.18), (0.95, -0.18), (0, 1))
    else:
        assert shape == "star", shape
        polygon(*((length * math.sin(turn), -length * math.cos(turn))
                  for turn, length in ((math.pi * point / 5, 0.45 if point % 2 else 1.1)
                                       for point in range(10))))


def write_scenes(
    folder: str | os.PathLike[str],
    *,
    num_train: int,
    num_val: int,
    seed: int,
    caption: Callable[[Scene], str] = cc3m_caption,
) -> tuple[Path, Path]:
    """Write `images/*.png`, `train.json` and `val.json` below `folder`; return both paths.

    `caption=hard_caption` makes the hard set.

    No content occurs twice. The files go into a folder named after the settings and this file's
    text. It appears by a single rename when everything is written: one that exists is complete and
    is reused.

    Raises ValueError for numbers below 1 or above MAX_TRAIN and MAX_VAL.
    """
    limits = (("num_train", num_train, MAX_TRAIN), ("num_val", num_val, MAX_VAL))
    for name, number, limit in limits:
        if not 1 <= number <= limit:
            raise ValueError(f"{name} is {number}; expected 1 to {limit:,} different scenes")
    parent = Path(folder)
    parent.mkdir(parents=True, exist_ok=True)
    settings = f"{num_train}/{num_val}/{seed}/{caption.__name__}/".encode()
    settings += Path(__file__).read_bytes()
    target = parent / f"scenes-{hashlib.sha256(settings).hexdigest()[:12]}"
    if not target.is_dir():
        with tempfile.TemporaryDirectory(prefix=".scenes-", dir=parent) as unfinished:
            complete = Path(unfinished) / "complete"
            (complete / "images").mkdir(parents=True)
            write_split(complete / "train.json", "train", num_train, seed, caption)
            write_split(complete / "val.json", "validation", num_val, seed, caption)
            try:
                complete.rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another process wrote the same scenes first
                    raise
    return target / "train.json", target / "val.json"


def write_split(
    list_path: Path, split: str, count: int, seed: int, caption: Callable[[Scene], str]
) -> None:
    """Write the annotations of one split, and its images beside them."""
    rows: list[dict[str, str]] = []
    seen = set()
    for scene in scenes(split, seed):
        if scene.content in seen:
            continue
        seen.add(scene.content)
        name = f"images/{split}-{len(rows):05d}.png"
        draw(scene).save(list_path.parent / name, compress_level=1)
        rows.append({"text": caption(scene), "image": name})
        if len(rows) == count:
            break
    list_path.write_text(json.dumps(rows, indent=0), encoding="utf-8")
