"""Finds the tissue of a slide on an overview of a few micrometres per pixel; arithmetic on arrays, no slide access.

Brightfield: every pixel becomes an optical density relative to the slide's own background. Stained tissue has a colour,
that is, densities that differ between the channels; glass, dust, shadows, bubbles and coverslip edges are grey. The
difference is thresholded by Otsu's method, kept between bounds (a slide without tissue, or of tissue only, has no two
modes), with hysteresis. Ink and black areas are recognised first and taken out.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import ndimage

from data_pipelines.errors import DataError
from data_pipelines.wsi.contours import well_composed

MODES = ("brightfield", "fluorescence", "all")
_SMOOTH_UM = 6.0
_CLOSE_UM = 12.0
_INK_REACH_UM, _INK_MARGIN_UM = 40.0, 16.0
_MIN_INK_UM2 = 4_000.0
_MIN_BLACK_UM2 = 10_000.0
_OTSU_BOUNDS = (0.05, 0.15)
_LOW_SHARE, _LOW_FLOOR = 0.6, 0.035
_MAX_TINT = 25.0
_EIGHT = np.ones((3, 3), bool)


class NoTissue(DataError):
    """A slide that cannot be tiled for what it shows.

    Attributes:
      reason: few words, the same for all slides with this fault.
      detail: what was found and what to do.
    """

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


@dataclasses.dataclass(frozen=True)
class TissueOptions:
    """How tissue is told from the rest.

    Attributes:
      mode: "brightfield" (stained tissue on bright glass), "fluorescence" (bright signal on a dark background) or "all"
        (everything that was scanned counts as tissue).
      mpp: micrometres per pixel of the overview.
      threshold: difference of optical densities above which a pixel is tissue; None: Otsu's, between 0.05 and 0.15.
      min_area_um2: smaller pieces are left out.
      min_hole_um2: smaller holes are filled.
      ink: whether pen marks are taken out; special stains in blue or green need False.
    """

    mode: str = "brightfield"
    mpp: float = 4.0
    threshold: float | None = None
    min_area_um2: float = 20_000.0
    min_hole_um2: float = 10_000.0
    ink: bool = True

    def __post_init__(self):
        if self.mode not in MODES:
            raise DataError(f"tissue mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        bad = [name for name in ("mpp", "min_area_um2", "min_hole_um2") if not 0 <= getattr(self, name) < math.inf]
        if self.threshold is not None and not 0 < self.threshold < 3:
            bad.append("threshold")
        if bad or self.mpp == 0:
            raise DataError(f"tissue option {(bad or ['mpp'])[0]}: expected a positive number")


@dataclasses.dataclass(frozen=True, eq=False)
class TissueMap:
    """What covers a slide; masks are bool [height, width] of the overview and disjoint.

    Attributes:
      tissue, ink, black: masks.
      threshold: on the signal, or NaN where there was none.
      mpp: micrometres per pixel of the masks (the mean of both directions).
    """

    tissue: np.ndarray
    ink: np.ndarray
    black: np.ndarray
    threshold: float
    mpp: float

    @property
    def tissue_mm2(self) -> float:
        """Area of the tissue in square millimetres."""
        return float(self.tissue.sum()) * self.mpp**2 / 1e6


def segment(rgb: np.ndarray, mpp: float, options: TissueOptions) -> TissueMap:
    """Tissue, ink and black areas of an overview.

    Args:
      rgb: uint8 [height, width, 3].
      mpp: micrometres per pixel.
      options: see there.

    Returns:
      The masks; the tissue has no two pixels that touch at a corner only (`contours.well_composed`).

    Raises:
      NoTissue: the background is dark although it should be bright, or nothing was found.
    """
    nothing = np.zeros(rgb.shape[:2], bool)
    if options.mode == "all":
        return TissueMap(~nothing, nothing, nothing, math.nan, mpp)
    if options.mode == "fluorescence":
        signal, threshold = _fluorescence(rgb, mpp)
        ink = black = nothing
        low = 0.7 * threshold
    else:
        signal, ink, black = _brightfield(rgb, mpp, options.ink)
        threshold = otsu(signal[~(ink | black)], 0.6) if options.threshold is None else options.threshold
        if options.threshold is None:
            threshold = float(np.clip(threshold, *_OTSU_BOUNDS))
        low = max(_LOW_SHARE * threshold, min(_LOW_FLOOR, threshold))
    tissue = _hysteresis(signal, low, threshold)
    tissue = clean(tissue, mpp, options.min_area_um2, options.min_hole_um2) & ~(ink | black)
    tissue = well_composed(_without_small(tissue, options.min_area_um2 / mpp**2))
    ink, black = ink & ~tissue, black & ~tissue
    if not tissue.any():
        raise NoTissue("no tissue", _why_none(signal, threshold, ink, black, options))
    return TissueMap(tissue, ink, black & ~ink, threshold, mpp)


def background(rgb: np.ndarray) -> np.ndarray:
    """Colour of the empty glass.

    Pure white (frames, areas that were not scanned) does not count where something else is bright, too. Where the
    brightest pixels are coloured no glass is in view, and white of the same brightness is assumed.

    Args:
      rgb: [height, width, 3].

    Returns:
      float32 [3] in [200, 255].
    """
    pixels = rgb.reshape(-1, 3)[:: max(1, rgb.size // 6_000_000)].astype(np.float32)
    pixels = pixels[pixels.max(axis=1) > 60]
    scanned = pixels[pixels.min(axis=1) < 254]
    pixels = scanned if len(scanned) > 0.02 * max(1, len(pixels)) else pixels
    if not len(pixels):
        return np.full(3, 255, np.float32)
    light = pixels.mean(axis=1)
    bright = pixels[light >= np.percentile(light, 95)]
    colour = np.median(bright, axis=0)
    if np.ptp(colour) > _MAX_TINT:
        colour = np.full(3, max(colour.max(), 240.0))
    return np.clip(colour, 200, 255).astype(np.float32)


def optical_density(rgb: np.ndarray, white: np.ndarray) -> np.ndarray:
    """log10(white / rgb) of every channel, at least 0; float32 of the same shape."""
    return np.maximum(np.log10(white / np.maximum(rgb.astype(np.float32), 1.0)), 0).astype(np.float32)


def otsu(values: np.ndarray, limit: float, bins: int = 256) -> float:
    """Otsu's threshold: the one that leaves the least variance within the two classes.

    Args:
      values: of any shape; those outside [0, limit] count as the end they lie beyond.
      limit: upper end of the histogram.
      bins: of the histogram.

    Returns:
      The threshold, the upper edge of a bin; 0 for no values.
    """
    counts, edges = np.histogram(np.clip(values, 0, limit), bins, (0.0, limit))
    if not counts.any():
        return 0.0
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts).astype(float), counts.sum()
    moment = np.cumsum(counts * centres)
    above = total - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    return float(edges[1:][np.argmax(np.nan_to_num(between))])


def clean(mask: np.ndarray, mpp: float, min_area_um2: float, min_hole_um2: float) -> np.ndarray:
    """Closes gaps of a few micrometres, fills small holes and removes small pieces.

    Args:
      mask: bool [height, width].
      mpp: micrometres per pixel.
      min_area_um2: smaller pieces are removed.
      min_hole_um2: smaller holes are filled.

    Returns:
      bool [height, width].
    """
    radius = max(1, round(_CLOSE_UM / mpp))
    padded = np.pad(mask, radius)
    closed = ndimage.binary_closing(padded, disk(radius))[radius:-radius, radius:-radius]
    closed = _without_small(closed, min_area_um2 / mpp**2)
    return ~_without_small(~closed, min_hole_um2 / mpp**2, keep_at_border=True)


def disk(radius: int) -> np.ndarray:
    """A round structuring element."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return x * x + y * y <= radius * radius + radius


