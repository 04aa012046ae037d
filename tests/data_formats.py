"""The same pairs written in every format that the engine reads."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tars import write_tar


class Sample(NamedTuple):
    name: str  # of its file: in alphabetical order
    caption: str
    data: bytes  # of an image file


def samples(count: int = 40) -> list[Sample]:
    """Small JPEGs, each of another color, with captions that formats might stumble over."""
    generator = np.random.default_rng(0)
    endings = ["", ", with a comma", ' in "quotes"', " | pipe", " 's", " é 日"]
    found = []
    for number in range(count):
        stream = io.BytesIO()
        pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 48)).save(stream, "JPEG")
        caption = f"picture number {number} of a thing{endings[number % len(endings)]}"
        found.append(Sample(f"{number:05d}.jpg", caption, stream.getvalue()))
    return found


def write_images(folder: Path, given: list[Sample]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for sample in given:
        (folder / sample.name).write_bytes(sample.data)


def json_list(folder: Path, given: list[Sample]) -> Any:
    write_images(folder / "images", given)
    rows = [{"text": sample.caption, "image": f"images/{sample.name}"} for sample in given]
    return _text(folder / "train.json", json.dumps(rows))


def json_list_of_captions(folder: Path, given: list[Sample]) -> Any:
    write_images(folder, given)
    rows = [{"captions": [sample.caption], "file_name": sample.name} for sample in given]
    return _text(folder / "train.json", json.dumps(rows, indent=1))


def json_lines(folder: Path, given: list[Sample]) -> Any:
    write_images(folder, given)
    rows = [{"caption": sample.caption, "filepath": sample.name} for sample in given]
    return _text(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def our_captions(folder: Path, given: list[Sample]) -> Any:
    """What `lora_engine caption --out` writes: absolute paths."""
    write_images(folder, given)
    rows = [{"image": str(folder / sample.name), "caption": sample.caption} for sample in given]
    return _text(folder / "captions.jsonl", "".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in rows
    ))


def coco(folder: Path, given: list[Sample]) -> Any:
    """Images in a folder beside that of the annotations, as in COCO's archives."""
    write_images(folder / "train2017", given)
    (folder / "annotations").mkdir()
    return _text(folder / "annotations" / "captions_train2017.json", json.dumps({
        "info": {"year": 2017},
        "images": [{"id": 7 * i, "file_name": s.name} for i, s in enumerate(given)],
        "annotations": [
            {"id": i, "image_id": 7 * i, "caption": s.caption} for i, s in enumerate(given)
        ],
    }))


def karpathy(folder: Path, given: list[Sample]) -> Any:
    write_images(folder / "train2014", given)
    return _text(folder / "dataset.json", json.dumps({"dataset": "coco", "images": [
        {
            "filepath": "train2014", "filename": sample.name, "cocoid": number,
            "split": ["train", "restval"][number % 2],
            "sentences": [{"raw": sample.caption, "tokens": sample.caption.split()}],
        }
        for number, sample in enumerate(given)
    ]}))


def csv_file(folder: Path, given: list[Sample]) -> Any:
    write_images(folder, given)
    return _table(folder / "train.csv", ("image", "caption"), given, delimiter=",")


def open_clip(folder: Path, given: list[Sample]) -> Any:
    write_images(folder, given)
    lines = [f"{sample.name}\t{sample.caption}" for sample in given]
    return _text(folder / "train.tsv", "\n".join(["filepath\ttitle", *lines, ""]))


def flickr8k(folder: Path, given: list[Sample]) -> Any:
    write_images(folder / "Images", given)
    return _table(folder / "captions.txt", ("image", "caption"), given, delimiter=",")


def flickr8k_tokens(folder: Path, given: list[Sample]) -> Any:
    write_images(folder / "Flicker8k_Dataset", given)
    lines = [f"{sample.name}#0\t{sample.caption}\n" for sample in given]
    return _text(folder / "Flickr8k.token.txt", "".join(lines))


def flickr30k(folder: Path, given: list[Sample]) -> Any:
    write_images(folder / "flickr30k_images", given)
    lines = [f"{sample.name}| 0| {sample.caption}\n" for sample in given]
    return _text(
        folder / "results.csv", "".join(["image_name| comment_number| comment\n", *lines])
    )


