"""Images of all kinds against Pillow, numpy and ADM's code; damaged samples raise `BadSample` and nothing else.

The file is long because it makes every format, mode and kind of damage, with the same few functions.
"""

import io
import struct
import tarfile
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps, PngImagePlugin

from lightning_tdisent.data import decode
from lightning_tdisent.data.decode import MAX_PIXELS, BadSample, Decoder, adm_crop, decode_image


def by_pillow(*_):
    """Replace the fast decoder: Pillow has to decode every JPEG."""
    return


@pytest.fixture(params=["simplejpeg", "Pillow"])
def reader(request, monkeypatch):
    """Run the test with both JPEG decoders."""
    if request.param == "Pillow":
        monkeypatch.setattr(decode, "_decode_jpeg", by_pillow)
    return request.param


def scene(width, height, mode="RGB", seed=0):
    """Return a smooth image with edges and some noise."""
    rng = np.random.default_rng(seed)
    channels = len(mode)
    y, x = np.mgrid[:height, :width][..., None] / 40
    array = 127 + 80 * np.sin(x + np.arange(channels)) * np.cos(1.3 * y) + 40 * (x % 2 > 1) + rng.normal(0, 6, y.shape)
    pixels = np.clip(array + np.zeros(channels), 0, 255).astype(np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def encoded(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decoded(content, channels=3, size=None):
    """Decode to (H, W, channels) or (H, W)."""
    out = decode_image(content, channels, size, "train-0.tar: sample 7")
    assert out.dtype == torch.uint8
    assert out.shape[0] == channels
    array = out.permute(1, 2, 0).numpy()
    return array if channels == 3 else array[..., 0]


def error(a, b):
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))


# Pixels


@pytest.mark.parametrize("form", ["png", "webp", "bmp", "tiff"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 9), (17, 5), (64, 48)])
def test_lossless_images_come_back_as_they_were(form, width, height):
    image = scene(width, height)
    content = encoded(image, form, **({"lossless": True} if form == "webp" else {}))
    assert np.array_equal(decoded(content), np.asarray(image))
    assert np.array_equal(decoded(content, 1), np.asarray(image.convert("L")))
    if form != "webp":
        grey = scene(width, height, "L")
        assert np.array_equal(decoded(encoded(grey, form), 1), np.asarray(grey))
        assert np.array_equal(decoded(encoded(grey, form)), np.asarray(grey)[..., None].repeat(3, 2))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"quality": 30}, {"optimize": True, "restart_marker_rows": 1}]
)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 50), (50, 35), (128, 96)])
def test_a_jpeg_has_pillows_pixels(subsampling, options, width, height, reader):
    content = encoded(scene(width, height), "jpeg", subsampling=subsampling, **options)
    assert np.array_equal(decoded(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    assert np.array_equal(decoded(content, 1), np.asarray(Image.open(io.BytesIO(content)).convert("RGB").convert("L")))
    assert reader == "Pillow" or decode._decode_jpeg(content, 3, "") is not None


def test_a_grey_jpeg_and_one_with_trailing_bytes(reader):
    for content in (encoded(scene(33, 20, "L"), "jpeg"), encoded(scene(33, 20), "jpeg") + b"trailing" * 99):
        for channels, mode in ((1, "L"), (3, "RGB")):
            expected = Image.open(io.BytesIO(content)).convert("RGB").convert(mode)
            assert np.array_equal(decoded(content, channels), np.asarray(expected))


def test_sixteen_bits_are_scaled_to_eight():
    wide = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(wide / 257)
    content = encoded(Image.fromarray(wide), "png")
    assert content[24] == 16
    assert np.array_equal(decoded(content, 1), expected)
    assert np.array_equal(decoded(content), expected[..., None].repeat(3, 2))
    dark = encoded(Image.fromarray(np.full((2, 2), 200, np.uint16)), "png")
    assert (decoded(dark, 1) == 1).all()  # 200 of 65,535 is nearly black


def stored(array, form="tiff"):
    return encoded(Image.fromarray(np.asarray(array)), form)


def by_span(content, span, mode="L"):
    return np.asarray(decode.to_mode(decode.open_image(content, "x"), mode, span, "x"))


@pytest.mark.parametrize(("kind", "name"), [(np.float32, "floats"), (np.int32, "integers of 32 bits")])
def test_wide_values_are_scaled_by_the_given_range_and_never_by_their_maximum(kind, name):
    for value in (0, 1, 200, 70_000):
        with pytest.raises(
            BadSample, match=rf"x holds {name}, and the values of black and white are unknown.* --range"
        ):
            decode_image(stored(np.full((2, 2), value, kind)), 1, None, "x")
    dark = stored(np.full((2, 2), 1, kind))
    assert [int(by_span(dark, span).max()) for span in ((0, 1), (0, 255), (-1, 1), (0, 51))] == [255, 1, 255, 5]
    ramp = stored(np.arange(256, dtype=kind).reshape(16, 16))
    assert np.array_equal(by_span(ramp, (0, 255)).ravel(), np.arange(256))
    assert np.array_equal(by_span(ramp, (0, 65535)).ravel(), np.rint(np.arange(256) / 257))
    with pytest.raises(BadSample, match=r"from 0 to 255, outside of the range 0 to 1$"):
        by_span(ramp, (0, 1))
    with pytest.raises(BadSample, match="not finite"):
        by_span(stored(np.float32([[0, np.nan]])), (0, 1))


def test_sixteen_bit_values_that_use_fewer_bits():
    ramp = stored(np.arange(4096, dtype=np.uint16).reshape(64, 64), "png")
    assert np.array_equal(by_span(ramp, (0, 4095)).ravel(), np.rint(np.arange(4096) * (255 / 4095)))
    assert by_span(ramp, None).max() == 16
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.full((2, 2 * 3), 0x1234))

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0))
    colours = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode.depth(decode.open_image(colours, "x")) == "16 bits"
    assert (by_span(colours, None, "RGB") == 0x12).all()
    with pytest.raises(BadSample, match="colours of 16 bits, which are read as 0 to 65535, not as 0 to 4095"):
        by_span(colours, (0, 4095), "RGB")


