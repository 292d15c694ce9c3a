"""Safe decoding of samples: images of any kind to uint8 of one size, classes, captions and latents.

``where`` identifies a sample in messages. It may be any object; ``str(where)`` is called only when something is wrong.

Plain JPEGs are decoded by simplejpeg and resized by torch's antialiased uint8 resize, which is twice as fast as Pillow.
Pillow decodes everything else (other formats, CMYK, images rotated by EXIF, damaged files). `adm_crop` is the resize
and crop of ADM (2105.05233): halve with a box filter while the image is at least twice the target size, then resize
with a bicubic filter, then crop the centre.
"""

import io
import math
import re
import struct
import threading
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_tdisent.errors import InputError

# Extensions of image files, with Pillow's name for each format. This is the only such list: raw data, shards and
# folders of generated images all use it. Members of shards get the first extension of their format. Formats whose
# decoder runs other programs, such as EPS, are excluded.
IMAGES = {
    "png": "PNG", "apng": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "webp": "WEBP",
    "avif": "AVIF", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF", "ppm": "PPM", "pgm": "PPM", "pbm": "PPM",
    "pnm": "PPM",
}  # fmt: skip
FORMATS = tuple(dict.fromkeys(IMAGES.values()))
SIGNATURE = re.compile(
    rb"(?P<png>\x89PNG\r\n\x1a\n)|(?P<jpg>\xff\xd8\xff)|(?P<webp>RIFF....WEBP)|(?P<gif>GIF8)|(?P<bmp>BM)"
    rb"|(?P<tif>II[*+]\0|MM\0[*+])|(?P<avif>....ftypavi[fs])|(?P<ppm>P[1-6]\s)",
    re.DOTALL,
)
LATENT = "latent.npy"
MAX_PIXELS = 89_478_485  # Pillow's limit; Pillow only warns above it, here a larger image is a bad sample
MODES = {1: "L", 3: "RGB"}

_FILTERS = threading.Lock()  # guards the warning filters, which all threads share

Members = Mapping[str, bytes]
Span = tuple[float, float]  # the values of black and of white


class BadSample(InputError):
    """A sample that cannot be used: its bytes have changed, or its content cannot be decoded."""


def image_type(content: bytes) -> str | None:
    """Return the extension that fits the first bytes of an image file; None if it is in none of `FORMATS`."""
    found = SIGNATURE.match(content)
    return found.lastgroup if found else None


def canonical(extension: str) -> str:
    """Return the first extension in `IMAGES` with the same format (``jpg`` for ``jpeg`` and ``jfif``)."""
    return next(first for first, form in IMAGES.items() if form == IMAGES[extension])


def open_image(content: bytes, where: object) -> Image.Image:
    """Return the first frame of an image file, upright (its EXIF orientation is applied).

    Raises `BadSample` if the content is empty, damaged, not an image, or larger than `MAX_PIXELS` (a decompression
    bomb).
    """
    if not content:
        raise BadSample(f"{where} cannot be decoded: the image has no bytes")
    try:
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF, unusual palettes, and size: _check_size checks that
            image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check_size(*image.size, where)
            sixteen = any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))
            form = image.format
            image.load()
            if form == "PPM" and image.mode == "I":  # Pillow has scaled the maximum value given in the file to 65535
                image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
                sixteen = False
            image.info["sixteen"] = sixteen
            return ImageOps.exif_transpose(image)
    except BadSample:
        raise
    except UnidentifiedImageError:
        raise BadSample(f"{where} cannot be decoded: not an image that Pillow knows") from None
    except Exception as error:  # on damaged files, Pillow's decoders raise almost any exception
        raise BadSample(f"{where} cannot be decoded: {type(error).__name__}: {error}") from None


def depth(image: Image.Image) -> str:
    """Return the value type of an opened image: ``8 bits``, ``16 bits``, ``integers of 32 bits`` or ``floats``."""
    if image.mode.startswith("I;16") or image.info.get("sixteen"):
        return "16 bits"
    return {"I": "integers of 32 bits", "F": "floats"}.get(image.mode, "8 bits")


def to_mode(image: Image.Image, mode: str, span: Span | None = None, where: object = "the image") -> Image.Image:
    """Convert an image to ``L`` (grey) or ``RGB``. Palettes are expanded, transparency is composited over white.

    Values that do not have 8 bits are scaled from ``span`` = (black, white) to 0 .. 255. The span of 16-bit values is
    0 .. 65535 if none is given, and always for 16-bit colour images. Raises `BadSample` for floats and 32-bit integers
    without a span, for another span of 16-bit colour, and for values that are not finite or outside the span.
    """
    if (kind := depth(image)) != "8 bits":
        image = _to_8_bits(image, kind, span, where)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert("RGB").convert(mode)


