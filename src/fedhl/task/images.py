"""Classes of images.

An image is decoded, turned upright and brought to the model's size once, by the model's image processor. What
remains, to rescale whole numbers to the model's range, is done batch by batch: an image is held in a byte for
each number, where a float would take four.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from fedhl.errors import in_one_line
from fedhl.locate import locate
from fedhl.names import plural
from fedhl.record import Unit
from fedhl.task.classification import score_classes
from fedhl.task.examples import Encoded
from fedhl.task.kind import Kind, OfKind
from fedhl.task.labels import class_settings, label_names, named_labels, print_class
from fedhl.task.rows import RowError, Rows, column, located, refuse, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BaseImageProcessor

Pixels = Any
"""An array of shape (channels, height, width)."""
AS_IT_IS: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
"""The size of the model, and the numbers of the file."""
RESCALED: dict[str, Any] = {"do_resize": False, "do_center_crop": False, "do_pad": False}
"""The numbers of the model, in the size of the array."""


class Picture(NamedTuple):
    """One row: an image in the size of the model, and its class. `pixels` are uint8, or float32 if they are
    rescaled already."""

    pixels: NDArray[Any]
    labels: int


class ImageTask(Kind):
    """One label per image. The classification head is trained whole, beside the adapters."""

    auto: ClassVar[str] = "AutoModelForImageClassification"
    processor: ClassVar[str] = "AutoImageProcessor"
    peft_type: ClassVar[str | None] = None
    pipeline: ClassVar[str] = "image-classification"
    head: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    metric: ClassVar[str] = "accuracy"
    greater: ClassVar[bool] = True
    units: ClassVar[Mapping[str, Unit]] = {"accuracy": "share of rows"}
    class_setting: ClassVar[str | None] = "label"

    kind: Literal["image-classification"]  # pyright: ignore[reportIncompatibleVariableOverride]
    image: str = "image"
    """The field that holds the image: the bytes of an image file, as in Parquet files with images, or its
    path, seen from the folder of the data. Images in folders need no table: as LABEL/NAME.png they have the
    fields image and label, as CLIENT/LABEL/NAME.png the field client, too."""
    label: str = "label"
    """The field that holds the label."""
    colour: bool = True
    """Read images in colour (RGB); false: in grey, for models of one channel."""

    @staticmethod
    def model_settings(labels: Sequence[str] | None) -> dict[str, Any]:
        return {} if labels is None else class_settings(labels, "single_label_classification")

    @staticmethod
    def score(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return score_classes(logits, labels)

    def objective(self, processor: Any, vocabulary: int) -> Images:
        return Images(ImageTask, processor)

    @classmethod
    def usage(cls, named: bool, max_length: int | None) -> list[str]:
        return [
            "from PIL import Image",
            "",
            'image = Image.open("image.png").convert("RGB")',
            'inputs = processor(image, return_tensors="pt")',
            "outputs = model.eval()(**inputs)",
            print_class(named),
        ]

    def check(self, rows: Rows, source: str) -> None:
        labels = column(rows, self.label, source)
        with located(rows, source):
            label_names(labels)
        images = column(rows, self.image, source)
        with located(rows, source):
            refuse(
                (row, f"field {self.image!r} is {shown(value)}, expected an image or its path")
                for row, value in enumerate(images)
                if not isinstance(file_of(value), str | bytes)
            )

    def sizes(self, examples: Sequence[Any]) -> str:
        channels, height, width = examples[0].pixels.shape
        return f" of {height} x {width} pixels in {plural(channels, 'channel')}"

    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The path of the image, or the sha256 of its bytes."""
        value = file_of(row[self.image])
        return (value if isinstance(value, str) else hashlib.sha256(value).hexdigest(),)

    def encode(
        self,
        rows: Rows,
        source: str,
        processor: BaseImageProcessor,
        labels: Sequence[str] | None,
    ) -> Encoded:
        self.check(rows, source)
        classes, _ = named_labels(column(rows, self.label, source), rows, source, labels)
        with located(rows, source):
            pixels = list(self.read(rows, source, processor))
        pictures = [Picture(p, label) for p, label in zip(pixels, classes, strict=True)]
        return Encoded(pictures, [*range(len(rows))], 0)

    def read(self, rows: Rows, source: str, processor: BaseImageProcessor) -> Iterator[Pixels]:
        """The pixels of every row. Raises RowError for an image that cannot be read, or that the processor
        brings to another size than the first."""
        whole, shape = True, None
        for number, row in enumerate(rows):
            try:
                image = opened(file_of(row[self.image]), source, self.colour)
                pixels = of_size(processor, image)
                if number == 0:
                    whole = can_wait(processor, image, pixels)
                if not whole:
                    pixels = prepared(processor, image)
            except Exception as error:  # of a file that is no image, or a model for other images
                raise RowError(number, f"the image cannot be read: {in_one_line(error)}") from error
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise RowError(
                    number,
                    f"the image becomes {pixels.shape} by the model's image processor, and those before it "
                    f"{shape}; only processors that bring all images to one size can be used",
                )
            yield pixels


