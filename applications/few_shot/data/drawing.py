"""Draw a character from a font file and distort the drawing the way a hand does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 28  # pixels of a finished drawing, as in Omniglot
_FINE = 3  # outlines are kept at three times that resolution
_CANVAS = SIDE * _FINE
_BOX = 18 * _FINE  # the longer side of a character before distortion
_EM = 100  # pixels per em at which the font is rasterised

# The spread of the distortions, set by eye and by the score of a nearest neighbour on pixels.
_ROTATION = 0.17  # standard deviation, radians
_SHEAR = 0.15
_STRETCH = 0.12  # of the logarithm of each axis' scale
_SHIFT = 0.05  # of half the drawing's side
_WARP = 0.05  # of half the drawing's side, at the knots of a coarse grid
_KNOTS = 5
_PEN = (0.9, 1.7)  # half of the stroke's width, in finished pixels
_HAIRLINE = 1.2  # the least half width, in fine pixels

# Cubic interpolation from the knots along one axis: [84, 5].
_SPLINE = F.interpolate(torch.eye(_KNOTS)[None, None], (_CANVAS, _KNOTS), mode="bicubic", align_corners=True)[0, 0]


class Face:
    """One font file: which characters it has and their outlines.

    Args:
        path: A TrueType file.
    """

    def __init__(self, path: Path) -> None:
        self.characters = frozenset(map(chr, FT2Font(str(path)).get_charmap()))
        # The basic layout engine is in every Pillow; raqm, where present, would shape some scripts anew.
        self._font = ImageFont.truetype(str(path), _EM, layout_engine=ImageFont.Layout.BASIC)

    def height(self, character: str) -> float:
        """The longer side of the character's ink in ems; 0 for a blank."""
        left, top, right, bottom = self._font.getbbox(character)
        return max(right - left, bottom - top) / _EM

    def outline(self, character: str) -> Tensor:
        """The character scaled to a common size and centred: float [84, 84], ink is 1 and paper is 0."""
        page = Image.new("L", (4 * _EM, 4 * _EM))
        ImageDraw.Draw(page).text((2 * _EM, 2 * _EM), character, fill=255, font=self._font, anchor="mm")
        ink = page.crop(page.getbbox())
        scale = _BOX / max(ink.size)
        width, height = (max(1, round(side * scale)) for side in ink.size)
        canvas = Image.new("L", (_CANVAS, _CANVAS))
        corner = (_CANVAS - width) // 2, (_CANVAS - height) // 2
        canvas.paste(ink.resize((width, height), Image.Resampling.BOX), corner)
        return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)


def draw(outlines: list[Tensor], instances: int, random: np.random.Generator) -> Tensor:
    """Distorted drawings of one character.

    Every drawing takes the next outline in turn, a pen of its own width, a small affine map and a
    smooth elastic warp (the recipe of Simard, Steinkraus & Platt, ICDAR 2003).

    Args:
        outlines: The character in several faces, each as `Face.outline` gives it.
        instances: The number of drawings.
        random: The source of every distortion.

    Returns:
        uint8 [instances, 28, 28]; ink is 255 and paper is 0.
    """
    pens = random.uniform(*_PEN, size=instances) * _FINE
    strokes = [_Strokes.of(outline) for outline in outlines]
    penned = torch.stack([strokes[i % len(strokes)].with_pen(pens[i]) for i in range(instances)])
    grid = _affine(instances, random) + _elastic(instances, random)
    warped = F.grid_sample(penned[:, None], grid, padding_mode="border", align_corners=False)
    ink = F.avg_pool2d((warped + 0.5).clamp(0, 1), _FINE)
    return (ink[:, 0] * 255).round().to(torch.uint8)


class _Strokes(NamedTuple):
    """The signed distance to an outline's edge, above 0 in the ink: it warps and thickens smoothly."""

    distance: Tensor  # fine pixels
    thin: float  # half the width of its hairlines
    usual: float  # half the width of most of its strokes

    @classmethod
    def of(cls, outline: Tensor) -> _Strokes:
        from scipy.ndimage import distance_transform_edt, maximum_filter

        ink = outline.numpy() > 0.5
        distance = distance_transform_edt(ink) - distance_transform_edt(~ink)
        ridge = distance[ink & (distance == maximum_filter(distance, size=3))]  # along the strokes' middle
        usual = 2 * distance[ink].mean()  # exact for a stroke of one width
        return cls(torch.from_numpy(distance).float(), float(np.quantile(ridge, 0.1)), float(usual))

    def with_pen(self, half_width: float) -> Tensor:
        """Grow or shrink all strokes alike, towards the pen; no hairline is lost and no dot made a speck."""
        return self.distance + max(half_width - self.usual, _HAIRLINE - self.thin, -self.usual / 2)


def _affine(instances: int, random: np.random.Generator) -> Tensor:
    angle, shear = random.normal(scale=[[_ROTATION], [_SHEAR]], size=(2, instances))
    stretch = np.exp(random.normal(scale=_STRETCH, size=(2, instances)))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    lean = np.array([[np.ones(instances), shear], [np.zeros(instances), np.ones(instances)]])
    linear = np.einsum("ijn,jkn->nik", turn, lean * stretch)
    shift = random.normal(scale=_SHIFT, size=(instances, 2, 1))
    theta = torch.from_numpy(np.concatenate([linear, shift], axis=2)).float()
    return F.affine_grid(theta, [instances, 1, _CANVAS, _CANVAS], align_corners=False)


def _elastic(instances: int, random: np.random.Generator) -> Tensor:
    knots = torch.from_numpy(random.normal(scale=_WARP, size=(instances, 2, _KNOTS, _KNOTS))).float()
    return torch.einsum("yk,nckl,xl->nyxc", _SPLINE, knots, _SPLINE)
