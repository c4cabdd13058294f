"""One way in for images: paths, URLs, bytes, file objects, PIL images and arrays become upright RGB images.

Whatever cannot be an image (missing, truncated, empty, absurdly large, of the wrong type) raises a
`ValueError` that names it. Pillow's process-wide settings (`LOAD_TRUNCATED_IMAGES`, `MAX_IMAGE_PIXELS`) are
left alone.
"""

import base64
import binascii
import io
import os
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

DEFAULT_MAX_PIXELS = 178_956_970  # where Pillow's own, unchanged, setting starts to refuse
MAX_DOWNLOAD_BYTES = 256 * 2**20
# A JPEG is decoded at 1/2, 1/4 or 1/8 only while this many times the target stays on both sides. Measured
# difference to the full decode, mean over the pixels at 224 and 364: photos, textures and scanned text at most
# 0.9 grey levels with 2, 0.5 with 3; full-contrast gratings and noise up to 4.9 with 2, at most 0.9 with 3.
DRAFT_MARGIN = 3
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageSource = Any  # str | os.PathLike | bytes | binary file object | PIL.Image.Image | array or tensor
Box = tuple[float, float, float, float]


def load_image(
    source: ImageSource,
    *,
    target_size: tuple[int, int] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    timeout: float = 20.0,
) -> Image.Image:
    """Load any kind of image as an upright PIL image of mode RGB.

    Transparency is composited on white, the EXIF orientation applied, of an animation the first frame taken.
    A PIL image is never modified; it is returned as it is if it already is upright RGB.

    Grey levels: 16-bit images are divided by 257 (65535 becomes 255). 32-bit integer images (mode I) with no
    value above 255 are taken as they are, up to 65535 as 16-bit. Floating-point images and arrays must lie in
    [0, 1]. Integer arrays must lie in [0, 255], except uint16, which is 16-bit. Arrays are HW, HWC or CHW
    with 1, 3 or 4 channels; HWC where both readings are possible.

    Args:
        source: path, http(s) or data URL, bytes, binary file object, PIL image, NumPy array or tensor.
        target_size: (height, width) that the image is going to be resized to. Lets a large JPEG be decoded at
            1/2, 1/4 or 1/8 of its size, at least `DRAFT_MARGIN` times the target; after resizing it is within
            one grey level of the full decode on average. Without it every pixel is decoded.
        max_pixels: images with more pixels are refused undecoded (Pillow's own limit stays in force).
        timeout: seconds after which a URL is given up.

    Raises:
        ValueError: anything that is not a readable image; the message names the source and the reason.
    """
    if target_size is not None:
        _check_target_size(target_size)
    with _opened(source, max_pixels, timeout) as image:
        rgb, _ = _upright_rgb(image, _draft(image, source, target_size, whole_pixels=True))
        return rgb


def load_image_for_resize(
    source: ImageSource,
    target_size: tuple[int, int],
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    timeout: float = 20.0,
) -> tuple[Image.Image, Box | None]:
    """As `load_image`, but also for JPEGs whose size is no multiple of the reduction.

    Returns the image and the region of it that holds the picture (left, upper, right, lower; in fractions of
    pixels), to be given as `box` to `Image.resize`; None for the whole. Without it the picture would shift by
    up to a pixel.
    """
    _check_target_size(target_size)
    with _opened(source, max_pixels, timeout) as image:
        return _upright_rgb(image, _draft(image, source, target_size, whole_pixels=False))


def load_image_for_crop(
    source: ImageSource,
    choose_crop: Callable[[int, int], Box],
    target_size: tuple[int, int] | None,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    timeout: float = 20.0,
) -> tuple[Image.Image, Box]:
    """As `load_image`, for a crop that is going to be resized, decoding no finer than that needs.

    Args:
        choose_crop: called once, with width and height of the upright picture before it is decoded; gives the
            crop (left, upper, right, lower) in its pixels.
        target_size: (height, width) that the crop is going to be resized to. A large JPEG is decoded so that at
            least `DRAFT_MARGIN` times as many pixels of the crop remain on both sides. None: every pixel.

    Returns:
        The image (of the whole picture) and the crop in its pixels, to be given as `box` to `Image.resize`.

    Raises:
        ValueError: as `load_image`.
    """
    if target_size is not None:
        _check_target_size(target_size)
    with _opened(source, max_pixels, timeout) as image:
        width, height = image.size if _orientation(image) < 5 else image.size[::-1]
        left, upper, right, lower = choose_crop(width, height)
        whole_size = None
        if target_size is not None:  # what resizing the whole picture as much as the crop would give
            whole_size = (target_size[0] * height / (lower - upper), target_size[1] * width / (right - left))
        rgb, region = _upright_rgb(image, _draft(image, source, whole_size, whole_pixels=False))
        x, y, x_end, y_end = region or (0, 0, *rgb.size)
        x_scale, y_scale = (x_end - x) / width, (y_end - y) / height  # 1, 1/2, 1/4 or 1/8
        return rgb, (x + left * x_scale, y + upper * y_scale, x + right * x_scale, y + lower * y_scale)