@dataclass(frozen=True)
class Images(OfKind):
    """Images of one size with a class each, for a model of transformers."""

    processor: Any

    def batch(self, rows: Sequence[Picture]) -> dict[str, Tensor]:
        import numpy as np
        import torch

        pixels = np.stack([row.pixels for row in rows])
        if pixels.dtype == np.uint8:
            pixels = rescaled(self.processor, pixels)
        labels = torch.tensor([row.labels for row in rows])
        return {"pixel_values": torch.from_numpy(pixels), "labels": labels}

    def terms(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["labels"])

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**batch).loss

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return model(pixel_values=batch["pixel_values"]).logits

    def parts(self, rows: Sequence[Picture], size: int) -> Iterator[Sequence[Picture]]:
        return (rows[k : k + size] for k in range(0, len(rows), size))

    def tokens(self, batch: Mapping[str, Tensor]) -> None:
        return None


# --- one image ----------------------------------------------------------------------------------


def file_of(value: Any) -> Any:
    """The bytes of an image file or its path, of a field as data sets of Hugging Face have it, too."""
    if isinstance(value, Mapping):
        return value.get("bytes") or value.get("path")
    return value


def folder_of(source: str) -> Path:
    """The folder that paths of images begin in."""
    path = locate(source)
    return Path() if path is None else path if path.is_dir() else path.parent


def opened(file: str | bytes, source: str, colour: bool) -> Image:
    """An image, upright, in colour or in grey; its path is seen from the folder of the data."""
    from PIL import Image, ImageOps

    place = folder_of(source) / file if isinstance(file, str) else io.BytesIO(file)
    with Image.open(place) as image:
        return ImageOps.exif_transpose(image).convert("RGB" if colour else "L")


def prepared(processor: Any, image: Any, **settings: Any) -> Pixels:
    """What the model reads of an image."""
    import numpy as np

    # Grey images have one channel, which the processor would take for the height.
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    found = processor(array, input_data_format="channels_last", return_tensors="np", **settings)
    return found["pixel_values"][0]


def of_size(processor: Any, image: Any) -> Pixels:
    return prepared(processor, image, **AS_IT_IS)


def rescaled(processor: Any, pixels: Pixels) -> Pixels:
    """The numbers of the model, of a batch of images in its size."""
    settings = {"input_data_format": "channels_first", "return_tensors": "np", **RESCALED}
    return processor(list(pixels), **settings)["pixel_values"]


def can_wait(processor: Any, image: Any, pixels: Pixels) -> bool:
    """Whether rescaling after the change of size gives the same numbers as both at once."""
    import numpy as np

    whole = prepared(processor, image)
    return pixels.dtype == np.uint8 and np.array_equal(rescaled(processor, pixels[None])[0], whole)
