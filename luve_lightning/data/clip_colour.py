"""High dynamic range and wide gamut converted to the SDR picture that a player without either shows.

The light of a 1,000 cd/m2 display (ITU-R BT.2100: the PQ curve, or HLG with its system gamma of 1.2) is converted
to BT.709's primaries. Its largest component is rolled off to 203 cd/m2, BT.2408's reference white, by the curve of
ITU-R BT.2390 (section 5.4, the "EETF"), which changes nothing below its knee of about 88 cd/m2. The three
components keep their ratios, so hues stay. The result is encoded for a display of gamma 2.4 (ITU-R BT.1886). Only
transfer and primaries count among the metadata: equal pixels always give equal pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from luve_lightning.data.clip_container import Frames

Floats = NDArray[np.float32]

PEAK = 1000.0  # cd/m2 of the display that HDR is graded for
WHITE = 203.0  # cd/m2 of SDR white
GAMMA = 2.4
_ROWS = 128  # number of values converted at a time: a 4K frame as floats takes 100 MB

# To BT.709's primaries; the white point is D65 throughout. Rows: red, green, blue.
_TO_BT709 = {
    "bt709": np.eye(3),
    "bt2020": np.array(
        [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
    ),
    "display-p3": np.array(
        [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]]
    ),
}
_BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593])


class Colour(NamedTuple):
    """The coding of a picture, as far as it must be converted.

    Attributes:
        transfer: "smpte2084" (PQ), "arib-std-b67" (HLG), or "sdr".
        primaries: "bt709", "bt2020" or "display-p3".
    """

    transfer: str
    primaries: str


def to_sdr(image: NDArray[np.uint16], colour: Colour) -> Frames:
    """The SDR picture of one frame.

    Args:
        image: H x W x 3, full-range R'G'B' of 16 bits, as coded.
        colour: its coding.

    Returns:
        uint8 H x W x 3, BT.709.
    """
    shown = np.empty(image.shape, dtype=np.uint8)
    light = _light(colour.transfer)
    matrix = _TO_BT709[colour.primaries].T.astype(np.float32)
    for top in range(0, len(image), _ROWS):
        linear = light[image[top : top + _ROWS]]
        if colour.transfer == "arib-std-b67":
            linear *= _system_gain(linear)
        linear = np.maximum(linear @ matrix, 0)
        if colour.transfer != "sdr":
            linear *= _gain(linear.max(axis=2, keepdims=True))
        encoded = np.minimum(linear, 1) ** np.float32(1 / GAMMA)
        shown[top : top + _ROWS] = (encoded * 255 + 0.5).astype(np.uint8)
    return shown


@lru_cache(maxsize=3)
def _light(transfer: str) -> Floats:
    """Light of each of the 65,536 code values; 1 is SDR white."""
    code = np.arange(65536) / 65535
    if transfer == "sdr":
        light = code**GAMMA
    elif transfer == "smpte2084":
        light = _pq_light(code) / WHITE
    else:  # the scene light of HLG, which `_system_gain` turns into the display's
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12) * (PEAK / WHITE)
    return light.astype(np.float32)


def _system_gain(scene: Floats) -> Floats:
    """HLG's OOTF for a peak of 1,000 cd/m2: the luminance to the power 0.2 (ITU-R BT.2100, table 5)."""
    luminance = scene @ (_BT2020_LUMINANCE * (WHITE / PEAK)).astype(np.float32)
    return (luminance ** np.float32(0.2))[..., None]


def _gain(largest: Floats) -> Floats:
    """The factor for pixels with this largest component that rolls it off to at most 1."""
    gain = np.ones_like(largest)
    bright = largest > _knee_light()
    level = largest[bright]
    gain[bright] = _rolled_off(level) / level
    return gain


def _rolled_off(light: NDArray[np.floating]) -> NDArray[np.floating]:
    """BT.2390's Hermite spline above the knee, in PQ values relative to the source's peak."""
    peak = _pq_code(PEAK)
    top = _pq_code(WHITE) / peak
    knee = 1.5 * top - 0.5
    code = np.minimum(_pq_code(light * WHITE) / peak, 1)
    t = (code - knee) / (1 - knee)
    code = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    return _pq_light(code * peak) / WHITE


@lru_cache(maxsize=1)
def _knee_light() -> float:
    return float(_pq_light(1.5 * _pq_code(WHITE) - 0.5 * _pq_code(PEAK))) / WHITE


_M1, _M2, _C1, _C2, _C3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875


def _pq_light(code):  # type: ignore[no-untyped-def]  # floats or arrays of floats
    """cd/m2 of a PQ value in [0, 1] (SMPTE ST 2084)."""
    root = code ** (1 / _M2)
    return 10000 * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)


def _pq_code(light):  # type: ignore[no-untyped-def]
    """PQ value of a luminance in cd/m2."""
    power = (light / 10000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