def array_to_image(array: Any, *, channels: str | None = None) -> Image.Image:
    """An array or tensor as an RGB image (rules in `load_image`).

    Args:
        array: HW, HWC or CHW.
        channels: "channels_first" or "channels_last" where the shape does not tell.
    """
    array = to_numpy(array)
    highest = 65535 if array.dtype == np.uint16 else 255
    pixels = _to_8_bit(to_channels_last(array, channels), highest, f"an array of shape {array.shape}")
    if pixels.shape[2] == 1:
        return Image.fromarray(pixels[:, :, 0]).convert("RGB")
    return convert_to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as RGB, transparency on white; the same object if it already is.

    Raises:
        ValueError: a value outside the mode's documented range, or a mode without a way to RGB.
    """
    if image.mode.startswith("I") or image.mode == "F":
        pixels = _transparent_to_white(image)
        highest = 255 if image.mode == "I" and pixels.max() <= 255 else 65535
        return Image.fromarray(_to_8_bit(pixels, highest, f"one of mode {image.mode}")).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def is_array(source: Any) -> bool:
    """Whether `source` is an array or, as a tensor does, turns into one; a PIL image is not."""
    return hasattr(source, "__array__") and not isinstance(source, Image.Image)


def to_numpy(array: Any) -> np.ndarray:
    """An array or tensor (of any device) as a NumPy array; bfloat16, which NumPy lacks, as float32."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        if array.is_floating_point():
            array = array.float()
    return np.asarray(array)


def to_channels_last(array: np.ndarray, channels: str | None) -> np.ndarray:
    """An HW, HWC or CHW array as HWC with 1, 3 or 4 channels; `channels` as in `array_to_image`."""
    if channels not in (None, "channels_first", "channels_last"):
        raise ValueError(f"channels must be 'channels_first' or 'channels_last', got {channels!r}")
    shape = array.shape
    if 0 in shape:
        raise ValueError(f"cannot load image from an array of shape {shape}: an image needs at least one pixel")
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim == 3 and channels != "channels_first" and shape[2] in (1, 3, 4):
        return array
    if array.ndim == 3 and channels != "channels_last" and shape[0] in (1, 3, 4):
        return array.transpose(1, 2, 0)
    raise ValueError(
        f"cannot load image from an array of shape {shape}: expected (height, width), (height, width, "
        "channels) or (channels, height, width) with 1, 3 or 4 channels"
    )


@contextmanager
def _opened(source: ImageSource, max_pixels: int, timeout: float) -> Iterator[Image.Image]:
    """The image, if possible undecoded; what goes wrong meanwhile becomes a `ValueError` that names the source."""
    if is_array(source):
        yield array_to_image(source)
        return
    name = _describe(source)
    try:
        if isinstance(source, Image.Image):
            _check_size(source, max_pixels)
            yield source
        else:
            with Image.open(_open_source(source, timeout)) as image:
                _check_size(image, max_pixels)
                yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot load image {name}: not an image of a format that Pillow can read") from error
    except FileNotFoundError as error:
        raise ValueError(f"cannot load image {name}: no such file") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more on corrupt data
        raise ValueError(f"cannot load image {name}: {error or type(error).__name__}") from error


