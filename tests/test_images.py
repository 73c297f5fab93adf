"""Images: read from folders, tables and Parquet, as the model's own processor reads them, and trained on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedhl.config.text import load_config
from fedhl.data.loading import fingerprint, load_rows
from fedhl.errors import UserError
from fedhl.record import read_metrics, read_summary
from fedhl.run import start_run
from fedhl.run.asked import Asked
from fedhl.run.delivery import evaluate_run, export_run
from fedhl.task.images import Images, ImageTask

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TASK = ImageTask(kind="image-classification")
SIDE = {"height": 8, "width": 8}


def noise(seed: int, shape: tuple[int, ...] = (15, 12, 3)) -> Image.Image:
    values = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    return Image.fromarray(values)


def as_bytes(image: Image.Image, format: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **settings)
    return file.getvalue()


def rows_of(*files: Any) -> list[dict[str, Any]]:
    return [{"image": file, "label": "ab"[k % 2]} for k, file in enumerate(files)]


def pixels(rows: list[dict[str, Any]], processor: Any, task: ImageTask = TASK) -> Any:
    encoded = task.encode(rows, "f", processor, ["a", "b"])
    return Images(ImageTask, processor).batch(encoded.examples)["pixel_values"]


PROCESSORS = {
    "resized": ViTImageProcessorPil(size=SIDE),
    "cropped": BitImageProcessorPil(size={"shortest_edge": 10}, crop_size=SIDE),
    "cropped by share": ConvNextImageProcessorPil(size={"shortest_edge": 8}, crop_pct=0.8),
    "not rescaled": ViTImageProcessorPil(size=SIDE, do_rescale=False, do_normalize=False),
    "another range": ViTImageProcessorPil(size=SIDE, rescale_factor=1 / 127, image_mean=[0.1] * 3),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_model_reads_what_its_processor_makes_of_an_image(name: str) -> None:
    processor = PROCESSORS[name]
    images = [noise(seed) for seed in range(3)]
    wanted = processor(images, return_tensors="pt")["pixel_values"]
    got = pixels(rows_of(*map(as_bytes, images)), processor)
    assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_an_image_is_held_in_bytes() -> None:
    encoded = TASK.encode(
        rows_of(as_bytes(noise(0)), as_bytes(noise(1))), "f", PROCESSORS["resized"], None
    )
    assert {e.pixels.dtype for e in encoded.examples} == {np.dtype(np.uint8)}


def test_images_are_turned_upright_and_read_in_colour_or_in_grey() -> None:
    processor, image = PROCESSORS["resized"], noise(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: to be turned by 90 degrees
    turned = as_bytes(image.transpose(Image.Transpose.ROTATE_90), exif=exif)
    plain = pixels(rows_of(as_bytes(image)), processor)
    assert torch.equal(pixels(rows_of(turned), processor), plain)
    grey = ImageTask(kind="image-classification", colour=False)
    one = ViTImageProcessorPil(size=SIDE, image_mean=[0.5], image_std=[0.5])
    assert pixels(rows_of(as_bytes(image)), one, grey).shape == (1, 1, 8, 8)
    of_grey = pixels(rows_of(as_bytes(image.convert("L"))), processor)
    assert torch.equal(of_grey[:, 0], of_grey[:, 1]) and of_grey.shape == (1, 3, 8, 8)


def test_an_image_that_cannot_be_read_is_named() -> None:
    rows = rows_of(as_bytes(noise(0)), b"no image")
    with pytest.raises(UserError, match=r"f: row 1 .*the image cannot be read: cannot identify"):
        TASK.encode(rows, "f", PROCESSORS["resized"], ["a", "b"])
    whole = ViTImageProcessorPil(do_resize=False)
    rows = rows_of(as_bytes(noise(0)), as_bytes(noise(1, (9, 9, 3))))
    with pytest.raises(
        UserError, match=r"row 1 .*becomes \(3, 9, 9\) .*bring all images to one size"
    ):
        TASK.encode(rows, "f", whole, ["a", "b"])


# --- where images come from ---------------------------------------------------------------------


def write(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(folder / name)
    return folder


def test_folders_are_labels_and_the_folders_around_them_clients(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", "cat/2.png", "cat/1.jpg", "dog/1.png", ".thumbs/cat/1.png")
    (plain / "readme.txt").write_text("x")
    assert load_rows(str(plain)) == [
        {"image": "cat/1.jpg", "label": "cat"},
        {"image": "cat/2.png", "label": "cat"},
        {"image": "dog/1.png", "label": "dog"},
    ]
    deep = write(tmp_path / "deep", "north/cat/1.png", "south/dog/1.png")
    assert load_rows(str(deep), limit=1) == [
        {"image": "north/cat/1.png", "label": "cat", "client": "north"}
    ]
    for wrong in (("1.png",), ("cat/1.png", "north/cat/1.png")):
        with pytest.raises(UserError, match=r"LABEL/NAME\.png or as CLIENT/LABEL/NAME\.png"):
            load_rows(str(write(tmp_path / wrong[0].replace("/", "-"), *wrong)))


def test_the_hash_of_a_folder_is_that_of_its_images(tmp_path: Path) -> None:
    folder = write(tmp_path, "cat/1.png", "dog/1.png")
    before = fingerprint(str(folder))
    (folder / "notes.txt").write_text("x")
    assert fingerprint(str(folder)) == before
    noise(9).save(folder / "dog/1.png")
    changed = fingerprint(str(folder))
    (folder / "dog/1.png").rename(folder / "dog/2.png")
    assert len({before, changed, fingerprint(str(folder))}) == 3


def test_parquet_tables_and_paths_hold_the_same_images(tmp_path: Path) -> None:
    import datasets

    folder = write(tmp_path / "images", "a/0.png", "b/1.png")
    files = [folder / "a/0.png", folder / "b/1.png"]
    pixels_of = {}
    parquet = str(tmp_path / "rows.parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    made = {"image": [str(file) for file in files], "label": ["a", "b"]}
    datasets.Dataset.from_dict(made, features=features).to_parquet(parquet)
    table = folder / "rows.jsonl"
    lines = [{"image": f"{label}/{k}.png", "label": label} for k, label in enumerate("ab")]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for source in (str(folder), parquet, str(table)):
        rows = load_rows(source)
        TASK.check(rows, source)
        encoded = TASK.encode(rows, source, PROCESSORS["resized"], ["a", "b"])
        pixels_of[source] = np.stack([e.pixels for e in encoded.examples])
    first, *others = pixels_of.values()
    assert all(np.array_equal(first, other) for other in others)


# --- a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds on a few digits, in `digits/run`."""
    from digits import main

    folder = tmp_path_factory.mktemp("digits")
    main([str(folder), "--count", "120"])
    config = load_config(
        Path("configs/digits.yaml"),
        [
            f"model.source={folder}/vit",
            f"data.source={folder}/images",
            "data.held_out.count=40",
            "partition={kind: iid, clients: 3}",
            "lora.ranks=[1, 2, 4]",
            "rounds=2",
            "training.steps=3",
            "evaluation.client_fraction=0.2",
        ],
    )
    start_run(config, folder / "run")
    return folder / "run"


