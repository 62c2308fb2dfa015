"""Image data sets: IDX files, mosaics with a known reason, CIFAR's files, folders of one's own."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import fashion_folder, idx

from rekd_train.config.run import DataConfig
from rekd_train.data import LabelledImages, is_unsplit, load_data, load_whole
from rekd_train.data.published import DEBIAN_FOLDER, make_mosaics
from rekd_train.errors import DataError


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_packed_or_not(tmp_path, packed):
    config = DataConfig(name="fashion_mnist", path=str(fashion_folder(tmp_path / "f", packed=packed)))
    data = load_data(config)
    assert {name: part.images.shape for name, part in data.splits.items()} == {
        "train": (50, 28, 28, 1), "dev": (10, 28, 28, 1), "test": (60, 28, 28, 1),
    }  # fmt: skip
    original = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    assert {image.tobytes() for image in data.splits["dev"].images} <= {image.tobytes() for image in original}
    assert "MIT" in data.origin and len(data.label_names) == 10


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read"),
        (lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-9])), "cut off"),
        (lambda path: path.write_bytes(gzip.compress(b"\0\0\x0d\1" + bytes(70))), "no IDX file"),
        (lambda path: path.write_bytes(gzip.compress(idx(np.zeros(3, np.uint8)))), "60 images but 3 labels"),
    ],
)
def test_idx_files_that_are_missing_or_damaged_name_package_and_flag(tmp_path, damage, word):
    root = fashion_folder(tmp_path / "f")
    damage(root / "train-labels-idx1-ubyte.gz")
    with pytest.raises(DataError, match=word) as caught:
        load_data(DataConfig(name="fashion_mnist", path=str(root)))
    assert "apt-get install dataset-fashion-mnist" in str(caught.value) and "data.path" in str(caught.value)


@pytest.mark.debian
def test_debians_files_are_the_published_ones():
    if not DEBIAN_FOLDER.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    data = load_data(DataConfig(name="fashion_mnist"))
    assert [len(part) for part in data.splits.values()] == [54000, 6000, 10000]
    assert np.bincount(data.splits["test"].labels).tolist() == [1000] * 10


def items(count: int = 300) -> LabelledImages:
    """Items of 8 x 8 whose brightness spreads widely and whose rows differ, as a shuffled one's do not."""
    generator = np.random.default_rng(1)
    levels = np.linspace(10, 240, count)
    pixels = np.clip(generator.normal(levels[:, None, None], 5, (count, 8, 8)), 0, 255)
    pixels[:, :4] = np.clip(pixels[:, :4] * 0.5, 0, 255)
    return LabelledImages(pixels.astype(np.uint8)[:, :, :, None], np.arange(count) % 10)


@pytest.mark.parametrize("tiles", [2, 3])
def test_one_tile_of_a_mosaic_is_the_item_and_its_region_is_known(tiles):
    whole = items()
    made = make_mosaics(whole, tiles, np.random.default_rng(0))
    assert made.images.shape == (300, tiles * 8, tiles * 8, 1) and (made.labels == whole.labels).all()
    for image, item, (top, left, bottom, right) in zip(made.images, whole.images, made.regions, strict=True):
        assert (image[top:bottom, left:right] == item).all()
    places = {tuple(region) for region in made.regions}
    assert len(places) == tiles * tiles, "every tile is the true one somewhere"


def test_noise_tiles_are_shuffled_items_of_like_brightness():
    whole = items()
    made = make_mosaics(whole, 2, np.random.default_rng(0))
    rank = np.argsort(np.argsort(whole.images.mean(axis=(1, 2, 3)), kind="stable"))
    contents = {bytes(np.sort(item.ravel())): number for number, item in enumerate(whole.images)}
    for number, (image, region) in enumerate(zip(made.images, made.regions, strict=True)):
        for top in (0, 8):
            for left in (0, 8):
                tile = image[top : top + 8, left : left + 8]
                if (top, left) == tuple(region[:2]):
                    continue
                source = contents[bytes(np.sort(tile.ravel()))]
                assert source != number and abs(rank[source] - rank[number]) <= 100, "another one, next in brightness"
                assert (tile != whole.images[source]).any(), "shuffled"


