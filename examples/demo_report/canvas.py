"""Drawing with Pillow in units of a design, at any resolution: text, boxes with smooth corners, marks, pictures."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
_SMOOTH = 4  # supersampling of shapes


@lru_cache(maxsize=64)
def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)  # Aileron, which is part of Pillow
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType, which text needs")
    return font


@lru_cache(maxsize=256)
def _rounded_mask(width: int, height: int, radius: int) -> Image.Image:
    large = Image.new("L", (width * _SMOOTH, height * _SMOOTH), 0)
    box = (0, 0, width * _SMOOTH - 1, height * _SMOOTH - 1)
    ImageDraw.Draw(large).rounded_rectangle(box, radius * _SMOOTH, fill=255)
    return large.resize((width, height), Image.Resampling.BOX)


class Canvas:
    """A picture to draw on.

    Args:
        width, height: in units of the design.
        scale: pixels per unit.
        background: its colour.
    """

    def __init__(self, width: float, height: float, scale: float, background: Colour) -> None:
        self.scale = scale
        self.image = Image.new("RGB", (round(width * scale), round(height * scale)), background)
        self._draw = ImageDraw.Draw(self.image)

    def cropped(self, height: float) -> Image.Image:
        """The picture down to `height`."""
        return self.image.crop((0, 0, self.image.width, min(self.image.height, round(height * self.scale))))

    # -- text --------------------------------------------------------------------------------------------------------

    def width(self, text: str, size: float, bold: bool = False) -> float:
        """Of a line of text."""
        stroke = self._stroke(size) if bold else 0.0
        return (_font(size * self.scale).getlength(text) + 2 * stroke) / self.scale

    def text(
        self, x: float, y: float, text: str, size: float, colour: Colour, *, bold: bool = False, anchor: str = "ls"
    ) -> float:
        """A line of text with its baseline at `y`; `anchor` as in Pillow. Returns where it ends."""
        self._draw.text(
            (x * self.scale, y * self.scale),
            text,
            fill=colour,
            font=_font(size * self.scale),
            anchor=anchor,
            stroke_width=self._stroke(size) if bold else 0,
        )
        return x + self.width(text, size, bold)

    def paragraph(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: Colour,
        *,
        width: float,
        bold: bool = False,
        spacing: float = 1.32,
        most: int = 6,
    ) -> float:
        """Text broken into lines of at most `width`, from the top `y`; returns the bottom. What does not fit into
        `most` lines ends in an ellipsis."""
        lines = self.lines(text, size, width, bold)
        if len(lines) > most:
            lines = [*lines[: most - 1], self._shortened(f"{lines[most - 1]} {lines[most]}", size, width, bold)]
        for line in lines:
            self.text(x, y + size, line, size, colour, bold=bold)
            y += size * spacing
        return y

    def lines(self, text: str, size: float, width: float, bold: bool = False) -> list[str]:
        """`text` broken at blanks."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.width(f"{lines[-1]} {word}", size, bold) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return [self._shortened(line, size, width, bold) for line in lines]

    def _shortened(self, text: str, size: float, width: float, bold: bool) -> str:
        if self.width(text, size, bold) <= width:
            return text
        while text and self.width(f"{text}…", size, bold) > width:
            text = text[:-1].rstrip()
        return f"{text}…"

    def _stroke(self, size: float) -> float:
        return 0.022 * size * self.scale  # the font has one weight only

    # -- shapes ------------------------------------------------------------------------------------------------------

    def box(self, x: float, y: float, width: float, height: float, radius: float, fill: Colour) -> None:
        """A filled box with round corners."""
        left, top, mask = self._placed_mask(x, y, width, height, radius)
        self.image.paste(fill, (left, top), mask)

    def frame(
        self, x: float, y: float, width: float, height: float, radius: float, line: Colour, fill: Colour, thick: float
    ) -> None:
        """A box with a border inside of it."""
        self.box(x, y, width, height, radius, line)
        inner = max(0.0, radius - thick)
        self.box(x + thick, y + thick, width - 2 * thick, height - 2 * thick, inner, fill)

    def picture(self, x: float, y: float, side: float, picture: Image.Image, radius: float) -> None:
        """A square picture with round corners."""
        left, top, mask = self._placed_mask(x, y, side, side, radius)
        self.image.paste(picture.resize(mask.size, Image.Resampling.LANCZOS), (left, top), mask)

    def mark(self, x: float, y: float, size: float, right: bool, colour: Colour) -> None:
        """A disc with a tick or a cross; `x`, `y`: its left top corner."""
        side = round(size * self.scale) * _SMOOTH
        disc = Image.new("L", (side, side), 0)
        draw = ImageDraw.Draw(disc)
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        thick = max(1, round(0.11 * side))
        strokes = [[(0.27, 0.53), (0.44, 0.69), (0.74, 0.34)]]
        if not right:
            strokes = [[(0.32, 0.32), (0.68, 0.68)], [(0.32, 0.68), (0.68, 0.32)]]
        for stroke in strokes:
            points = [(u * side, v * side) for u, v in stroke]
            draw.line(points, fill=0, width=thick, joint="curve")
            for u, v in (points[0], points[-1]):
                draw.ellipse((u - thick / 2, v - thick / 2, u + thick / 2, v + thick / 2), fill=0)
        disc = disc.resize((side // _SMOOTH, side // _SMOOTH), Image.Resampling.BOX)
        self.image.paste(colour, (round(x * self.scale), round(y * self.scale)), disc)

    def _placed_mask(
        self, x: float, y: float, width: float, height: float, radius: float
    ) -> tuple[int, int, Image.Image]:
        left, top = round(x * self.scale), round(y * self.scale)
        right, bottom = round((x + width) * self.scale), round((y + height) * self.scale)
        mask = _rounded_mask(max(1, right - left), max(1, bottom - top), round(radius * self.scale))
        return left, top, mask