def _without_small(mask: np.ndarray, min_pixels: float, keep_at_border: bool = False) -> np.ndarray:
    """A mask without its small pieces; background (holes) that reaches the border of the image is no hole."""
    labels, count = ndimage.label(mask)
    keep = np.bincount(labels.ravel(), minlength=count + 1) >= min_pixels
    if keep_at_border:
        for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
            keep[edge] = True
    keep[0] = False
    return keep[labels]


def _hysteresis(signal: np.ndarray, low: float, high: float) -> np.ndarray:
    """Pixels above `low` that are connected to one above `high`."""
    labels, count = ndimage.label(signal > low, _EIGHT)
    keep = np.zeros(count + 1, bool)
    keep[labels[signal > high]] = True
    keep[0] = False
    return keep[labels]


def _fluorescence(rgb: np.ndarray, mpp: float) -> tuple[np.ndarray, float]:
    """Logarithm of the brightest channel above the background, and Otsu's threshold on it."""
    light = ndimage.gaussian_filter(rgb.max(axis=-1).astype(np.float32), _SMOOTH_UM / mpp)
    signal = np.log1p(np.maximum(light - np.percentile(light, 1), 0))
    return signal, max(otsu(signal, float(np.log(256.0))), float(np.log1p(6.0)))


def _brightfield(rgb: np.ndarray, mpp: float, with_ink: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signal [height, width] with 0 on ink and black areas, and those two masks."""
    light = rgb.mean(axis=-1)
    if (light < 60).mean() > 0.5 and (light > 150).mean() < 0.05:
        raise NoTissue(
            "dark background",
            "most of the slide is black: a fluorescence image? Tissue is found there with --tissue fluorescence",
        )
    smooth = ndimage.gaussian_filter(rgb.astype(np.float32), (_SMOOTH_UM / mpp, _SMOOTH_UM / mpp, 0))
    od = optical_density(smooth, background(rgb))
    black = _black(od, mpp)
    ink = _ink(od, mpp) & ~black if with_ink else np.zeros_like(black)
    signal = od.max(axis=-1) - od.min(axis=-1)
    signal[ink | black] = 0
    return signal, ink, black


def _black(od: np.ndarray, mpp: float) -> np.ndarray:
    """Black borders, black ink: dense in all channels alike. Small spots may be pigment within tissue."""
    low, high = od.min(axis=-1), od.max(axis=-1)
    grey = high - low < 0.3 * high
    seeds = _without_small(grey & (low > 0.5), _MIN_BLACK_UM2 / mpp**2)
    return _grown(seeds, grey & (low > 0.15), mpp)


def _ink(od: np.ndarray, mpp: float) -> np.ndarray:
    """Blue, green and red ink. Haematoxylin, eosin and DAB absorb green at least as much as red; ink need not.

    Blue and green ink: red is absorbed clearly more than green. Red ink: green and blue nearly alike and dense, red
    hardly.
    """
    red, green, blue = np.moveaxis(od, -1, 0)
    total = red + green + blue
    excess = red - green
    dense = (excess > -0.03 * total) & (total > 1.7)  # blue ink over tissue, which absorbs green
    cold = (excess > 0.07 * total) & (total > 0.6)
    cold = _without_small(cold | dense, _MIN_INK_UM2 / mpp**2)
    warm = (green > 0.7) & (blue > 0.65 * green) & (red < 0.14 * green)
    warm |= (green > 1.0) & (blue > 0.6 * green) & (red < 0.35 * green)  # over tissue, which absorbs red
    pale_cold = dense | ((excess > 0.035 * total) & (total > 0.12))
    pale_warm = warm | ((green > 0.12) & (blue > 0.6 * green) & (red < 0.2 * green))
    return _grown(cold, pale_cold, mpp) | _grown(_without_small(warm, _MIN_INK_UM2 / mpp**2), pale_warm, mpp)


def _grown(seeds: np.ndarray, into: np.ndarray, mpp: float) -> np.ndarray:
    """Seeds, what of `into` is connected to them within a short way, and a margin."""
    if not seeds.any():
        return seeds
    reach, margin = (max(1, round(width / mpp)) for width in (_INK_REACH_UM, _INK_MARGIN_UM))
    near = ndimage.binary_dilation(seeds, _EIGHT, iterations=reach, mask=into | seeds)
    return ndimage.binary_dilation(near, disk(margin))


def _why_none(signal: np.ndarray, threshold: float, ink: np.ndarray, black: np.ndarray, options: TissueOptions) -> str:
    shares = [f"{name} covers {mask.mean():.0%}" for name, mask in (("ink", ink), ("black", black)) if mask.any()]
    found = f"the strongest signal is {signal.max():.3f}, the threshold {threshold:.3f}"
    small = f"or all pieces are smaller than {options.min_area_um2:g} um2"
    return "; ".join([found, *shares]) + f" ({small}); look at the slide, or lower --threshold or --min-area"