def test_the_mosaic_of_a_model_that_is_shown_where_to_look_is_black_elsewhere():
    made = make_mosaics(items(), 3, np.random.default_rng(0), blank=True)
    shuffled = make_mosaics(items(), 3, np.random.default_rng(0))
    assert (made.regions == shuffled.regions).all(), "the same task"
    for image, (top, left, bottom, right) in zip(made.images, made.regions, strict=True):
        rest = image.copy()
        rest[top:bottom, left:right] = 0
        assert not rest.any()


def test_mosaics_are_fixed_by_the_seed_and_limited(tmp_path):
    root = str(fashion_folder(tmp_path / "f", 200))
    config = {"name": "mosaic", "path": root, "train_examples": 30, "tiles": 3}
    first, again, other = (load_data(DataConfig(**config, seed=seed)).splits["train"] for seed in (1, 1, 2))
    assert first.images.shape == (30, 84, 84, 1) and first.regions.shape == (30, 4)
    assert (first.images == again.images).all() and (first.images != other.images).any()


CIFAR = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "batches.meta"),
    "cifar100": ("cifar-100-python", ["train"], ["test"], "meta"),
}


def cifar_folder(root: Path, base: str, monkeypatch) -> Path:
    """Files as published but smaller, so torchvision's digests of them are replaced as well."""
    import hashlib

    from torchvision.datasets import CIFAR10, CIFAR100

    published = {"cifar10": CIFAR10, "cifar100": CIFAR100}[base]
    name, train, test, meta = CIFAR[base]
    folder = root / name
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    digests = {}

    def write(file: str, content: dict) -> None:
        (folder / file).write_bytes(pickle.dumps(content))
        digests[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()

    for file in train + test:
        labels = {"labels": [i % 10 for i in range(200)]}
        if base == "cifar100":
            labels = {"fine_labels": [i % 100 for i in range(200)], "coarse_labels": [i % 20 for i in range(200)]}
        pixels = generator.integers(0, 256, (200, 3072), dtype=np.uint8)
        pixels[:, 0] = np.arange(200)  # the first pixel says which example it is
        write(file, {"data": pixels, **labels})
    names = {"label_names": [f"class {i}" for i in range(10)]}
    if base == "cifar100":
        names = {f"{kind}_label_names": [f"{kind} {i}" for i in range(count)] for kind, count in
                 (("fine", 100), ("coarse", 20))}  # fmt: skip
    write(meta, names)
    monkeypatch.setattr(published, "train_list", [[file, digests[file]] for file in train])
    monkeypatch.setattr(published, "test_list", [[file, digests[file]] for file in test])
    monkeypatch.setattr(published, "meta", {**published.meta, "md5": digests[meta]})
    return root


@pytest.mark.parametrize(
    ("name", "classes", "first"),
    [("cifar10", 10, "class 0"), ("cifar100_coarse", 20, "coarse 0"), ("cifar100_fine", 100, "fine 0")],
)
def test_cifar_has_its_labels_at_both_granularities(tmp_path, monkeypatch, name, classes, first):
    root = cifar_folder(tmp_path, name.partition("_")[0], monkeypatch)
    data = load_data(DataConfig(name=name, path=str(root), dev_share=0.5))
    assert len(data.label_names) == classes and data.label_names[0] == first
    assert data.splits["test"].images.shape == (200, 32, 32, 3)
    assert (data.splits["test"].labels == data.splits["test"].images[:, 0, 0, 0] % classes).all()
    inside = root / CIFAR[name.partition("_")[0]][0]
    assert len(load_data(DataConfig(name=name, path=str(inside), dev_share=0.5)).splits["test"]) == 200


def test_cifar_that_is_missing_or_changed_names_the_flag(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="not fetched.*--set data.path=DIR"):
        load_data(DataConfig(name="cifar10"))
    with pytest.raises(DataError, match="--set data.path=DIR"):
        load_data(DataConfig(name="cifar10", path=str(tmp_path / "nowhere")))
    root = cifar_folder(tmp_path, "cifar100", monkeypatch)
    (root / "cifar-100-python" / "train").write_bytes(b"something else")
    with pytest.raises(DataError, match="not the published files"):
        load_data(DataConfig(name="cifar100_coarse", path=str(root)))


def picture(path: Path, seed: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)


def test_a_folder_for_each_class(tmp_path):
    for number in range(20):
        picture(tmp_path / ("cats" if number % 2 else "dogs") / f"{number}.PNG", number)
    picture(tmp_path / "cats" / "again.png", 1)
    picture(tmp_path / "cats" / "1.rationale.png", 100)
    picture(tmp_path / "cats" / "3.RATIONALE.PNG", 101)
    (tmp_path / "notes.txt").write_text("not an image")
    data = load_data(DataConfig(name="image_folder", path=str(tmp_path), dev_share=0.2, test_share=0.2))
    assert data.label_names == ("cats", "dogs") and "1 duplicates dropped" in data.origin
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 12, "dev": 4, "test": 4}
    for part in data.splits.values():
        assert [path.parent.name for path in part.images] == [data.label_names[label] for label in part.labels]