def _to_8_bits(image: Image.Image, kind: str, span: Span | None, where: object) -> Image.Image:
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):  # colour: Pillow kept the upper bytes only
        if span not in (None, (0, 65535)):
            raise BadSample(
                f"{where} has colours of 16 bits, which are read as 0 to 65535, not as {span[0]:g} to {span[1]:g}"
            )
        return image
    if span is None and kind != "16 bits":
        raise BadSample(
            f"{where} holds {kind}, and the values of black and white are unknown. Prepare it with --range LOW,HIGH, "
            "for example --range 0,1"
        )
    low, high = span or (0, 65535)
    wide = np.asarray(image, dtype=np.float64)
    if not np.isfinite(wide).all():
        raise BadSample(f"{where} holds {kind} that are not finite")
    if wide.size and (wide.min() < low or wide.max() > high):
        raise BadSample(
            f"{where} holds {kind} from {wide.min():g} to {wide.max():g}, outside of the range {low:g} to {high:g}"
        )
    return Image.fromarray(np.rint((wide - low) * (255 / (high - low))).astype(np.uint8))


def adm_crop(image: Image.Image, size: int, where: object = "the image") -> Image.Image:
    """Resize an image and crop its central size x size pixels, exactly as ADM's ``center_crop_arr``.

    Raises `BadSample` if the image is so narrow that the resized image would exceed `MAX_PIXELS`.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize(_scaled(*image.size, size, where), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _scaled(width: int, height: int, size: int, where: object) -> tuple[int, int]:
    scale = size / min(width, height)
    scaled = max(size, round(width * scale)), max(size, round(height * scale))
    _check_size(*scaled, where)
    return scaled


def _check_size(width: int, height: int, where: object) -> None:
    if width < 1 or height < 1:
        raise BadSample(f"{where} cannot be decoded: the image has {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadSample(
            f"{where} cannot be decoded: {width} x {height} pixels are more than {MAX_PIXELS:,}, a decompression bomb?"
        )


def decode_image(content: bytes, channels: int, size: int | None, where: object) -> Tensor:
    """Decode an image to uint8 (channels, H, W), with H = W = ``size`` if a size is given.

    Raises `BadSample` if it cannot be decoded.
    """
    pixels = _decode_jpeg(content, channels, where) if content[:3] == b"\xff\xd8\xff" else None
    if pixels is None:
        image = to_mode(open_image(content, where), MODES[channels], where=where)
        if size is not None and image.size != (size, size):
            image = adm_crop(image, size, where)
        array = np.array(image)
        return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)
    if size is not None and pixels.shape[:2] != (size, size):
        return _resize(pixels, size, where)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(content: bytes, channels: int, where: object) -> np.ndarray[Any, Any] | None:
    """Decode a plain upright JPEG to uint8 (H, W, channels). Return None if Pillow has to decode it."""
    if _may_be_rotated(content):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    _check_size(width, height, where)
    if space not in ("YCbCr", "Gray") or (space == "YCbCr" and channels == 1):  # colour to grey: with Pillow's weights
        return None
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(content, "RGB" if channels == 3 else "Gray")
        return pixels
    except ValueError:
        return None


def _may_be_rotated(content: bytes) -> bool:
    """Return whether a JPEG may not be upright: EXIF or XMP set an orientation, or its segments cannot be parsed."""
    if len(content) < 8192 and b"Exif\0\0" not in content and b"tiff:" not in content:  # faster than parsing segments
        return False
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], struct.unpack_from(">H", content, at + 2)[0]
        if marker == 0xDA:  # start of scan: no metadata follows
            return False
        if marker == 0xE1 and b"tiff:Orientation" in content[at : at + 2 + length]:  # XMP, which Pillow applies as well
            return True
        if marker == 0xE1 and content[at + 4 : at + 10] == b"Exif\0\0":
            exif = Image.Exif()
            try:
                exif.load(content[at + 4 : at + 2 + length])
                return bool(exif.get(0x0112, 1) != 1)
            except Exception:  # Pillow raises almost any exception on damaged EXIF
                return True
        at += 2 + length
    return True


def _resize(pixels: np.ndarray[Any, Any], size: int, where: object) -> Tensor:
    """Resize and crop as `adm_crop` does, but with torch's bicubic filter. Return uint8 (C, size, size).

    On photographs, the result differs from Pillow's by at most 0.004 grey levels on average at 256 pixels, and by at
    most 0.3 at 64 pixels (because of ``Image.reduce``).
    """
    if min(pixels.shape[:2]) >= 2 * size:
        image = Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])
        while min(image.size) >= 2 * size:
            width, height = image.size  # reduce(2) is 4 times as fast, and differs only in rounding once less
            half = (width // 2, height // 2)
            image = image.resize(half, Image.Resampling.BOX) if width % 2 or height % 2 else image.reduce(2)
        pixels = np.array(image).reshape(image.height, image.width, -1)
    height, width = pixels.shape[:2]
    width, height = _scaled(width, height, size, where)
    whole = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if whole.shape[-2:] != (height, width):
        whole = interpolate(whole, (height, width), mode="bicubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return whole[0, :, top : top + size, left : left + size]


def parse_class(content: bytes) -> int:
    """Return the class in the content of a ``cls`` member, 0 to 2^31 - 1; -1 for any other content."""
    digits = content.strip()
    return int(digits) if digits.isdigit() and len(digits) <= 10 and int(digits) < 2**31 else -1


def class_of(content: bytes) -> int:
    """Return the class in the content of a ``cls`` member; -1 if it is -1, which means no class.

    Raises `ValueError` for any other content.
    """
    label = parse_class(content)
    if label == -1 and content.strip() != b"-1":
        raise ValueError(f"the class {content[:20]!r} is not a number from 0 to {2**31 - 1:,}")
    return label


def picked(kinds: Collection[str]) -> str:
    """Return the extension of a sample's latent, or else of its image, among the extensions ``kinds``.

    Raises `ValueError` unless there is a latent or exactly one image.
    """
    found = [LATENT] if LATENT in kinds else [extension for extension in IMAGES if extension in kinds]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"has {len(found)} images ({', '.join(found)}), expected one: remove the others")
    there = sorted(kinds)
    members = ", ".join(there[:6]) + (f", .. ({len(there)} in all)" if len(there) > 6 else "")
    raise ValueError(
        f"has 0 images ({'/'.join(IMAGES)}), expected one; it has {members} (the extension begins at "
        "the first dot, so KEY in KEY.png must not contain a dot)"
    )


def parse_caption(content: bytes) -> str:
    """Return the text of a UTF-8 caption without byte order mark, with LF line ends, stripped of whitespace.

    Zero bytes at the end are removed, too. Raises `ValueError` if the content is not UTF-8.
    """
    try:
        text = content.rstrip(b"\0").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise ValueError(f"{'UTF-16' if utf16 else f'not UTF-8 (byte {error.start})'}; save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("not UTF-8, as it contains zero bytes; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def side_of(shape: Sequence[int]) -> int | None:
    """Return the side to which images of ``shape`` = (C, H, W) are cropped; None, for no crop, if H and W differ."""
    return shape[1] if shape[1] == shape[2] else None


@dataclass(frozen=True)
class Decoder:
    """Decode samples to images with ``channels`` (1 or 3) at ``size`` (None: as stored), or to latents.

    If ``classes``, the number of classes, is given, every sample must have a class in 0 .. classes - 1.
    """

    channels: int = 3
    size: int | None = None
    classes: int | None = None

    def __call__(self, members: Members, where: object) -> dict[str, Any]:
        """Return ``image`` uint8 (C, H, W) or ``latent`` float16 (2, 2, C, h, w), ``label`` and ``caption``.

        ``label`` is an int, -1 for none. ``caption`` is a str, and only there if the sample has one. The first axes of
        a latent are [original, flipped] x [mean, standard deviation]. Raises `BadSample`.
        """
        out: dict[str, Any] = {}
        try:
            kind = picked(members)
        except ValueError as error:
            raise BadSample(f"{where} {error}") from None
        if kind == LATENT:
            out["latent"] = self._latent(members[LATENT], where)
        else:
            out["image"] = decode_image(members[kind], self.channels, self.size, where)
        try:
            out["label"] = class_of(members["cls"]) if "cls" in members else -1
            if "txt" in members:
                out["caption"] = parse_caption(members["txt"])
        except ValueError as error:
            raise BadSample(f"{where} cannot be decoded: {error}") from None
        if self.classes is not None and not 0 <= out["label"] < self.classes:
            raise BadSample(
                f"{where} has the class {out['label']} (-1: none), the network knows {self.classes} classes "
                "(model.network.classes)"
            )
        return out

    @staticmethod
    def _latent(content: bytes, where: object) -> Tensor:
        stream = io.BytesIO(content)
        try:
            np.lib.format.read_magic(stream)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        except Exception as error:  # the header is a Python literal, whose parser raises many kinds of exceptions
            raise BadSample(f"{where} cannot be decoded: {LATENT}: {type(error).__name__}") from None
        values = content[stream.tell() :]
        sized = len(shape) == 5 and shape[:2] == (2, 2) and min(shape) > 0 and math.prod(shape) * 2 == len(values)
        if dtype != np.dtype("<f2") or not sized:
            raise BadSample(
                f"{where}: {LATENT} is {dtype} of shape {shape} in {len(values):,} bytes, expected float16 of shape "
                "(2, 2, C, h, w)"
            )
        array = np.frombuffer(values, "<f2").reshape(shape, order="F" if fortran else "C").copy()
        return torch.from_numpy(array)
