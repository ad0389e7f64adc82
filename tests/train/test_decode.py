"""Images of every mode, from files and from Parquet, as the same grey or RGB pixels."""

import io
import itertools
import struct

import datasets
import numpy as np
import pytest
from PIL import Image

from fused_attn.train import TrainError, data
from fused_attn.train.decode import plain


def numbers(*shape, high=256, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def on_white(colors, alpha):
    """colors (H, W, C) and alpha (H, W) in 0 to 255."""
    share = alpha[..., None] / 255
    return np.rint(colors * share + 255 * (1 - share)).astype(np.uint8)


GREY, COLORS = numbers(8, 8), numbers(8, 8, 3)
ALPHA = np.where(numbers(8, 8, seed=1) < 128, numbers(8, 8, seed=2), 0).astype(np.uint8)
DEEP = numbers(8, 8, high=65536, dtype=np.uint16)
PALETTE, INDICES = numbers(256, 3, seed=3), numbers(8, 8, seed=4)


def palette_image():
    image = Image.fromarray(INDICES, "P")
    image.putpalette(PALETTE.tobytes())
    return image


def with_alpha(mode):
    colors = GREY[..., None] if mode == "LA" else COLORS
    return Image.fromarray(np.concatenate([colors, ALPHA[..., None]], 2), mode)


def key_out(pixels, key):
    return np.where(np.asarray(pixels == key).reshape(8, 8, -1).all(2)[..., None], 255, pixels.reshape(8, 8, -1))


def moving():
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (40, 200)]
    return encoded(frames[0].convert("RGB"), "GIF", save_all=True, append_images=[frames[1].convert("RGB")])


