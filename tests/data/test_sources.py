import json
from pathlib import Path

import pytest

from blip2_hf.data.pairs import ImageTextPairs
from blip2_hf.data.sources import (
    annotation_list,
    caption_table,
    coco_captions,
    image_folder,
    karpathy_captions,
    visual_genome_regions,
)
from tiny_sets import reveal, solid


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "sub/c.png"]):
        solid(number).save(folder / name)
    return folder


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def found(samples: list) -> dict:
    """Captions by id, having read every image."""
    pairs = ImageTextPairs(samples, reveal, max_attempts=1)
    assert sorted(pairs[n]["number"] for n in range(len(pairs))) == list(range(len(pairs)))
    return {sample.image_id: sample.captions for sample in samples}


def test_image_folder_with_csv(images: Path) -> None:
    write(images / "metadata.csv", 'file_name,caption\na.png,"one, two"\nb.png,three\na.png,"four\nlines"\n')
    assert found(image_folder(images)) == {"folder/a.png": ("one, two", "four\nlines"), "folder/b.png": ("three",)}


def test_image_folder_with_json_lines(images: Path) -> None:
    lines = [{"file_name": "a.png", "text": ["x", "y"]}, {"file_name": "b.png", "text": "z"}]
    write(images / "metadata.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    samples = image_folder(images, caption_column="text", name="mine")
    assert found(samples) == {"mine/a.png": ("x", "y"), "mine/b.png": ("z",)}


def test_image_folder_with_another_table_and_rows(images: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "captions.csv", "split,image,caption\ntrain,a.png,x\ndev,b.png,y\n")
    samples = image_folder(images, metadata=table, image_column="image", rows={"split": "train"})
    assert found(samples) == {"folder/a.png": ("x",)}
    with pytest.raises(ValueError, match="no image that was asked for"):
        image_folder(images, metadata=table, image_column="image", rows={"split": "test"})


def test_a_blank_caption_in_the_table_is_no_error(images: Path) -> None:
    write(images / "metadata.csv", "file_name,caption\na.png,\nb.png,x\n")
    samples = image_folder(images)
    assert ImageTextPairs(samples, reveal)[0]["skipped"][0]["reason"] == "blank caption"


COCO = {
    "images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
    "annotations": [
        {"image_id": 9, "caption": "nine", "id": 1},
        {"image_id": 7, "caption": "seven", "id": 2},
        {"image_id": 9, "caption": "neun", "id": 3},
    ],
}


def test_coco(images: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "captions.json", COCO)
    assert found(coco_captions(path, images)) == {"coco/7": ("seven",), "coco/9": ("nine", "neun")}


def test_coco_image_without_annotation_is_kept_to_be_counted(images: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "captions.json", {**COCO, "annotations": COCO["annotations"][:1]})
    samples = coco_captions(path, images)
    assert [sample.captions for sample in samples] == [(), ("nine",)]


def test_visual_genome(tmp_path: Path) -> None:
    """Photos in two folders, as Visual Genome has them; one of them is missing."""
    folders = [tmp_path / "VG_100K", tmp_path / "VG_100K_2"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        solid(number).save(folder / f"{number + 5}.jpg")
    regions = [
        {"id": 5, "regions": [{"phrase": "a red car", "image_id": 5}, {"phrase": "a wheel", "image_id": 5}]},
        {"id": 6, "regions": [{"phrase": "the sky", "image_id": 6}]},
        {"id": 7, "regions": [{"phrase": "lost", "image_id": 7}]},
    ]
    path = write(tmp_path / "region_descriptions.json", regions)
    samples = visual_genome_regions(path, folders)
    assert {sample.image_id: sample.captions for sample in samples[:2]} == {
        "vg/5": ("a red car", "a wheel"),
        "vg/6": ("the sky",),
    }
    assert [Path(sample.image) for sample in samples[:2]] == [folders[0] / "5.jpg", folders[1] / "6.jpg"]
    assert not Path(samples[2].image).exists()
    assert len(visual_genome_regions(path, folders[0])) == 3
    with pytest.raises(ValueError, match="must name at least one folder"):
        visual_genome_regions(path, [])
    with pytest.raises(ValueError, match=r"\[0\].*'regions'"):
        visual_genome_regions(write(path, [{"id": 5}]), folders)


def karpathy(split: str, name: str, *captions: str, **more: object) -> dict:
    return {"filename": name, "split": split, "sentences": [{"raw": c, "tokens": []} for c in captions], **more}


def test_karpathy_coco(images: Path, tmp_path: Path) -> None:
    records = [
        karpathy("train", "a.png", "x", "y", cocoid=7),
        karpathy("restval", "c.png", "z", cocoid=8, filepath="sub"),
        karpathy("test", "b.png", "w", cocoid=9),
    ]
    path = write(tmp_path / "dataset.json", {"images": records})
    samples = karpathy_captions(path, images)
    assert {s.image_id: s.captions for s in samples} == {"coco/7": ("x", "y"), "coco/8": ("z",)}
    assert Path(samples[1].image) == images / "sub" / "c.png"
    (only,) = karpathy_captions(path, images, splits=["test"])
    assert only.image_id == "coco/9"
    (whole,) = coco_captions(
        write(tmp_path / "one.json", {"images": [{"id": 7, "file_name": "a.png"}], "annotations": []}), images
    )
    assert whole.image_id == samples[0].image_id, "the two formats agree on the id"


def test_karpathy_flickr(images: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "dataset.json", {"images": [karpathy("train", "a.png", "x")]})
    assert found(karpathy_captions(path, images, name="flickr")) == {"flickr/a.png": ("x",)}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_annotation_list(images: Path, tmp_path: Path, suffix: str) -> None:
    records = [
        {"image": "a.png", "caption": "x", "image_id": "vg_1", "dataset": "vg"},
        {"image": "b.png", "caption": ["y", "z"]},
        {"image": "a.png", "caption": "w", "image_id": "vg_1"},
    ]
    content = records if suffix == ".json" else "\n".join(map(json.dumps, records))
    path = write(tmp_path / f"vg{suffix}", content)
    assert found(annotation_list(path, images, name="vg")) == {"vg/vg_1": ("x", "w"), "vg/b.png": ("y", "z")}


def test_a_null_in_a_list_of_captions_is_dropped(images: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "vg.json", [{"image": "a.png", "caption": ["x", None]}])
    assert found(annotation_list(path, images, name="vg")) == {"vg/a.png": ("x",)}


def test_annotation_list_takes_absolute_paths(images: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "sbu.json", [{"image": str(images / "a.png"), "caption": "x"}])
    (sample,) = annotation_list(path, tmp_path, name="sbu")
    assert Path(sample.image) == images / "a.png"


def test_caption_table(images: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "cc.tsv", 'a "quoted caption\ta.png\n\nan é\tb.png\r\n')
    expected = {"conceptual_captions/a.png": ('a "quoted caption',), "conceptual_captions/b.png": ("an é",)}
    assert found(caption_table(path, images)) == expected


def test_caption_table_with_header(images: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "cc.tsv", "path\tscore\ttitle\na.png\t0.3\tx\n")
    assert found(caption_table(path, images, columns=("title", "path"), name="cc")) == {"cc/a.png": ("x",)}
    with pytest.raises(ValueError, match="has no column 'caption'.*path.*score.*title"):
        caption_table(path, images, columns=("caption", "path"))


FAULTS = {
    "no object": (coco_captions, [], r"must be an object, got list"),
    "no images": (coco_captions, {"annotations": []}, "has no field 'images'.*annotations"),
    "images no list": (coco_captions, {"images": 3}, "'images' must be a list, got int"),
    "no file_name": (coco_captions, {"images": [{"id": 1}], "annotations": []}, r"images\[0\].*'file_name'"),
    "odd id": (coco_captions, {"images": [{"id": 1.5}]}, r"images\[0\].*'id' must be an integer or a string"),
    "unknown image": (
        coco_captions,
        {**COCO, "annotations": [{"image_id": 8, "caption": "x"}]},
        r"annotations\[0\].*'image_id' is 8",
    ),
    "caption number": (
        coco_captions,
        {**COCO, "annotations": [{"image_id": 9, "caption": 3}]},
        r"annotations\[0\].*'caption' must be a string",
    ),
    "no sentences": (karpathy_captions, {"images": [{"split": "train", "filename": "a"}]}, r"images\[0\].*'sentences'"),
    "no raw": (
        karpathy_captions,
        {"images": [{"split": "train", "filename": "a", "sentences": [{"tokens": []}]}]},
        r"sentences\[0\].*'raw'",
    ),
    "no split": (karpathy_captions, {"images": [{"filename": "a"}]}, r"images\[0\].*'split'"),
    "no caption": (annotation_list, [{"image": "a.png"}], r"\[0\].*'caption'"),
    "no image": (annotation_list, [{"caption": "x"}], r"\[0\].*'image'"),
    "empty image": (annotation_list, [{"image": "", "caption": "x"}], r"'image' must be a string, not empty"),
    "url": (annotation_list, [{"image": "https://x.y/a.jpg", "caption": "x"}], "URL.*download"),
    "no list": (annotation_list, COCO, "must hold a list, got dict.*coco_captions"),
    "two ids": (
        annotation_list,
        [{"image": "a", "caption": "x", "image_id": 1}, {"image": "a", "caption": "x", "image_id": 2}],
        r"\[1\].*id 2, before it had 1",
    ),
    "empty": (annotation_list, [], "no image that was asked for"),
    "no JSON": (annotation_list, "[{", "is not valid JSON"),
    "no tab": (caption_table, "a caption without image\n", "line 1 must have 2 fields.*got 1"),
    "no path": (caption_table, "x\ta.png\ny\t \n", "line 2: the path of the image is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_and_field(fault: str, images: Path, tmp_path: Path) -> None:
    read, content, message = FAULTS[fault]
    path = write(tmp_path / "annotations.json", content)
    more = {"name": "set"} if read is annotation_list else {}
    with pytest.raises(ValueError, match=message) as caught:
        read(path, images, **more)
    assert str(path) in str(caught.value)


def test_faults_of_a_folder(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exactly one of.*found \\[\\]"):
        image_folder(images)
    write(images / "metadata.csv", "file_name,caption\na.png\n")
    with pytest.raises(ValueError, match="line 2 must have the header's 2 fields"):
        image_folder(images)
    write(images / "metadata.csv", "file_name,text\na.png,x\n")
    with pytest.raises(ValueError, match="no field 'caption'.*'text'"):
        image_folder(images)
    with pytest.raises(ValueError, match="`metadata` must be a .csv or .jsonl"):
        image_folder(images, metadata=write(tmp_path / "table.txt", ""))
    write(images / "metadata.jsonl", "[1]\n")
    with pytest.raises(ValueError, match="exactly one of.*metadata.csv.*metadata.jsonl"):
        image_folder(images)
    with pytest.raises(ValueError, match="line 1 must be an object, got list"):
        image_folder(images, metadata=images / "metadata.jsonl")


def test_missing_files(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`annotations` must be an existing file"):
        coco_captions(tmp_path / "none.json", images)
    with pytest.raises(ValueError, match="`images` must be an existing folder"):
        coco_captions(write(tmp_path / "captions.json", COCO), tmp_path / "none")
    with pytest.raises(ValueError, match="`splits`.*'train'"):
        karpathy_captions(write(tmp_path / "captions.json", COCO), images, splits="train")
    with pytest.raises(ValueError, match="`name`"):
        coco_captions(tmp_path / "captions.json", images, name="")
