"""Every kind of image becomes upright RGB; everything else is an error that names it."""

import base64
import io
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from blip2_hf.image_loading import array_to_image, load_image
from tiny_images import encoded, exif_with, photo

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def pixels_of(source, **options) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


# -- sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["path", "string", "bytes", "bytearray", "file", "data URL", "pil", "array", "tensor"])
def test_every_form_of_source_gives_the_same_pixels(form: str, tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    content = encoded(image)
    path = tmp_path / "a b ü.png"
    path.write_bytes(content)
    source = {
        "path": path,
        "string": str(path),
        "bytes": content,
        "bytearray": bytearray(content),
        "file": io.BytesIO(content),
        "data URL": "data:image/png;base64," + base64.b64encode(content).decode(),
        "pil": image,
        "array": PIXELS,
        "tensor": torch.from_numpy(PIXELS).permute(2, 0, 1),
    }[form]
    assert np.array_equal(pixels_of(source), PIXELS)


def test_data_url_without_base64() -> None:
    svg_like = "data:image/x-portable-graymap,P2%201%201%20255%20200"
    assert pixels_of(svg_like).tolist() == [[[200, 200, 200]]]


def test_pil_image_is_not_modified_and_rgb_not_copied() -> None:
    image = Image.fromarray(PIXELS)
    assert load_image(image) is image
    rotated = Image.open(io.BytesIO(encoded(image, exif=exif_with(6))))
    load_image(rotated)
    assert rotated.size == (30, 20) and rotated.getexif()[0x0112] == 6
    palette = image.convert("P")
    load_image(palette)
    assert palette.mode == "P"


def test_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(PIXELS)))
    image = load_image(path)
    assert getattr(image, "fp", None) is None
    assert np.array_equal(np.asarray(image.resize((30, 20))), PIXELS)