#: The bytes of a file, and its pixels, (H, W) or (H, W, 3).
IMAGES = {
    "L": (encoded(Image.fromarray(GREY)), GREY),
    "1": (encoded(Image.fromarray(GREY > 99)), np.where(GREY > 99, 255, 0)),
    "RGB": (encoded(Image.fromarray(COLORS)), COLORS),
    "16-bit PNG": (encoded(Image.fromarray(DEEP)), DEEP // 256),
    "16-bit PNG, transparent": (
        encoded(Image.fromarray(DEEP), transparency=int(DEEP[2, 3])),
        key_out(DEEP, DEEP[2, 3])[..., 0] // np.where(DEEP[2, 3] == DEEP, 1, 256),
    ),
    "16-bit TIFF, big-endian": (encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"), DEEP // 256),
    "16-bit PGM": (encoded(Image.fromarray(DEEP), "PPM"), DEEP // 256),
    "32-bit TIFF": (encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), DEEP // 256),
    "P": (encoded(palette_image()), PALETTE[INDICES]),
    "P, one transparent": (
        encoded(palette_image(), transparency=int(INDICES[0, 0])),
        on_white(PALETTE[INDICES], np.where(INDICES[0, 0] == INDICES, 0, 255)),
    ),
    "P, some transparent": (
        encoded(palette_image(), transparency=bytes(range(256))),
        on_white(PALETTE[INDICES], INDICES),
    ),
    "P, GIF": (moving(), np.full((8, 8, 3), 40)),
    "LA": (encoded(with_alpha("LA")), on_white(GREY[..., None], ALPHA)[..., 0]),
    "RGBA": (encoded(with_alpha("RGBA")), on_white(COLORS, ALPHA)),
    "RGBA, opaque": (encoded(Image.fromarray(COLORS).convert("RGBA")), COLORS),
    "RGBA, lossless WebP": (encoded(with_alpha("RGBA"), "WEBP", lossless=True, exact=True), on_white(COLORS, ALPHA)),
    "L, transparent": (encoded(Image.fromarray(GREY), transparency=int(GREY[1, 1])), key_out(GREY, GREY[1, 1])[..., 0]),
    "RGB, transparent": (
        encoded(Image.fromarray(COLORS), transparency=tuple(COLORS[1, 1].tolist())),
        key_out(COLORS, COLORS[1, 1]),
    ),
    "CMYK": (
        encoded(Image.fromarray(np.dstack([COLORS, np.zeros_like(GREY)]), "CMYK"), "TIFF"),
        255 - COLORS,
    ),
    "LAB": (encoded(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"), np.full((8, 8, 3), 255)),
}
#: Mixing with white is rounded, and so is the conversion from LAB.
NEAR = {"LAB", "LA", "RGBA", "RGBA, lossless WebP", "P, some transparent"}


def parquet(path, files, labels=None):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": [i % 2 for i in range(len(files))]}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def from_parquet(folder, train, test):
    parquet(folder / "train.parquet", train)
    parquet(folder / "test.parquet", test)
    return data.load("someone/set", folder)


def from_files(folder, train, test):
    """The decoded squares are of 8 pixels, those of the images."""
    for split, files in (("train", train), ("test", test)):
        for number, file in enumerate(files):
            path = folder / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)
    return data.load("imagefolder", folder, image_size=7)


def rgb(pixels):
    return np.broadcast_to(pixels.reshape(8, 8, -1), (8, 8, 3))


@pytest.mark.parametrize("name", IMAGES)
def test_every_mode_of_a_file(tmp_path, name):
    file, pixels = IMAGES[name]
    tolerance = 1 if name in NEAR else 0
    for load in (from_parquet, from_files):
        loaded = load(tmp_path / load.__name__, [file, file], [file])
        assert loaded.in_chans == (1 if pixels.ndim == 2 and load is from_parquet else 3)
        wanted = (pixels[..., None] if loaded.in_chans == 1 else rgb(pixels)).astype(int)
        for images in (loaded.train, loaded.test):
            got = images.images[0].permute(1, 2, 0).numpy().astype(int)
            np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", Image.MODES)
def test_no_mode_is_left_out(mode):
    """White is white and black is black in all of them, whatever the alpha channel of white hides or shows."""
    if mode in ("F", "I;16N"):  # I;16N is I;16 or I;16B, by the machine
        pytest.skip("has no defined range" if mode == "F" else "no image has it")
    deep = mode.startswith("I")
    white, black = (65535, 0) if deep else (255, 0)
    for color, value in ((white, 255), (black, 0)):
        if deep:
            image = Image.new(mode, (2, 2), color)
        elif mode in ("La", "RGBa"):
            image = Image.new(f"{mode[:-1]}A", (2, 2), (color,) * (len(mode) - 1) + (255,)).convert(mode)
        elif mode == "PA":
            image = Image.new("RGBA", (2, 2), (color, color, color, 255)).convert("P").convert("PA")
        elif mode == "LAB":
            image = Image.new(mode, (2, 2), (color, 128, 128))
        else:
            image = Image.new("RGB", (2, 2), (color,) * 3).convert(mode)
        pixels = np.asarray(plain(image))
        assert plain(image).mode == ("L" if mode in ("1", "L", "LA", "La") or deep else "RGB")
        np.testing.assert_allclose(pixels.astype(int), value, rtol=0, atol=1 if mode == "LAB" else 0)


def test_floating_point_numbers_are_refused(tmp_path):
    good, bad = IMAGES["L"][0], encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
    with pytest.raises(TrainError, match=r"train/b/1\.png could not be read.*floating-point numbers"):
        from_files(tmp_path, [good, bad], [good])


@pytest.mark.parametrize("value", [-1, 65536])
def test_wide_integers_out_of_range_are_refused(tmp_path, value):
    good, bad = IMAGES["L"][0], encoded(Image.fromarray(np.full((8, 8), value, np.int32)), "TIFF")
    with pytest.raises(TrainError, match=rf"row 1 in train could not be read.*its pixels are from {value} to {value}"):
        from_parquet(tmp_path, [good, bad], [good])


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize(("orientation", "kind"), list(itertools.product(TURNS, ["PNG", "WEBP", "TIFF"])))
def test_orientation_in_exif_is_followed(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    file = encoded(Image.fromarray(COLORS), kind, exif=exif, **options)
    for load in (from_parquet, from_files):
        got = load(tmp_path / load.__name__, [file, file], [file]).train.images[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(got, TURNS[orientation](COLORS))


def test_damaged_exif_says_nothing(tmp_path):
    file = encoded(Image.fromarray(COLORS), exif=b"Exif\0\0" + struct.pack("<IIIII", 7, 0xFFFFFFFF, 9, 1 << 30, 3))
    got = from_files(tmp_path, [file, file], [file]).train.images[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(got, COLORS)


def test_a_set_has_colours_where_one_image_has(tmp_path):
    grey, (color, pixels) = IMAGES["L"][0], IMAGES["P"]
    assert from_parquet(tmp_path / "grey", [grey, grey], [grey]).train.shape == (1, 8, 8)
    for number, (train, test) in enumerate((([grey, color], [grey]), ([grey, grey], [color, grey]))):
        loaded = from_parquet(tmp_path / str(number), train, test)
        for images, files in ((loaded.train, train), (loaded.test, test)):
            for image, file in zip(images.images, files, strict=True):
                wanted = pixels if file is color else rgb(GREY)
                np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), wanted)


def test_sizes_of_train_and_test_are_the_same(tmp_path):
    small = encoded(Image.fromarray(GREY[:4]))
    with pytest.raises(TrainError, match="the images have 2 sizes; pass --image-size"):
        from_parquet(tmp_path, [IMAGES["L"][0]] * 2, [small])


PNG, JPEG = encoded(Image.fromarray(numbers(64, 64, 3))), encoded(Image.fromarray(numbers(64, 64, 3)), "JPEG")


@pytest.mark.parametrize(
    "damaged",
    [b"", b"text", PNG[:40], PNG[:2000], PNG[:-3000] + b"\0" * 3000, JPEG[:20], JPEG[: len(JPEG) // 2], moving()[:45]],
    ids=range(8),
)
@pytest.mark.parametrize("load", [from_parquet, from_files])
def test_damaged_files_are_named(tmp_path, damaged, load):
    name = r"the image of row 1 in test" if load is from_parquet else r"the image .*/test/b/1\.png"
    with pytest.raises(TrainError, match=rf"{name} could not be read, it may be damaged") as caught:
        _ = load(tmp_path, [IMAGES["L"][0]] * 2, [IMAGES["L"][0], damaged]).test.images
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)