@pytest.mark.parametrize("largest", [100, 255, 300, 4095, 65535])
def test_a_pgm_is_scaled_by_the_maximum_value_in_its_header(largest):
    values = np.linspace(0, largest, 5).round().astype(">u2" if largest > 255 else "u1")
    content = b"P5 5 1 %d\n" % largest + values.tobytes()
    for span in (None, (0, 1)):  # the span of other images does not matter
        assert error(by_span(content, span), values * (255 / largest)).max() <= 1
    assert decode.depth(decode.open_image(content, "x")) == "8 bits"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("gr\u00fcn".encode("utf-8-sig"), "gr\u00fcn"),
        (b"a\r\nb\r\n", "a\nb"),
        (b"a\rb", "a\nb"),
        (b" a cat \n\0", "a cat"),
        (b"\n \n", ""),
    ],
)
def test_captions_are_plain_text(content, expected):
    assert decode.parse_caption(content) == Decoder(1)({"png": PNG, "txt": content}, "x")["caption"] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a cat".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a cat".encode("utf-16-le"), "contains zero bytes"),
        ("caf\u00e9".encode("cp1252"), r"not UTF-8 \(byte 3\)"),
    ],
)
def test_captions_of_other_encodings_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        decode.parse_caption(content)
    with pytest.raises(BadSample, match=message):
        Decoder(1)({"png": PNG, "txt": content}, "x")


def test_one_bit_and_palettes():
    bits = np.random.default_rng(0).integers(0, 2, (9, 13)).astype(bool)
    assert np.array_equal(decoded(encoded(Image.fromarray(bits), "png"), 1), bits * 255)
    colours = np.random.default_rng(1).integers(0, 256, (7, 3), np.uint8)
    numbers = np.random.default_rng(2).integers(0, 7, (6, 11), np.uint8)
    image = Image.frombytes("P", (11, 6), numbers.tobytes())
    image.putpalette(colours.tobytes())
    for form in ("png", "gif"):
        assert np.array_equal(decoded(encoded(image, form)), colours[numbers])