def test_a_run_on_images_is_judged_by_its_accuracy(run: Path) -> None:
    last = read_metrics(run)[-1]["evaluation"]
    assert last["metric"] == "accuracy" and last["greater"]
    assert last["full"]["examples"] == 40 and set(last["ranks"]) == {"1", "2", "4"}
    assert read_summary(run)["labels"] == [str(digit) for digit in range(10)]


def test_its_predictions_are_shown_row_by_row(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    evaluate_run(run, "last", None, asked=Asked(predictions=file, classes=True))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    last = read_metrics(run)[-1]["evaluation"]["full"]
    assert len(lines) == 40 and all(line["image"].endswith(".png") for line in lines)
    assert sum(line["right"] for line in lines) / 40 == pytest.approx(last["accuracy"])


def test_what_it_has_learnt_is_used_by_transformers_and_peft(run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    export_run(run, tmp_path / "whole", None, "last")
    export_run(run, tmp_path / "adapter", 64, "last")  # the width of every layer: nothing is cut
    files = sorted((run.parent / "images").rglob("*.png"))[:6]
    images = [Image.open(file).convert("RGB") for file in files]
    # as the card says
    settings: Any = AutoConfig.from_pretrained(tmp_path / "adapter")
    base = AutoModelForImageClassification.from_pretrained(run.parent / "vit", config=settings)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "adapter", use_fast=False)
    logits = model(**processor(images, return_tensors="pt")).logits
    use = pipeline("image-classification", model=str(tmp_path / "whole"), top_k=10)
    for scores, row in zip(use(images), logits.softmax(-1), strict=True):
        by_label = {entry["label"]: entry["score"] for entry in scores}
        got = [by_label[settings.id2label[k]] for k in range(10)]
        assert got == pytest.approx(row.tolist(), abs=1e-5)
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-classification" in card and "AutoImageProcessor" in card
