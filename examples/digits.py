"""Handwritten digits as a folder of images, and a small vision transformer with random weights.

The 1,797 images of 8 x 8 pixels that scikit-learn brings become OUT/images/LABEL/NUMBER.png. OUT/vit is a
vision transformer for images of this size that has learnt nothing: federated training starts from there.

    python examples/digits.py build/digits
    fedhl run configs/digits.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIDE = 8
"""Pixels of an image in each direction."""
MODEL = ViTConfig(
    image_size=SIDE,
    patch_size=2,
    num_channels=3,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=128,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--count", type=int, default=1797, metavar="N", help="the first N images")
    args = parser.parse_args(argv)
    if not 1 <= args.count <= 1797:
        parser.error("--count must be from 1 to 1797")
    write_images(args.out / "images", args.count)
    write_model(args.out / "vit")
    print(f"{args.count} images and a model: {args.out}")


def write_images(folder: Path, count: int) -> None:
    digits: Any = load_digits()  # grey values of 0 to 16
    for number in range(count):
        place = folder / str(digits.target[number])
        place.mkdir(parents=True, exist_ok=True)
        grey = (digits.images[number] / 16 * 255).round().astype("uint8")
        Image.fromarray(grey).save(place / f"{number:04d}.png")


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    ViTForImageClassification(MODEL).vit.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


if __name__ == "__main__":
    main()