def over_white(colour, alpha):
    return colour * (alpha / 255) + 255 * (1 - alpha / 255)


def test_transparency_is_composited_over_white():
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (12, 10, 4), np.uint8)
    expected = over_white(rgba[..., :3], rgba[..., 3:])
    for form in ("png", "webp"):
        content = encoded(Image.fromarray(rgba), form, **({"lossless": True, "exact": True} if form == "webp" else {}))
        assert error(decoded(content), expected).max() <= 1
    la = Image.merge("LA", [Image.fromarray(np.ascontiguousarray(rgba[..., k])) for k in (0, 3)])
    assert error(decoded(encoded(la, "png"), 1), over_white(rgba[..., 0], rgba[..., 3])).max() <= 1
    colours, alphas = rng.integers(0, 256, (5, 3), np.uint8), rng.integers(0, 256, (5,), np.uint8)
    numbers = rng.integers(0, 5, (8, 8), np.uint8)
    palette = Image.frombytes("P", (8, 8), numbers.tobytes())
    palette.putpalette(colours.tobytes())
    content = encoded(palette, "png", transparency=alphas.tobytes())
    assert error(decoded(content), over_white(colours[numbers], alphas[numbers][..., None])).max() <= 1
    content = encoded(palette, "png", transparency=3)
    assert np.array_equal(decoded(content), np.where(numbers[..., None] == 3, 255, colours[numbers]))
    for image, key in ((Image.new("RGB", (3, 3), (1, 2, 3)), (1, 2, 3)), (Image.new("L", (3, 3), 9), 9)):
        assert (decoded(encoded(image, "png", transparency=key)) == 255).all()


@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0,) * 4, (255,) * 3),
    ],
)
def test_cmyk(ink, colour, reader):
    """Pillow writes the inverted inks of Adobe, marked as such."""
    content = encoded(Image.new("CMYK", (16, 16), ink), "jpeg", quality=95)
    assert b"Adobe" in content
    assert error(decoded(content), colour).max() <= 3
    assert decode._decode_jpeg(content, 3, "") is None