def test_an_image_in_two_classes_is_named(tmp_path):
    for number in range(20):
        picture(tmp_path / ("cats" if number % 2 else "dogs") / f"{number}.png", number)
    picture(tmp_path / "dogs" / "again.png", 1)
    data = load_data(DataConfig(name="image_folder", path=str(tmp_path), dev_share=0.2, test_share=0.2))
    assert data.duplicates == 1
    assert data.contradictions == ("cats/1.png 'cats' (kept), dogs/again.png 'dogs'",)


def test_folders_for_splits(tmp_path):
    for split, seeds in (("train", range(20)), ("val", range(20, 24)), ("test", range(24, 28))):
        for seed in seeds:
            picture(tmp_path / split / ("cats" if seed % 2 else "dogs") / f"{seed}.png", seed)
    picture(tmp_path / "train" / "cats" / "leak.png", 25)
    data = load_data(DataConfig(name="image_folder", path=str(tmp_path)))
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 20, "dev": 4, "test": 4}
    assert not any("leak" in str(path) for path in data.splits["train"].images), "kept where it measures"


def test_images_of_a_folder_without_splits_can_be_taken_whole(tmp_path):
    for number in range(6):
        picture(tmp_path / ("cats" if number % 2 else "dogs") / f"{number}.png", number)
    picture(tmp_path / "cats" / "again.png", 1)
    config = DataConfig(name="image_folder", path=str(tmp_path))
    whole = load_whole(config, ("dogs", "birds", "cats"))
    assert is_unsplit(config) and sorted(whole.labels.tolist()) == [0, 0, 0, 2, 2, 2, 2]
    with pytest.raises(DataError, match="cats/1.png: the label 'cats' is none of the 1 classes; cats/3.png"):
        load_whole(config, ("dogs",))
    picture(tmp_path / "b" / "train" / "cats" / "1.png", 1)
    assert not is_unsplit(DataConfig(name="image_folder", path=str(tmp_path / "b")))


def test_image_folders_that_make_no_sense_are_named(tmp_path):
    config = DataConfig(name="image_folder", path=str(tmp_path))
    with pytest.raises(DataError, match="no folders of images"):
        load_data(config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):
        load_data(config)
    (tmp_path / "empty").rmdir()
    for seed in range(5):
        picture(tmp_path / "only" / f"{seed}.png", seed)
    with pytest.raises(DataError, match="one class"):
        load_data(config)
    for split, name in (("train", "cats"), ("train", "dogs"), ("test", "birds")):
        for seed in range(4):
            picture(tmp_path / "b" / split / name / f"{seed}.png", hash((split, name)) % 1000 + seed)
    with pytest.raises(DataError, match="'birds' is none of the 2 classes"):
        load_data(DataConfig(name="image_folder", path=str(tmp_path / "b")))
    with pytest.raises(DataError, match="is no folder"):
        load_data(DataConfig(name="image_folder", path=str(tmp_path / "nowhere")))