# -- http --------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = encoded(Image.fromarray(PIXELS))
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/image.png")
            self.end_headers()
            return
        if self.path == "/missing.png":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.path == "/short.png":
            self.wfile.write(content[: len(content) // 2])
        elif self.path == "/silent.png":
            time.sleep(1)
        elif self.path == "/slow.png":
            for byte in content[:30]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.03)
        elif self.path == "/page.html":
            self.wfile.write(b"<html>".ljust(len(content)))
        else:
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        pass  # a client that gives up is part of the test


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    instance = QuietServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{instance.server_port}"
    instance.shutdown()
    thread.join()
    instance.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize("path", ["/image.png", "/moved", "/with space ü.png", "/image.png?a=1&b=%20#c"])
def test_url(server: str, path: str) -> None:
    assert np.array_equal(pixels_of(server + path), PIXELS)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing.png", "404"),
        ("/short.png", "broke off|IncompleteRead"),
        ("/silent.png", "timed out"),
        ("/slow.png", "longer than timeout=0.2"),
        ("/page.html", "not an image"),
    ],
)
def test_bad_url_is_named(server: str, path: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{path}.*({reason})"):
        load_image(server + path, timeout=0.2)


def test_unreachable_host() -> None:
    with pytest.raises(ValueError, match="http://127.0.0.1:9/a.png"):
        load_image("http://127.0.0.1:9/a.png", timeout=1)


# -- modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_without_transparency(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    assert np.array_equal(pixels_of(image), np.asarray(image.convert("RGB")))


def test_transparency_is_white() -> None:
    alpha = np.array([[0, 255, 128]], dtype=np.uint8)
    black = np.zeros((1, 3), dtype=np.uint8)
    expected = np.repeat(np.array([[[255], [0], [127]]]), 3, axis=-1)
    rgba = Image.fromarray(np.stack([black, black, black, alpha], axis=-1))
    la = Image.merge("LA", (Image.fromarray(black), Image.fromarray(alpha)))
    for image in (rgba, la, rgba.convert("RGBa"), Image.open(io.BytesIO(encoded(rgba)))):
        assert np.abs(pixels_of(image).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_transparent_palette_entry_is_white(kind: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    content = encoded(image, kind, transparency=1)
    assert pixels_of(content).tolist() == [[[200, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (7, 7, 7))])
def test_transparent_colour_of_a_png_is_white(mode: str, colour) -> None:
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((0, 0), 9 if mode == "L" else (9, 9, 9))
    content = encoded(image, transparency=colour)
    assert pixels_of(content).tolist() == [[[9, 9, 9], [255, 255, 255]]]


@pytest.mark.parametrize("big_endian", [False, True])
def test_16_bit_is_scaled_not_clipped(big_endian: bool) -> None:
    levels = np.array([[0, 257, 25700, 65535, 128, 129]], dtype=np.uint16)
    image = Image.fromarray(levels)
    if big_endian:
        image = Image.frombytes("I;16B", (6, 1), levels.astype(">u2").tobytes())
    expected = [0, 1, 100, 255, 0, 1]
    assert pixels_of(image)[0, :, 0].tolist() == expected
    assert pixels_of(levels)[0, :, 1].tolist() == expected
    if not big_endian:
        assert pixels_of(encoded(image))[0, :, 2].tolist() == expected  # a 16-bit PNG
        assert pixels_of(encoded(image, "TIFF"))[0, :, 2].tolist() == expected


def test_32_bit_integers() -> None:
    assert pixels_of(Image.fromarray(np.array([[0, 200]], dtype=np.int32)))[0, :, 0].tolist() == [0, 200]
    assert pixels_of(Image.fromarray(np.array([[0, 65535]], dtype=np.int32)))[0, :, 0].tolist() == [0, 255]
    for level in (-1, 65536):
        with pytest.raises(ValueError, match="mode I.*must lie in"):
            load_image(Image.fromarray(np.array([[0, level]], dtype=np.int32)))


def test_floats() -> None:
    assert pixels_of(Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)))[0, :, 0].tolist() == [0, 128, 255]
    for level in (1.5, -0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"floats must lie in \[0, 1\]"):
            load_image(Image.fromarray(np.array([[0, level]], dtype=np.float32)))
        with pytest.raises(ValueError, match=r"array of shape \(1, 2\).*floats must lie in \[0, 1\]"):
            load_image(np.array([[0, level]]))


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels_of(content)[0, 0].tolist() == [255, 0, 0], kind


# -- arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64, np.float16])
def test_layouts_and_types_of_arrays(dtype: type) -> None:
    array = PIXELS.astype(dtype) / 255 if np.issubdtype(dtype, np.floating) else PIXELS.astype(dtype)
    array = array.astype(dtype)
    tolerance = 1 if dtype is np.float16 else 0
    for layout in (array, array.transpose(2, 0, 1), np.ascontiguousarray(array.transpose(2, 0, 1))):
        assert np.abs(pixels_of(layout).astype(int) - PIXELS).max() <= tolerance
    for grey in (array[:, :, 0], array[:, :, :1], array[:, :, 0][None]):
        assert np.abs(pixels_of(grey).astype(int) - PIXELS[:, :, :1]).max() <= tolerance


def test_arrays_of_bool_alpha_and_bfloat16() -> None:
    assert pixels_of(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]
    assert pixels_of(np.array([[[0, 0, 0, 0], [1, 2, 3, 255]]], dtype=np.uint8)).tolist() == [[[255] * 3, [1, 2, 3]]]
    tensor = torch.ones(3, 2, 5, dtype=torch.bfloat16, requires_grad=True)
    assert pixels_of(tensor).shape == (2, 5, 3)


def test_ambiguous_layout() -> None:
    array = RNG.integers(0, 256, (3, 7, 3), dtype=np.uint8)
    assert np.array_equal(pixels_of(array), array)
    first = array_to_image(array, channels="channels_first")
    assert np.array_equal(np.asarray(first), array.transpose(1, 2, 0))
    with pytest.raises(ValueError, match="channels must be"):
        array_to_image(array, channels="first")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 5), np.uint8),
        np.zeros((3,), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((2, 2, 3, 3), np.uint8),
        np.full((2, 2), 256),
        np.full((2, 2), -1),
        np.full((2, 2), "a"),
        np.full((2, 2), 1j),
    ],
)
def test_bad_arrays(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="cannot load image from an array of shape"):
        load_image(array)


