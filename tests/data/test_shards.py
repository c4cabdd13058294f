import tarfile
from pathlib import Path

import datasets
import pytest

from blip2_hf.data.shards import END, DatasetShards, TarShards
from tiny_images import encoded
from tiny_sets import solid, tar_members, write_tar


def entries(shards, shard: int = 0, cursor: int = 0) -> list:
    return list(shards.read(shard, cursor))


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz")])
def test_tar_from_the_start_and_from_every_cursor(tmp_path: Path, suffix: str, mode: str) -> None:
    shards = TarShards([write_tar(tmp_path / f"0.{suffix}", tar_members(range(5)), mode)], name="laion")
    whole = entries(shards)
    assert [sample.image_id for sample, _ in whole] == [f"laion/{n:05d}" for n in range(5)]
    assert [sample.captions for sample, _ in whole] == [(f"caption {n}",) for n in range(5)]
    assert [sample.image for sample, _ in whole] == [encoded(solid(n)) for n in range(5)]
    for number, (_, cursor) in enumerate(whole):
        assert entries(shards, 0, cursor) == whole[number + 1 :]
    assert whole[-1][1] == END


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_have_headers_of_their_own(tmp_path: Path, layout: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarfile.TarFile, "format", layout)
    folder = "f" * (90 if layout == tarfile.USTAR_FORMAT else 200)
    members = [(f"{folder}/{name}", data) for name, data in tar_members(range(3))]
    shards = TarShards([write_tar(tmp_path / "0.tar", members)], name="laion")
    whole = entries(shards)
    assert len(whole) == 3
    assert whole[2][0].image_id == f"laion/{folder}/00002"
    assert entries(shards, 0, whole[0][1]) == whole[1:]


def test_text_goes_before_json_and_other_files_do_not_matter(tmp_path: Path) -> None:
    members = [
        ("a.JPG", b"image"),
        ("a.json", b'{"caption": "from json", "alt": "alternative"}'),
        ("a.txt", b"from text"),
        ("a.seg.npy", b"?"),
        ("README", b"no extension"),
        (".hidden", b"no key"),
        ("b.webp", b"image"),
        ("b.json", b'{"caption": ["one", "two"], "alt": "other"}'),
    ]
    path = write_tar(tmp_path / "0.tar", members)
    assert [sample.captions for sample, _ in entries(TarShards([path], name="s"))] == [("from text",), ("one", "two")]
    del members[2]
    path = write_tar(tmp_path / "1.tar", members)
    by_field = entries(TarShards([path], name="s", caption_field="alt"))
    assert [sample.captions for sample, _ in by_field] == [("alternative",), ("other",)]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"text": "x"}', b'{"caption": 3}', b"\xff\xfe"])
def test_a_malformed_record_is_skipped(tmp_path: Path, content: bytes) -> None:
    members = [("a.png", b"image"), ("a.json", content), *tar_members(range(1))]
    bad, good = entries(TarShards([write_tar(tmp_path / "0.tar", members)], name="s"))
    assert bad[0] == {"reason": "malformed record", "where": f"{tmp_path / '0.tar'}: a"}
    assert good[0].captions == ("caption 0",)


def test_incomplete_records_are_left_to_be_counted(tmp_path: Path) -> None:
    members = [("a.txt", b"no image"), ("b.png", b"no caption")]
    (a, _), (b, _) = entries(TarShards([write_tar(tmp_path / "0.tar", members)], name="s"))
    assert (a.image, b.captions) == (None, ())


def test_a_damaged_tar_gives_what_stands_before_the_damage(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", tar_members(range(6)))
    shards = TarShards([path], name="s")
    cursors = [cursor for _, cursor in entries(shards)]
    data = path.read_bytes()
    path.write_bytes(data[: cursors[2] + 600])  # in the middle of the fourth sample
    found = entries(shards)
    assert [sample.image_id for sample, _ in found[:3]] == [f"s/{n:05d}" for n in range(3)]
    assert found[-1][0]["reason"] == "unreadable rest of shard"
    assert str(path) in found[-1][0]["where"]
    assert found[-1][1] == END
    assert entries(shards, 0, found[2][1]) == found[3:]
    path.unlink()
    assert [entry["reason"] for entry, _ in entries(shards)] == ["unreadable rest of shard"]
    path.write_bytes(b"this is not a tar file" * 100)
    assert [entry["reason"] for entry, _ in entries(shards)] == ["unreadable rest of shard"]


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", tar_members(range(6)))
    shards = TarShards([path], name="s")
    cursor = entries(shards)[3][1]
    data = bytearray(path.read_bytes())
    data[cursor : cursor + 512] = b"x" * 512
    path.write_bytes(data)
    *good, (last, _) = entries(shards)
    assert len(good) == 3, "the sample before the damage may be incomplete"
    assert last["reason"] == "unreadable rest of shard"
    assert f"byte {cursor}" in last["where"]


def test_a_tar_without_end_marker_is_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", tar_members(range(3)))
    shards = TarShards([path], name="s")
    whole = entries(shards)
    path.write_bytes(path.read_bytes().rstrip(b"\0") + b"\0" * 200)
    padded = path.stat().st_size % 512
    path.write_bytes(path.read_bytes() + b"\0" * (512 - padded))
    assert entries(shards) == whole


def test_tar_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`files` must be an existing file"):
        TarShards([tmp_path / "none.tar"], name="s")
    with pytest.raises(ValueError, match="`files` is empty"):
        TarShards([], name="s")
    with pytest.raises(ValueError, match="`files` must be a list"):
        TarShards("0.tar", name="s")
    with pytest.raises(ValueError, match="`name`"):
        TarShards([write_tar(tmp_path / "0.tar", [])], name="")


def test_streamed_parquet(tmp_path: Path) -> None:
    paths = []
    for shard in range(3):
        rows = [{"bytes": encoded(solid(10 * shard + n)), "path": None} for n in range(4)]
        table = datasets.Dataset.from_dict({"image": rows, "text": [f"{shard} {n}" for n in range(4)]})
        paths.append(str(tmp_path / f"{shard}.parquet"))
        table.cast_column("image", datasets.Image()).to_parquet(paths[-1])
    stream = datasets.load_dataset("parquet", data_files=paths, split="train", streaming=True)
    shards = DatasetShards(stream, caption_column="text", name="set")
    assert len(shards) == 3
    whole = entries(shards, 1)
    assert [sample.captions for sample, _ in whole] == [(f"1 {n}",) for n in range(4)]
    assert [sample.image for sample, _ in whole] == [encoded(solid(10 + n)) for n in range(4)]
    assert [sample.image_id for sample, _ in whole] == [f"set/1-{n}" for n in range(4)]
    assert entries(shards, 1, whole[1][1]) == whole[2:]
    assert entries(shards, 1, whole[3][1]) == entries(shards, 1, END) == []


def test_streamed_sets_are_checked() -> None:
    table = datasets.Dataset.from_dict({"image": ["a"], "text": ["b"]})
    with pytest.raises(ValueError, match="`dataset` must be a datasets.IterableDataset"):
        DatasetShards(table, name="set")
    with pytest.raises(ValueError, match="`caption_column` 'caption' is not a column"):
        DatasetShards(table.to_iterable_dataset(), name="set")
