"""Your own images: a folder for each class becomes a pair that says which patches decided.

    python examples/own_images.py pictures --output runs/mine      # pictures/cat/1.jpg, pictures/dog/1.jpg, ...
    python examples/own_images.py                                  # without a folder: 300 images, made up

Beside the answers it writes NAME.rationale.png: the image with the patches that decided, the strongest brightest.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from rekd_deploy.client.render import plain_text, write_rationale
from rekd_train import load
from rekd_train.config.run import run_config
from rekd_train.inputs.prediction import RATIONALE
from rekd_train.runs import train_run

SETTINGS = ["data.name=image_folder", "data.augmentation=none", "selection.target=0.04", "selection.budget=0.05"]
"""On top of fashion_student: grey, 28 x 28 pixels. Here two patches are kept; photographs want colours, more pixels
(selector.image, predictor.image) and a quarter of the patches."""


def write_images(folder: Path) -> None:
    """Made-up images of noise; one patch of 4 x 4 pixels tells the class."""
    draw = np.random.default_rng(1)
    telling = {"dark": 0, "bright": 255, "striped": np.tile([[0], [255]], (2, 4))}
    for number in range(300):
        label = list(telling)[number % 3]
        pixels = draw.integers(110, 146, size=(28, 28)).astype(np.uint8)
        row, column = draw.integers(7, size=2) * 4
        pixels[row : row + 4, column : column + 4] = telling[label]
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / label / f"{number}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a folder with a folder of images for each class")
    parser.add_argument("--output", type=Path, default=Path("runs/own_images"), help="the new checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at the output")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--ask", nargs="+", type=Path, metavar="IMAGE", help="default: one image of each class")
    given = parser.parse_args()
    folder = given.folder or given.output.with_name("pictures")
    if not given.folder and not folder.exists():
        write_images(folder)

    config = run_config("fashion_student", [f"data.path={folder}", *SETTINGS, *given.set])
    metrics = train_run(config, given.output, overwrite=given.overwrite)
    print(f"accuracy on test images: {metrics['test']['accuracy']:.1%}")
    asked = given.ask or [min(each.iterdir()) for each in sorted(folder.iterdir())]
    for image, prediction in zip(asked, load(given.output).predict(asked), strict=True):
        print(plain_text(prediction))
        write_rationale(image, prediction, given.output.with_name("rationales") / f"{image.stem}{RATIONALE}")


if __name__ == "__main__":
    main()