def test_a_cmyk_photograph_equals_pillows(reader):
    content = encoded(scene(40, 30, "CMYK"), "jpeg")
    assert np.array_equal(decoded(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("form", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_used(form):
    frames = [Image.new("RGB", (20, 14), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    content = encoded(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "webp" else {})
    )
    assert Image.open(io.BytesIO(content)).n_frames == 3
    for name in ("png", "webp", "jpg"):  # the extension of the member does not matter
        out = Decoder(3)({name: content}, "x")["image"]
        assert out.shape == (3, 14, 20)
        assert (out.permute(1, 2, 0).numpy() == (255, 0, 0)).all()


# Orientation

TURNS = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # fmt: skip


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_an_image_is_turned_upright(turn, form, reader):
    exif = Image.Exif()
    exif[0x0112] = turn
    content = encoded(scene(24, 10), form, exif=exif, **({"lossless": True} if form == "webp" else {}))
    stored = Image.open(io.BytesIO(content))
    assert np.array_equal(decoded(content), TURNS[turn](np.asarray(stored.convert("RGB"))))
    assert np.array_equal(decoded(content), np.asarray(ImageOps.exif_transpose(stored).convert("RGB")))


def segment(marker, content):
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def tiff(order=b"II", magic=42, first=8, tag=0x0112, kind=3, count=1, value=6, entries=1):
    form = "<" if order == b"II" else ">"
    return order + struct.pack(f"{form}HI H HHII I", magic, first, entries, tag, kind, count, value, 0)


ODD_EXIF = {
    "empty": b"",
    "cut": tiff()[:9],
    "cut in the entry": tiff()[:15],
    "other order": tiff(b"XX"),
    "other magic": tiff(magic=43),
    "far": tiff(first=2**31),
    "many entries": tiff(entries=65535),
    "loop": tiff()[:-4] + struct.pack("<I", 8),
    "turn 0": tiff(value=0),
    "turn 9": tiff(value=9),
    "turn 65535": tiff(value=65535),
    "text": tiff(kind=2, count=4, value=0x00363636),
    "rational": tiff(kind=5, count=1, value=2**31),
    "kind 99": tiff(kind=99),
    "huge count": tiff(count=2**31),
    "no turn": tiff(tag=0x0100),
}


@pytest.mark.parametrize("odd", ODD_EXIF)
def test_unusual_exif_is_applied_as_pillow_does_or_is_a_bad_sample(odd, monkeypatch):
    content = encoded(scene(24, 10), "jpeg")
    content = content[:2] + segment(0xE1, b"Exif\0\0" + ODD_EXIF[odd]) + content[2:]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    except Exception:  # any exception: a sample is lost, not the run
        expected = None
    for _ in range(2):
        try:
            found = decoded(content)
        except BadSample:
            found = None
        assert np.array_equal(found, expected)
        monkeypatch.setattr(decode, "_decode_jpeg", by_pillow)


@pytest.mark.parametrize(
    "segments",
    [
        [segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='1' tiff:Orientation=\"6\"/>")],
        [segment(0xE1, b"Exif\0\0" + tiff(value=1)), segment(0xE1, b"Exif\0\0" + tiff(value=6))],
        [segment(0xE1, b"Exif\0\0" + tiff(tag=0x0100)), segment(0xE1, b"Exif\0\0" + tiff(value=6))],
        [segment(0xFE, b"a comment"), segment(0xE1, b"Exif\0\0" + tiff(b"MM", value=6 << 16))],
        [b"\xff\xff\xff" + segment(0xE1, b"Exif\0\0" + tiff())],
        [segment(0xE1, b"exif\0\0" + tiff())],
        [segment(0xED, b"Exif\0\0" + tiff())],
    ],
    ids=[
        "XMP",
        "two of which the first is upright",
        "two",
        "the other byte order",
        "fill bytes",
        "small letters",
        "another segment",
    ],
)
def test_both_decoders_rotate_alike(segments, monkeypatch):
    content = encoded(scene(24, 10), "jpeg")
    content = content[:2] + b"".join(segments) + content[2:]
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert np.array_equal(decoded(content), expected)
    monkeypatch.setattr(decode, "_decode_jpeg", by_pillow)
    assert np.array_equal(decoded(content), expected)


# Size


def center_crop_arr(image, size):
    """Crop exactly as the code of ADM's image_datasets.py."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


SIZES = [
    (64, 64), (65, 64), (64, 97), (127, 128), (128, 127), (129, 131), (500, 375), (333, 500), (1023, 700),
    (20, 31), (1, 1), (1, 40), (40, 1), (2, 3), (63, 400), (70, 700),
]  # fmt: skip


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("size", [63, 64])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_crop_equals_adms(width, height, size, mode):
    image = scene(width, height, mode)
    expected = center_crop_arr(image, size)
    assert np.array_equal(np.asarray(adm_crop(image, size)), expected)
    content = encoded(image, "png")
    whole = expected if (width, height) != (size, size) else np.asarray(image)
    assert np.array_equal(decoded(content, len(mode), size), whole)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("size", [63, 64])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_fast_resize_is_within_half_a_grey_level(width, height, size, mode):
    content = encoded(scene(width, height, mode), "jpeg", quality=92)
    fast = decoded(content, len(mode), size)
    difference = error(fast, center_crop_arr(Image.open(io.BytesIO(content)), size))
    assert fast.shape[:2] == (size, size)
    assert difference.mean() <= 0.5
    assert difference.max() <= 3


@pytest.mark.parametrize("size", [64, 256])
def test_real_photographs_are_resized_as_adm_does_it(size, prepared):
    """Measured on 20 photographs: mean 0.26, worst 0.77 grey levels at 64 pixels; 0.0035 and 0.009 at 256."""
    means, most = [], 0
    for file in sorted(prepared("imagenet-sample").glob("*.tar.gz")):
        with tarfile.open(file) as tar:
            for member in [m for m in tar if m.name.endswith("jpg")][::10]:
                content = tar.extractfile(member).read()
                image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
                difference = error(decoded(content, 3, size), center_crop_arr(image.convert("RGB"), size))
                means.append(difference.mean())
                most = max(most, difference.max())
    print(f"size {size}: {len(means)} photographs, mean {np.mean(means):.4f}, worst {max(means):.4f}, most {most:.0f}")
    assert len(means) == 20
    assert max(means) <= 1
    assert np.mean(means) <= 0.4
    assert most <= 4


@pytest.mark.parametrize("form", ["png", "jpeg"])
@pytest.mark.parametrize(("width", "height"), [(1, 3000), (3000, 1)])
def test_a_narrow_image_is_not_enlarged_beyond_the_limit(form, width, height, monkeypatch):
    """A file of a few hundred bytes with 1 x 65,500 pixels would need 13 GB at size 256; here the limit is 50,000."""
    content = encoded(Image.new("RGB", (width, height)), form)
    made, resize, interpolate = [], Image.Image.resize, decode.interpolate

    def watched(self, size, *rest, **options):
        made.append(size[0] * size[1])
        return resize(self, size, *rest, **options)

    def watched_too(whole, size, **options):
        made.append(size[0] * size[1])
        return interpolate(whole, size, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    monkeypatch.setattr(decode, "interpolate", watched_too)
    monkeypatch.setattr(decode, "MAX_PIXELS", 50_000)
    assert decoded(content).shape == (height, width, 3)
    with pytest.raises(BadSample, match=r"train-0.tar: sample 7 cannot be decoded"):
        decoded(content, 3, 16)  # 16 x 48,000
    assert max(made, default=0) <= 50_000


# With Pillow only


def test_pillow_alone_gives_the_same_results(monkeypatch):
    contents = [encoded(scene(w, h, m, w), "jpeg") for w, h in ((90, 60), (200, 161), (31, 40)) for m in ("RGB", "L")]
    cases = [(content, channels, size) for content in contents for channels in (1, 3) for size in (None, 32, 48)]
    before = [decoded(*case) for case in cases]
    monkeypatch.setattr(decode, "_decode_jpeg", by_pillow)
    for case, was in zip(cases, before, strict=True):
        now = decoded(*case)
        if case[2] is None:
            assert np.array_equal(now, was)
        assert error(now, was).mean() <= 0.5


# Damage


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width, height, rest=b""):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + rest


PIXELS = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
SMALL_JPEG = encoded(scene(16, 16), "jpeg")
SOF = SMALL_JPEG.index(b"\xff\xc0") + 5


def jpeg_header(width, height):
    return SMALL_JPEG[:SOF] + struct.pack(">HH", height, width) + SMALL_JPEG[SOF + 4 :]


GIF = encoded(Image.new("P", (4, 4)), "gif")
SQUARE = 9460  # its square is the first above the limit


@pytest.mark.parametrize(
    "content",
    [
        png_header(SQUARE, SQUARE, PIXELS),
        png_header(60000, 60000, PIXELS),
        png_header(2**31 - 1, 2**31 - 1, PIXELS),
        png_header(1, MAX_PIXELS + 1, PIXELS),
        jpeg_header(65000, 65000),
        jpeg_header(SQUARE, SQUARE),
        GIF[:6] + struct.pack("<HH", 65535, 65535) + GIF[10:],
        encoded(Image.new("RGB", (4, 4)), "bmp")[:18] + struct.pack("<ii", 60000, 60000) + bytes(100),
        b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16382).to_bytes(3, "little") * 2 + bytes(50),
    ],
    ids=["png", "png 60000", "png 2^31", "png thin", "jpeg 65000", "jpeg", "gif", "bmp", "webp"],
)
@pytest.mark.parametrize("size", [None, 64])
def test_a_bomb_is_refused_before_it_is_read(content, size, reader, monkeypatch):
    assert len(content) < 5000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was read"))
    start = time.perf_counter()
    with pytest.raises(BadSample, match=r"train-0.tar: sample 7 cannot be decoded") as refusal:
        decoded(content, 3, size)
    assert time.perf_counter() - start < 1
    assert "\n" not in str(refusal.value)


def test_a_bomb_of_text_is_refused():
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(70 * 2**20), 1))
    assert PngImagePlugin.MAX_TEXT_CHUNK < 70 * 2**20
    with pytest.raises(BadSample, match="sample 7 cannot be decoded"):
        decoded(png_header(1, 1, bomb + PIXELS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the image has no bytes"),
        (b"\0" * 100, "not an image that Pillow knows"),
        (b"just text", "not an image that Pillow knows"),
        (b"\xff\xd8\xff", "sample 7 cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n", "sample 7 cannot be decoded"),
        (png_header(0, 5, PIXELS), "sample 7 cannot be decoded"),
        (jpeg_header(0, 5), "sample 7 cannot be decoded"),
        (encoded(scene(9, 9), "png")[:-30], "sample 7 cannot be decoded"),
        (encoded(scene(40, 40), "webp")[:-30], "sample 7 cannot be decoded"),
        (encoded(scene(64, 64), "jpeg")[:-300], "sample 7 cannot be decoded"),
        (encoded(scene(64, 64), "jpeg", progressive=True)[:-300], "sample 7 cannot be decoded"),
    ],
    ids=[
        "no bytes",
        "zeros",
        "text",
        "jpeg mark",
        "png mark",
        "no width",
        "no width jpeg",
        "png",
        "webp",
        "jpeg",
        "progressive",
    ],
)
def test_content_that_is_not_an_image_is_named(content, message, reader):
    for channels, size in ((3, None), (1, 8)):
        with pytest.raises(BadSample, match=f"{message}") as refusal:
            decoded(content, channels, size)
        assert str(refusal.value).startswith("train-0.tar: sample 7 cannot be decoded: ")
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_off_anywhere_is_bad_or_complete(progressive, reader):
    """Only its last bytes, which hold no pixels, may be missing."""
    content = encoded(scene(40, 24), "jpeg", progressive=progressive)
    whole, bad = decoded(content), 0
    for length in range(0, len(content), 7):
        try:
            assert np.array_equal(decoded(content[:length]), whole)
        except BadSample:
            bad += 1
            continue
        assert length >= len(content) - 2
    assert bad >= len(content) // 7


@pytest.mark.parametrize(
    "image",
    [
        Image.new("LAB", (4, 4)),
        Image.fromarray(np.full((4, 4), np.nan, np.float32)),
        Image.fromarray(np.array([[np.inf, -np.inf], [1e30, -5]], np.float32)),
        Image.fromarray(np.array([[2**31 - 1, -(2**31)], [0, 70000]], np.int32)),
        Image.new("YCbCr", (4, 4)),
        Image.new("CMYK", (4, 4)),
    ],
    ids=lambda image: f"{image.mode} {image.getextrema()}"[:30],
)
def test_unusual_modes_are_converted_or_bad_samples(image):
    content = encoded(image, "tiff")
    for channels in (1, 3):
        try:
            assert decoded(content, channels).shape[:2] == image.size[::-1]
        except BadSample:
            continue


def test_no_image_file_starts_a_program(monkeypatch):
    """Pillow would run Ghostscript on PostScript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    with pytest.raises(BadSample):
        decoded(encoded(Image.new("RGB", (4, 4)), "eps"))


def corpus():
    exif = Image.Exif()
    exif[0x0112] = 6
    small, grey = scene(14, 11), scene(14, 11, "L")
    palette = small.quantize(9)
    turned, wide = small.rotate(90), Image.fromarray(np.ones((5, 6), np.uint16))
    several = {"save_all": True, "append_images": [turned]}
    form_of_each = [
        (
            "png",
            (small, {}),
            (grey, {}),
            (palette, {"transparency": bytes(range(9))}),
            (small, {"exif": exif}),
            (wide, {}),
        ),
        ("png", (grey.convert("1"), {}), (grey.convert("LA"), {}), (small, several), (small, {"dpi": (9, 9)})),
        ("jpeg", (small, {}), (grey, {}), (small, {"progressive": True, "exif": exif}), (small.convert("CMYK"), {})),
        ("jpeg", (small, {"xmp": b'<x tiff:Orientation="3"/>'}), (small, {"subsampling": "4:4:4"})),
        ("webp", (small, {}), (small, {"lossless": True, "exif": exif}), (small, several)),
        ("gif", (palette, {"save_all": True, "append_images": [palette.rotate(90)]})),
        *((form, (small.resize((16, 16)), {})) for form in ("bmp", "tiff", "ppm", "ico")),
    ]
    return [encoded(image, form, **options) for form, *images in form_of_each for image, options in images]


SOUND = corpus()
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6)


def repaired(content):
    """Return a PNG with corrected chunk checksums, so that the content of the chunks is parsed."""
    out, at = bytearray(content[:8]), 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if at + 12 + length > len(content):
            break
        out += chunk(bytes(content[at + 4 : at + 8]), bytes(content[at + 8 : at + 8 + length]))
        at += 12 + length
    return bytes(out + content[at:])


def survives(content, channels, size):
    try:
        out = decode_image(content, channels, size, "where")
    except BadSample as refusal:
        assert str(refusal).startswith("where")  # noqa: PT017
    else:
        assert out.dtype == torch.uint8
        assert out.shape[0] == channels
        assert size is None or out.shape[1:] == (size, size)


@settings(max_examples=500, deadline=None)
@given(
    content=st.sampled_from(SOUND), changes=CHANGES, keep=st.one_of(st.just(1.0), st.floats(0, 1)), flip=st.booleans(),
    channels=st.sampled_from([1, 3]), size=st.sampled_from([None, 1, 8, 30]),
)  # fmt: skip
def test_damaged_images_raise_nothing_but_bad_sample(content, changes, keep, flip, channels, size):
    changed = bytearray(content)
    for at, value in changes:
        place = int(at * len(changed))
        changed[place] = changed[place] ^ (1 << value % 8) if flip else value
    changed = bytes(changed[: max(1, int(keep * len(changed)))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "MAX_PIXELS", 2**20)  # a flip in a width must not cost a second
        for variant in (changed, repaired(changed)) if changed[:4] == b"\x89PNG" else (changed,):
            survives(variant, channels, size)
            if changed[:2] == b"\xff\xd8":
                patch.setattr(decode, "_decode_jpeg", by_pillow)
                survives(variant, channels, size)


STARTS = [
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"RIFF\xff\0\0\0WEBPVP8 ",
    b"BM",
    b"II*\0",
    b"%!PS",
    b"8BPS",
]


@settings(max_examples=300, deadline=None)
@given(
    start=st.sampled_from(STARTS),
    content=st.binary(max_size=200),
    channels=st.sampled_from([1, 3]),
)  # fmt: skip
def test_any_bytes_raise_nothing_but_bad_sample(start, content, channels):
    survives(start + content, channels, 8)


# Samples

PNG = encoded(Image.new("L", (2, 2), 7), "png")


def test_a_sample_has_its_label_and_caption():
    out = Decoder(1)({"png": PNG, "cls": b" 12\n", "txt": "größe".encode(), "json": b"{"}, "x")
    assert (out["label"], out["caption"], out["image"].tolist()) == (12, "größe", [[[7, 7], [7, 7]]])
    assert Decoder(1)({"webp": PNG}, "x")["label"] == -1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"cls": b"1"}, "x has 0 images"),
        ({"png": PNG, "jpg": PNG, "cls": b"1"}, "x has 2 images"),
        ({"jpg": PNG, "jpeg": PNG}, "x has 2 images"),
        ({"svg": PNG}, "x has 0 images"),
        ({"gif": PNG, "bmp": PNG}, "x has 2 images"),
        ({"png": PNG, "cls": b""}, "x cannot be decoded"),
        ({"png": PNG, "cls": b"cat"}, "x cannot be decoded"),
        ({"png": PNG, "cls": b"1.5"}, "x cannot be decoded"),
        ({"png": PNG, "cls": b"\xff"}, "x cannot be decoded"),
        ({"png": PNG, "cls": b"9" * 25}, "x"),
        ({"png": PNG, "cls": b"-" + b"9" * 25}, "x"),
        ({"png": PNG, "cls": b"9" * 5000}, "x cannot be decoded"),
        ({"png": PNG, "txt": b"\xff\xfe"}, "x cannot be decoded"),
    ],
)
def test_an_invalid_sample_is_bad(members, message):
    with pytest.raises(BadSample, match=f"^{message}"):
        Decoder(1)(members, "x")