def _describe(source: ImageSource) -> str:
    if isinstance(source, str):
        return repr(source if len(source) <= 200 else source[:60] + "…")
    if isinstance(source, os.PathLike):
        return repr(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"from {len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"(PIL image of mode {source.mode}, {source.width}x{source.height})"
    name = getattr(source, "name", None)
    return repr(name) if isinstance(name, str) else f"from an object of type {type(source).__name__}"


def _open_source(source: ImageSource, timeout: float) -> Path | io.BytesIO:
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return io.BytesIO(_download(source, timeout))
    if isinstance(source, str) and source.lower().startswith("data:"):
        return io.BytesIO(_decode_data_url(source))
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            raise ValueError("it is a folder, not an image file")
        return path
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        content = source.read()
        if not isinstance(content, bytes):
            raise ValueError(f"the file object gives {type(content).__name__}; open it in binary mode")
        return io.BytesIO(content)
    raise ValueError(
        "expected a path, an http(s) or data URL, bytes, a binary file object, a PIL image, an array or a "
        f"tensor, got {type(source).__name__}"
    )


def _download(url: str, timeout: float) -> bytes:
    # Spaces and letters outside ASCII, as people paste them, are not allowed in a request line.
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    # Some sites refuse urllib's own name.
    request = urllib.request.Request(quoted, headers={"User-Agent": "blip2_hf"})
    deadline = time.monotonic() + timeout
    chunks: list[bytes] = []
    received = 0
    with urllib.request.urlopen(request, timeout=timeout) as response:
        while chunk := response.read1(2**16):
            chunks.append(chunk)
            received += len(chunk)
            if received > MAX_DOWNLOAD_BYTES:
                raise ValueError(f"the download exceeds {MAX_DOWNLOAD_BYTES} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"the download took longer than timeout={timeout} seconds")
        if response.length:  # bytes that the server announced and did not send
            raise ValueError(f"the connection broke off {response.length} bytes before the end")
    return b"".join(chunks)


def _decode_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ValueError("a data URL must have a comma before its data")
    content = urllib.parse.unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return content
    try:
        return base64.b64decode(content.translate(None, b" \t\r\n"), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URL is not valid base64 ({error})") from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"its size is {width}x{height}; an image needs at least one pixel")
    if width * height > max_pixels:
        raise ValueError(f"its {width}x{height} pixels are more than max_pixels={max_pixels}")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 2 to 8, or 1 for upright, which is also taken for anything unreadable."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken metadata does not make the picture unreadable
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _check_target_size(target_size: tuple[int, int]) -> None:
    if len(target_size) != 2 or min(target_size) < 1:
        raise ValueError(f"target_size must be (height, width), both at least 1, got {target_size!r}")


def _draft(
    image: Image.Image, source: ImageSource, target_size: tuple[float, float] | None, whole_pixels: bool
) -> Box | None:
    """Tell the JPEG decoder to decode at reduced size; return the part that the picture fills, if not all."""
    # a PIL image that was given is not modified
    if target_size is None or image is source or image.format not in ("JPEG", "MPO"):
        return None
    width, height = image.size
    target_height, target_width = target_size if _orientation(image) < 5 else target_size[::-1]
    spare = min(width / target_width, height / target_height) / DRAFT_MARGIN
    for scale in (8, 4, 2):
        divides = width % scale == 0 and height % scale == 0
        if scale <= spare and (divides or not whole_pixels):
            image.draft(None, (width // scale, height // scale))
            return None if divides else (0.0, 0.0, width / scale, height / scale)
    return None


def _upright_rgb(image: Image.Image, box: Box | None = None) -> tuple[Image.Image, Box | None]:
    orientation = _orientation(image)
    width, height = image.size
    rgb = convert_to_rgb(image)
    rgb.load()
    if orientation == 1:
        return rgb, box
    rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info = {}  # the orientation in it is used up
    return rgb, None if box is None else _upright_box(box, orientation, width, height)


def _upright_box(box: Box, orientation: int, width: int, height: int) -> Box:
    """Where `box` of a width x height image lies after the transposition for `orientation`."""
    left, upper, right, lower = box
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        upper, lower = height - lower, height - upper
    return (left, upper, right, lower) if orientation < 5 else (upper, left, lower, right)


def _transparent_to_white(image: Image.Image) -> np.ndarray:
    """Pixels of a 16-bit, 32-bit or float image, those of a PNG's transparent grey level set to white."""
    pixels = np.asarray(image)
    level = image.info.get("transparency")
    if isinstance(level, int) and image.mode.startswith("I;16"):
        pixels = np.where(pixels == level, 65535, pixels).astype(np.uint16)
    return pixels


def _to_8_bit(pixels: np.ndarray, highest: int, name: str) -> np.ndarray:
    """Any type of number as uint8; integers run up to `highest` (255 or 65535), floats up to 1."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "uif":
        raise ValueError(f"cannot load image from {name}: expected numbers, got values of type {pixels.dtype}")
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f":
        if not (low >= -1e-5 and high <= 1 + 1e-5):  # written so that NaN fails too
            raise ValueError(f"cannot load image from {name}: floats must lie in [0, 1], got [{low}, {high}]")
        return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    if low < 0 or high > highest:
        raise ValueError(f"cannot load image from {name}: values must lie in [0, {highest}], got [{low}, {high}]")
    if highest == 255:
        return pixels.astype(np.uint8)
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
