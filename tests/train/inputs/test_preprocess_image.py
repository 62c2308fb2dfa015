"""Images in, boxes out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rekd_train.config.run import BackboneConfig, ImageConfig
from rekd_train.errors import ConfigError, InputError
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.preprocessors import load_preprocessor

COLOUR = ImagePreprocessor(ImageSettings(height=6, width=8, channels=3, rows=3, columns=4))
GREY = ImagePreprocessor(ImageSettings(height=6, width=8, channels=1, rows=3, columns=4))


def picture(height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels(preprocessor: ImagePreprocessor, *images: object) -> np.ndarray:
    return preprocessor(list(images)).inputs["pixels"]


def test_images_pass_or_are_resized_predictions_point_into_them_and_settings_fit(tmp_path: Path) -> None:
    array, large = picture(), Image.fromarray(picture(30, 17))
    found = pixels(COLOUR, array, Image.fromarray(array), np.asarray(large))
    assert found.dtype == np.uint8 and found.shape == (3, 6, 8, 3)
    resized = large.resize((8, 6), Image.Resampling.BILINEAR)
    assert all(np.array_equal(one, other) for one, other in zip(found, (array, array, resized), strict=True))
    assert np.array_equal(COLOUR(found).inputs["pixels"], found), "one array is a batch"
    array, exif = picture(8, 6), Image.Exif()
    exif[0x0112] = 6  # stored lying: turn by 90 degrees
    Image.fromarray(array).save(tmp_path / "lying.png", exif=exif)
    encoded = COLOUR([tmp_path / "lying.png", str(tmp_path / "lying.png")])
    assert encoded.sizes == [(8, 6), (8, 6)]
    assert np.array_equal(encoded.inputs["pixels"][0], np.rot90(array, -1))
    encoded = COLOUR([picture(12, 16), picture(7, 8)])
    mask = np.zeros((2, 12), dtype=bool)
    mask[0, [0, 6]] = mask[1, 11] = True
    scores = np.arange(24, dtype=np.float32).reshape(2, 12)
    first, second = encoded.predictions(["a", "b"], np.array([[0.2, 0.8], [0.9, 0.1]]), mask, scores)
    assert (first.label, second.label) == ("b", "a")
    assert [(p.row, p.column, p.box, p.score) for p in first.rationale] == [
        (0, 0, (0, 0, 4, 4), 0.0), (1, 2, (8, 4, 12, 8), 6.0)]
    assert first.rate == 2 / 12 and not first.truncated and first.probability == 0.8
    assert second.rationale[0].box == (6, 4, 8, 7)  # 7 rows of pixels over 3 rows of patches: whole pixels touched
    encoded = ImagePreprocessor(ImageSettings(height=32, width=32, channels=1, rows=14, columns=14))([picture(5, 9, 1)])
    (answer,) = encoded.predictions(["a"], np.ones((1, 1)), np.ones((1, 196), dtype=bool), np.zeros((1, 196)))
    covered = np.zeros((5, 9), dtype=int)
    for left, top, right, bottom in (patch.box for patch in answer.rationale):
        assert 0 <= left < right <= 9 and 0 <= top < bottom <= 5
        covered[top:bottom, left:right] += 1
    assert covered.min() > 0
    stored = {"height": 6, "width": 8, "channels": 3, "rows": 3, "columns": 4, "kind": "image"}
    again = load_preprocessor(Path(), stored)
    assert again.fingerprint == COLOUR.fingerprint != GREY.fingerprint and again.features == 12
    assert again.fingerprint[:16] == "a565a59621117647", "checkpoints and served models hold it"
    other = BackboneConfig(family="vit", image=ImageConfig(height=6, width=8, channels=3, patch=1))
    for make, message in (
        (lambda: ImageSettings(height=0, width=8, channels=2, rows=1, columns=1), "height=0.*channels=2"),
        (lambda: load_preprocessor(Path(), {"kind": "sound"}), "unknown preprocessing 'sound'"),
        (lambda: COLOUR.check_backbone(other), "x 3 in 3 x 4 patches; one reads 6 x 8 x 3 in 6 x 8 patches; fix"),
        (lambda: COLOUR.check_backbone(BackboneConfig()), "reads no images")):
        with pytest.raises(ConfigError, match=message):
            make()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
def test_any_8_bit_mode_becomes_the_channels_of_the_model(mode: str) -> None:
    image = Image.fromarray(picture()).convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(256)
    assert pixels(COLOUR, image).shape == (1, 6, 8, 3) and pixels(GREY, image).shape == (1, 6, 8, 1)
    colour, grey = picture(), picture()[:, :, 0]
    assert np.array_equal(pixels(COLOUR, grey)[0], np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(pixels(GREY, grey)[0, :, :, 0], grey)
    assert np.array_equal(pixels(GREY, colour)[0, :, :, 0], np.asarray(Image.fromarray(colour).convert("L")))
    assert GREY([picture(12, 16)[:, :, :1]]).sizes == [(16, 12)]


@pytest.mark.parametrize(("items", "message"), [
    ([], "empty"), ("image.png", "images is str"), (picture(), "shape"), (None, "images is NoneType"),
    ([picture().astype(np.float32)], "image 1 is an array of float32"),
    ([picture(), picture(channels=2)], "image 2 has the shape"), ([picture()[:0]], "no pixels"),
    ([picture(), 7], "image 2 is int"), ([Path("missing.png")], r"image 1 \(missing.png\) does not exist"),
    ([Image.new("I;16", (8, 6))], "more than 8 bits"), ([Image.new("RGB", (0, 6))], "no pixels")])  # fmt: skip
def test_bad_images_are_named(items: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        COLOUR(items)


def test_damaged_files_and_every_bad_image_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "damaged.png"
    Image.fromarray(picture(64, 64)).save(path)
    for content in (b"", b"no image", path.read_bytes()[:-2000]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"image 2 \(.*damaged.png\) cannot be read as an image"):
            COLOUR([picture(), path])
    with Image.open(path) as lazily_opened, pytest.raises(InputError, match="image 1 cannot be read"):
        COLOUR([lazily_opened])
    with pytest.raises(InputError) as raised:
        COLOUR([picture(), "A film of great warmth.", picture()[:0], "long text " * 1000], first_index=4)
    assert str(raised.value) == (
        "image 6 (A film of great warmth.) does not exist; image 7 has no pixels: its shape is (0, 8, 3); "
        f"image 8 ({('long text ' * 1000)[:77]}...) does not exist; "
        "fix: give the paths of image files; this model reads images, not texts, or give an image of at least one pixel"
    )