@pytest.mark.parametrize("members", [{"png": PNG}, {"png": PNG, "cls": b"3"}, {"png": PNG, "cls": b"2"}])
def test_a_class_that_the_network_does_not_have_is_bad(members):
    label = int(members.get("cls", b"-1"))
    assert Decoder(1)(members, "x")["label"] == label
    assert Decoder(1, classes=4)({**members, "cls": b"3"}, "x")["label"] == 3
    if label == 2:
        assert Decoder(1, classes=3)(members, "x")["label"] == 2
    else:
        with pytest.raises(BadSample, match=rf"^x has the class {label} \(-1: none\), the network knows 3 "):
            Decoder(1, classes=3)(members, "x")


# Latents


def npy(array, **options):
    out = io.BytesIO()
    np.lib.format.write_array(out, array, **options)
    return out.getvalue()


def npy_header(header, version=1):
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header


LATENT = np.random.default_rng(0).normal(size=(2, 2, 4, 3, 5)).astype(np.float16)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_latent_round_trips(order):
    out = Decoder()({"latent.npy": npy(np.asarray(LATENT, order=order)), "cls": b"3"}, "x")
    assert torch.equal(out["latent"], torch.from_numpy(LATENT))
    assert out["label"] == 3
    assert "image" not in out


def shape(text):
    return npy_header(b"{'descr': '<f2', 'fortran_order': False, 'shape': (%s), }\n" % text)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"no array",
        npy(LATENT)[:-2],
        npy(LATENT.astype(np.float32)),
        npy(LATENT.astype(">f2")),
        npy(LATENT.view(np.uint16)),
        npy(LATENT[0]),
        npy(LATENT[:1]),
        npy(LATENT[:, :1]),
        npy(LATENT[..., None]),
        npy(np.float16(3).reshape(())),
        npy(np.array([{"a": 1}], object), allow_pickle=True),
        npy(np.zeros(3, [("a", "f2")])),
        shape(b"2, 2, 4, 100000000, 100000000"),
        shape(b"2, 2, 4, 10000000000000000000000, 1"),
        shape(b"2, 2, 4, -1, 5"),
        npy_header(b"(((("),
        npy_header(b"'''"),
        npy_header(b"{[]: 1}"),
        npy_header(b"(" * 3000),
        npy_header(b"{'shape': 3}"),
        npy_header(b"\xff" * 9, 2),
        npy_header(b"{}", 9),
    ],
)
def test_an_invalid_latent_is_bad(content):
    with pytest.raises(BadSample, match=r"^train-0.tar: sample 7") as refusal:
        Decoder()({"latent.npy": content}, "train-0.tar: sample 7")
    assert "latent.npy" in str(refusal.value)


@settings(max_examples=300, deadline=None)
@given(changes=CHANGES)
@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required:UserWarning")
def test_damaged_latents_raise_nothing_but_bad_sample(changes):
    content = bytearray(npy(LATENT))
    for at, value in changes:
        content[int(at * 128)] = value  # a byte of the header
    try:
        out = Decoder()({"latent.npy": bytes(content)}, "where")["latent"]
    except BadSample:
        return
    assert out.dtype == torch.float16
    assert out.shape[:2] == (2, 2)
