"""Bring a data set into the form that every later step reads."""

from __future__ import annotations

from nvila_pipelines.steps.context import StepContext


def run(context: StepContext) -> dict[str, float]:
    """Write the splits, captions and images of easy-VQA.

    Outputs: `train.jsonl`, `validation.jsonl`, `test.jsonl`, `captions.jsonl`, `text.jsonl`, `images.parquet`.
    """
    from nvila.data import easy_vqa
    from nvila.data.dataset import IMAGES_FILE
    from nvila.data.media import write_image_table
    from nvila.data.records import write_jsonl

    config, out = context.recipe.data, context.out_dir
    train, validation = easy_vqa.split_validation(
        list(easy_vqa.questions("train")), config.validation_images, easy_vqa.SPLIT_SEED
    )
    captions = list(easy_vqa.captions(train))
    counts = {
        "train": write_jsonl(out / "train.jsonl", train),
        "validation": write_jsonl(out / "validation.jsonl", validation),
        "test": write_jsonl(out / "test.jsonl", easy_vqa.questions("test")),
        "captions": write_jsonl(out / "captions.jsonl", captions),
        "text": write_jsonl(out / "text.jsonl", easy_vqa.text_only(captions + train)),
    }
    images = [(key, path.read_bytes()) for split in easy_vqa.SPLITS for key, path in easy_vqa.image_files(split)]
    counts["images"] = write_image_table(out / IMAGES_FILE, images)
    return {name: float(count) for name, count in counts.items()}