def metadata_jsonl(folder: Path, given: list[Sample]) -> Any:
    write_images(folder, given)
    rows = [{"file_name": sample.name, "text": sample.caption} for sample in given]
    _text(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def metadata_csv(folder: Path, given: list[Sample]) -> Any:
    write_images(folder, given)
    _table(folder / "metadata.csv", ("file_name", "caption"), given, delimiter=",")
    return folder


def sidecars(folder: Path, given: list[Sample], suffix: str = ".txt") -> Any:
    write_images(folder, given)
    for sample in given:
        _text((folder / sample.name).with_suffix(suffix), sample.caption + "\n")
    return folder


def caption_sidecars(folder: Path, given: list[Sample]) -> Any:
    return sidecars(folder, given, ".caption")


def img2dataset_files(folder: Path, given: list[Sample]) -> Any:
    for shard, part in enumerate((given[:25], given[25:])):
        sidecars(folder / f"{shard:05d}", part)
        for sample in part:
            record = {"caption": sample.caption, "status": "success"}
            _text((folder / f"{shard:05d}" / sample.name).with_suffix(".json"), json.dumps(record))
    return folder


def tar(folder: Path, given: list[Sample]) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    write_tar(folder / "train.tar", (
        (Path(sample.name).stem, {"jpg": sample.data, "txt": sample.caption.encode()})
        for sample in given
    ))
    return folder / "train.tar"


def tars(folder: Path, given: list[Sample]) -> Any:
    """img2dataset's: with metadata in each sample, and a Parquet file beside each tar."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate((given[:13], given[13:30], given[30:])):
        write_tar(folder / f"{shard:05d}.tar", (
            (Path(sample.name).stem, {
                "jpg": sample.data, "txt": sample.caption.encode(),
                "json": json.dumps({"caption": sample.caption, "status": "success"}).encode(),
            })
            for sample in part
        ))
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1 not read PAR1")
        _text(folder / f"{shard:05d}_stats.json", "{}")
    return folder


def tars_by_pattern(folder: Path, given: list[Sample]) -> Any:
    return tars(folder, given) / "{00000..00002}.tar"


def json_in_tar(folder: Path, given: list[Sample]) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    write_tar(folder / "0.tar", (
        (Path(sample.name).stem, {
            "jpg": sample.data, "json": json.dumps({"text": sample.caption}).encode(),
        })
        for sample in given
    ))
    return folder / "0.tar"


def several_files(folder: Path, given: list[Sample]) -> Any:
    return json_list(folder / "a", given[:20]), json_lines(folder / "b", given[20:])


def parquet(folder: Path, given: list[Sample]) -> Any:
    """As Hugging Face stores datasets with images."""
    import pyarrow

    return _parquet(folder / "train-00000-of-00001.parquet", {
        "image": pyarrow.array([{"bytes": s.data, "path": s.name} for s in given]),
        "text": pyarrow.array([s.caption for s in given]),
    })


def img2dataset_parquet(folder: Path, given: list[Sample]) -> Any:
    import pyarrow

    _parquet(folder / "00000.parquet", {
        "key": pyarrow.array([Path(s.name).stem for s in given]),
        "jpg": pyarrow.array([s.data for s in given]),
        "caption": pyarrow.array([s.caption for s in given]),
        "url": pyarrow.array(["https://example.com/a.jpg"] * len(given)),
        "status": pyarrow.array(["success"] * len(given)),
    })
    _text(folder / "00000_stats.json", "{}")
    return folder


def arrow(folder: Path, given: list[Sample]) -> Any:
    hugging_face_dataset(folder, given).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def arrow_dict(folder: Path, given: list[Sample]) -> Any:
    from datasets import DatasetDict

    train = hugging_face_dataset(folder, given)
    DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def hugging_face_dataset(folder: Path, given: list[Sample]) -> Any:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    return Dataset.from_dict(
        {
            "image": [{"bytes": s.data, "path": s.name} for s in given],
            "text": [s.caption for s in given],
        },
        features=Features({"image": ImageFeature(), "text": Value("string")}),
    )


def python_paths(folder: Path, given: list[Sample]) -> Any:
    write_images(folder, given)
    return [(folder / sample.name, sample.caption) for sample in given]


def python_bytes(folder: Path, given: list[Sample]) -> Any:
    return [{"image": sample.data, "captions": [sample.caption]} for sample in given]


def python_pictures(folder: Path, given: list[Sample]) -> Any:
    return [(Image.open(io.BytesIO(sample.data)), sample.caption) for sample in given]


def python_arrays(folder: Path, given: list[Sample]) -> Any:
    return [
        (np.asarray(Image.open(io.BytesIO(sample.data))), [sample.caption]) for sample in given
    ]


Write = Callable[[Path, list[Sample]], Any]

FILES: list[Write] = [
    json_list, json_list_of_captions, json_lines, our_captions, coco, karpathy, csv_file, open_clip,
    flickr8k, flickr8k_tokens, flickr30k, metadata_jsonl, metadata_csv, sidecars, caption_sidecars,
    img2dataset_files, several_files, tar, tars, tars_by_pattern, json_in_tar, parquet,
    img2dataset_parquet, arrow, arrow_dict,
]
FROM_PYTHON: list[Write] = [
    python_paths, python_bytes, python_pictures, python_arrays, hugging_face_dataset,
]
NEEDS = {
    parquet: "pyarrow", img2dataset_parquet: "pyarrow", arrow: "datasets", arrow_dict: "datasets",
    hugging_face_dataset: "datasets",
}


def _text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _table(path: Path, names: tuple[str, str], given: list[Sample], delimiter: str) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(names)
        writer.writerows((sample.name, sample.caption) for sample in given)
    return path


def _parquet(path: Path, columns: dict[str, Any]) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path
