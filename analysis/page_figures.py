"""Figures inside a page: the suite's own SVG files, in colours that follow the page's theme."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
FOREIGN = {f"{{{SVG}}}metadata", f"{{{SVG}}}style"}
"""What a page has no use for: the style sheet's one rule, for every element, would reach all of the page."""
HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
DARK_PAPER, DARK_INK = 0.215, 0.91
"""Lightness (OKLab) that white and black become in the dark theme."""
LIGHTEST_NEEDED = 0.68
"""Lightness that a colour has at least in the dark theme, so that thin lines stay visible."""


def inline_svg(path: Path) -> tuple[str, set[str]]:
    """An SVG file as markup for a page, and the colours in it as ``#rrggbb``.

    Ids get the file's name in front, since all figures share the page's ids; comments, metadata and the fixed size go;
    every colour becomes a CSS variable of `theme_css`.
    """
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))  # drops comments and the document type
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in FOREIGN]:
            parent.remove(child)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    colours: set[str] = set()

    def variable(match: re.Match[str]) -> str:
        colours.add(match[0].lower())
        return f"var(--c{match[0][1:].lower()})"

    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name == "id":
                element.set(name, f"{path.stem}-{value}")
            elif name == f"{{{XLINK}}}href":
                del element.attrib[name]
                element.set("href", value if value.startswith("data:") else f"#{path.stem}-{value[1:]}")
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{path.stem}-"))
        if "style" in element.attrib:
            element.set("style", HEX.sub(variable, element.attrib["style"]))
        element.tag = str(element.tag).removeprefix(f"{{{SVG}}}")
    root.set("aria-hidden", "true")
    return re.sub(r"\s*\n\s*", " ", ElementTree.tostring(root, encoding="unicode")), colours


def theme_css(colours: Iterable[str]) -> str:
    """A declaration of CSS variables: each colour as it is in the light theme and as `on_dark` makes it in the dark.

    White is the page's own paper, ``--paper``, in both.
    """
    found = sorted(set(colours) - {"#ffffff"})
    pairs = ["--cffffff:var(--paper)", *(f"--c{colour[1:]}:light-dark({colour},{on_dark(colour)})" for colour in found)]
    return f":root{{{';'.join(pairs)}}}"


def on_dark(colour: str) -> str:
    """A colour for a dark page: greys change places, others keep their hue and become light enough to be seen.

    Lightness, chroma and hue are those of OKLab (Ottosson 2020).
    """
    lightness, a, b = _to_oklab(colour)
    if math.hypot(a, b) < 0.03:
        return _from_oklab(DARK_PAPER + (DARK_INK - DARK_PAPER) * max(1 - lightness, 0.0) ** 0.7, a, b)
    return _from_oklab(max(lightness, LIGHTEST_NEEDED), a, b)


def _to_oklab(colour: str) -> tuple[float, float, float]:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    l_, m_, s_ = (
        math.cbrt(x)
        for x in (
            0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b,
            0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b,
            0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b,
        )
    )
    return (
        0.2104542553 * l_ + 0.7936177850 * m_ - 0.0040720468 * s_,
        1.9779984951 * l_ - 2.4285922050 * m_ + 0.4505937099 * s_,
        0.0259040371 * l_ + 0.7827717662 * m_ - 0.8086757660 * s_,
    )


def _from_oklab(lightness: float, a: float, b: float) -> str:
    l_, m_, s_ = (
        x**3
        for x in (
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        )
    )
    linear = (
        4.0767416621 * l_ - 3.3077115913 * m_ + 0.2309699292 * s_,
        -1.2684380046 * l_ + 2.6097574011 * m_ - 0.3413193965 * s_,
        -0.0041960863 * l_ - 0.7034186147 * m_ + 1.7076147010 * s_,
    )
    channels = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in (max(0.0, x) for x in linear))
    return "#" + "".join(f"{round(255 * min(c, 1.0)):02x}" for c in channels)