# -- orientation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int) -> None:
    content = encoded(Image.fromarray(PIXELS), exif=exif_with(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    image = load_image(content)
    assert np.array_equal(np.asarray(image), expected)
    assert np.array_equal(np.asarray(load_image(image)), expected)
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(image)), expected)
    opened = load_image(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(opened), expected)
    assert np.array_equal(np.asarray(load_image(opened)), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_no_error() -> None:
    content = encoded(photo(40, 30), "JPEG", exif=b"Exif\x00\x00MM\x00*garbage" + bytes(20))
    assert pixels_of(content).shape == (30, 40, 3)
    assert pixels_of(encoded(Image.fromarray(PIXELS), exif=exif_with(77))).shape == (20, 30, 3)


# -- bad files -----------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG with a header of any size and hardly any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


BAD_FILES: dict[str, Callable[[], bytes]] = {
    "truncated.png": lambda: encoded(photo(200, 200))[:-2000],
    "truncated.jpg": lambda: encoded(photo(200, 200), "JPEG")[:-2000],
    "truncated.gif": lambda: encoded(photo(200, 200), "GIF")[:-2000],
    "truncated.webp": lambda: encoded(photo(200, 200), "WEBP")[:-2000],
    "truncated.bmp": lambda: encoded(photo(200, 200), "BMP")[:-2000],
    "truncated.tif": lambda: encoded(photo(200, 200), "TIFF")[:-2000],
    "header_only.jpg": lambda: encoded(photo(200, 200), "JPEG")[:200],
    "empty.jpg": lambda: b"",
    "text.jpg": lambda: b"this is no image",
    "zeros.png": lambda: bytes(1000),
    "1x0.png": lambda: png(1, 0),
    "0x0.png": lambda: png(0, 0),
    "1x0.ppm": lambda: b"P6 1 0 255 ",
    "no_pixels.png": lambda: png(100, 100),
    "bomb.png": lambda: png(30_000, 30_000),
    "large.png": lambda: png(13_380, 13_380),
    "huge.png": lambda: png(2**31 - 1, 2**31 - 1),
    "vector.svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_a_value_error_that_names_it(name: str, tmp_path: Path) -> None:
    settings = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name]())
    for options in ({}, {"target_size": (8, 8)}):
        with pytest.raises(ValueError, match=name):
            load_image(path, **options)
    with pytest.raises(ValueError, match=f"from {path.stat().st_size} bytes"):
        load_image(path.read_bytes())
    assert settings == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)


def test_max_pixels() -> None:
    content = encoded(Image.fromarray(PIXELS))
    assert load_image(content, max_pixels=600).size == (30, 20)
    for source in (content, Image.fromarray(PIXELS)):
        with pytest.raises(ValueError, match="30x20 pixels are more than max_pixels=599"):
            load_image(source, max_pixels=599)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.jpg.*no such file"):
        load_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)


@pytest.mark.parametrize("source", [None, 3, {"path": "a.png"}, ["a.png"], object()])
def test_wrong_types_are_named(source) -> None:
    with pytest.raises(ValueError, match=f"got {type(source).__name__}"):
        load_image(source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (io.StringIO("text"), "binary mode"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png", "comma"),
        (Image.new("RGB", (0, 5)), "at least one pixel"),
    ],
)
def test_other_bad_sources(source, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_image(source)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (12_000, 2), (2, 2)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    for kind in ("PNG", "JPEG"):
        image = load_image(encoded(Image.new("RGB", size, "red"), kind), target_size=(224, 224))
        assert image.size == size
        assert np.asarray(image.resize((224, 224), 3)).shape == (224, 224, 3)
