"""Pictures: everything in a scene can be seen in them, at any size, and maps say where."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from blip2_hf.data.shapes.drawing import owners, patch_owners, picture, render
from blip2_hf.data.shapes.scenes import COLOURS, SHAPES, SIDE, SIZES, TEXTURES, Scene, Thing, draw_scene

CROP = 36  # px, more than the largest thing
KINDS = [
    (shape, colour, size, texture, side)
    for shape in SHAPES
    for colour in COLOURS
    for size in SIZES
    for texture in TEXTURES
    for side in SIZES[size]
]


def scene(*things: Thing, background: int = 0) -> Scene:
    return Scene(things, background)


def crop(kind: tuple, x: int, y: int, background: int) -> np.ndarray:
    """The thing in the middle of its surroundings: float32 [CROP * CROP * 3]."""
    half = CROP // 2
    pixels = picture(scene(Thing(*kind[:4], x, y, kind[4]), background=background))
    return pixels[y - half : y + half, x - half : x + half].astype(np.float32).ravel()


def test_every_kind_of_thing_is_told_apart_on_any_background() -> None:
    rng = np.random.default_rng(0)
    templates = np.stack([crop(kind, 48, 48, 1) for kind in KINDS])
    wrong = []
    for kind in KINDS[::9]:
        x, y = rng.integers(CROP // 2, SIDE - CROP // 2, size=2).tolist()
        found = KINDS[np.abs(templates - crop(kind, x, y, int(rng.integers(2, 1000)))).sum(axis=1).argmin()]
        if found[:4] != kind[:4]:
            wrong.append((kind, found))
    assert not wrong


def test_pictures_are_a_function_of_the_scene() -> None:
    rng = np.random.default_rng(3)
    scenes = [draw_scene(rng) for _ in range(5)]
    first = [picture(one) for one in scenes]
    assert all(np.array_equal(pixels, picture(one)) for pixels, one in zip(first, scenes, strict=True))
    assert not np.array_equal(first[0], picture(Scene(scenes[0].things, scenes[0].background + 1)))


def test_the_shipped_checkpoints_were_trained_on_these_scenes() -> None:
    rng = np.random.default_rng(4)
    scenes = [draw_scene(rng) for _ in range(8)]
    digest = hashlib.blake2b(repr(scenes).encode(), digest_size=8)
    assert digest.hexdigest() == "13401870cd03e54c"
    for one in scenes:
        digest.update(owners(one).tobytes())
    assert digest.hexdigest() == "4f54cb19fb75df4f"


def test_an_image_is_rgb_of_the_side_asked_for() -> None:
    image = render(draw_scene(np.random.default_rng(0)), 64)
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (64, 64))


@pytest.mark.parametrize("side", [64, 112, 384])
def test_a_scene_looks_the_same_at_any_side(side: int) -> None:
    rng = np.random.default_rng(5)
    for _ in range(5):
        one = draw_scene(rng)
        small = np.asarray(render(one, side).resize((48, 48), Image.Resampling.BOX), dtype=np.float32)
        other = np.asarray(render(one).resize((48, 48), Image.Resampling.BOX), dtype=np.float32)
        different = np.asarray(render(draw_scene(rng)).resize((48, 48), Image.Resampling.BOX), dtype=np.float32)
        assert np.abs(small - other).mean() < 4 < 12 < np.abs(small - different).mean()


def test_backgrounds_are_noisy_and_far_from_every_colour() -> None:
    pixels = np.stack([picture(Scene((Thing("star", "red", "small", "plain", 9, 9, 18),), seed)) for seed in range(40)])
    noise = pixels[:, 20:, 20:].astype(np.float32)
    assert noise.std(axis=(1, 2)).min() > 8
    assert noise.mean(axis=(1, 2, 3)).std() > 5
    colours = np.array(list(COLOURS.values()), dtype=np.float32)
    distances = np.linalg.norm(noise.reshape(-1, 1, 3)[::7] - colours, axis=2)
    assert distances.min() > 60


def test_colours_are_far_apart() -> None:
    colours = np.array(list(COLOURS.values()), dtype=np.float32)
    distances = np.linalg.norm(colours[:, None] - colours, axis=2) + 1000 * np.eye(len(colours))
    assert distances.min() > 90


def test_later_things_lie_on_top() -> None:
    below = Thing("square", "green", "large", "plain", 40, 40, 30)
    above = Thing("square", "white", "small", "plain", 50, 40, 18)
    assert tuple(picture(scene(below, above))[40, 50]) == COLOURS["white"]
    assert tuple(picture(scene(above, below))[40, 50]) == COLOURS["green"]
    assert owners(scene(below, above))[40, 50] == 1
    assert owners(scene(below, above))[40, 30] == 0
    assert owners(scene(below, above))[40, 80] == -1


def test_stripes_are_dark_and_the_rest_is_of_the_colour() -> None:
    for size, sides in SIZES.items():
        for side in sides:
            one = Thing("square", "yellow", size, "striped", 40, 40, side)
            inside = picture(scene(one))[owners(scene(one)) == 0].astype(int)
            light = np.abs(inside - COLOURS["yellow"]).sum(axis=1) < 12
            dark = inside.sum(axis=1) < 0.6 * sum(COLOURS["yellow"])
            assert 0.2 < light.mean() < 0.6
            assert 0.2 < dark.mean() < 0.6


def test_owners_are_where_a_picture_differs_from_its_background() -> None:
    one = draw_scene(np.random.default_rng(6))
    hidden = Scene((Thing("star", "red", "small", "plain", 9, 9, 18),), one.background)
    changed = (picture(one) != picture(hidden)).any(axis=2)
    changed[:20, :20] = False
    seen = owners(one) >= 0
    seen[:20, :20] = False
    assert not (seen & ~changed).any()
    assert (changed & ~seen).mean() < 0.05  # edges that a thing covers less than half


def test_shares_of_patches_add_up_and_agree_with_the_pixels() -> None:
    one = draw_scene(np.random.default_rng(7))
    shares = patch_owners(one, 12)
    assert shares.shape == (1 + len(one.things), 8, 8)
    assert shares.dtype == np.float32
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    seen = owners(one)
    for number in range(-1, len(one.things)):
        assert shares[1 + number, 2, 3] == np.mean(seen[24:36, 36:48] == number)
        assert shares[1 + number].mean() == pytest.approx(np.mean(seen == number))
    np.testing.assert_allclose(patch_owners(one, 48, side=384).mean(axis=(1, 2)), shares.mean(axis=(1, 2)), atol=0.005)


def test_bad_sides_and_patches_are_refused() -> None:
    one = draw_scene(np.random.default_rng(0))
    for function in (render, owners):
        with pytest.raises(ValueError, match="`side`"):
            function(one, 15)
    for patch in (0, 13):
        with pytest.raises(ValueError, match="`patch`"):
            patch_owners(one, patch)
