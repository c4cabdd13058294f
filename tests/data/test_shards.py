import gzip
import random
import string
import tarfile
import zlib
from pathlib import Path

import datasets
import pytest

from blip2_hf.data.samples import stable_id
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


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"text": "x"}', b'{"caption": 3}', b"\xff\xfe", b"[" * 200_000])
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


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz")])
@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_flipped_byte_raises(
    tmp_path: Path, suffix: str, mode: str, layout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarfile.TarFile, "format", layout)
    long = "é" * 120  # has a header of its own, which no checksum protects
    members = [(f"{long}{name}", data) for name, data in tar_members(range(2))] + tar_members(range(2, 5))
    members[1] = (members[1][0], "".join(random.Random(0).choices(string.printable, k=3000)).encode())
    path = write_tar(tmp_path / f"0.{suffix}", members, mode)
    shards = TarShards([path], name="s")
    whole, data = entries(shards), path.read_bytes()
    assert len(whole) == 5
    damaged = 0
    for number in range(150):
        at = number * len(data) // 150
        for flip in (1 << number % 8, 0xFF):
            path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            found = entries(shards)
            rest = [entry for entry, _ in found if isinstance(entry, dict) and entry["reason"].startswith("unreadable")]
            assert rest in ([], [found[-1][0]]), f"byte {at}: at most one entry for the rest, the last"
            assert found[-1][1] == END
            assert all(stable_id(entry.image_id) >= 0 for entry, _ in found if not isinstance(entry, dict))
            damaged += bool(rest)
    assert damaged > 10


@pytest.mark.parametrize("error", [zlib.error("invalid block"), EOFError(), gzip.BadGzipFile("CRC"), OSError(5, "I/O")])
def test_errors_of_decompression_end_the_shard_only(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = TarShards([write_tar(tmp_path / "0.tar.gz", tar_members(range(5)), "w:gz")], name="s")

    reads = iter(range(1000))
    read = gzip.GzipFile.read

    def broken(file: gzip.GzipFile, size: int = -1) -> bytes:
        if next(reads) == 1:  # the first is of a header, where tarfile itself wraps some errors
            raise error
        return read(file, size)

    monkeypatch.setattr(gzip.GzipFile, "read", broken)
    ((entry, cursor),) = entries(shards)
    assert (entry["reason"], cursor) == ("unreadable rest of shard", END)


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


def test_malformed_rows_of_a_stream_are_skipped(tmp_path: Path) -> None:
    columns = {"image": ["a.png", "b.png", "c.png"], "caption": [["a", None], [None], ["c"]], "key": ["x", None, "z"]}
    path = str(tmp_path / "0.parquet")
    datasets.Dataset.from_dict(columns).to_parquet(path)
    stream = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
    first, bad, last = entries(DatasetShards(stream, id_column="key", name="set"))
    assert (first[0].captions, first[0].image_id, last[0].image_id) == (("a",), "set/x", "set/z")
    where = "set, row 0-1: column 'key' must be an integer or a string, got None"
    assert bad == ({"reason": "malformed record", "where": where}, 2)
    without_ids = entries(DatasetShards(stream, name="set"))
    assert [sample.captions for sample, _ in without_ids] == [("a",), (), ("c",)]


def test_rows_of_mixed_types_are_skipped() -> None:
    rows = [{"image": "a", "caption": 5}, {"image": "b", "caption": "b"}, {"image": 3, "caption": "c"}, {"image": "d"}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    found = [entry for entry, _ in entries(DatasetShards(stream, name="set"))]
    assert found[1].captions == ("b",)
    assert [entry["reason"] for entry in (found[0], *found[2:])] == ["malformed record"] * 3
    assert "column 'caption' must be a string or a list of strings, got 5" in found[0]["where"]
    assert "has no column 'caption'; it has ['image']" in found[3]["where"]


def streamed(paths: list[str], kind: str = "parquet") -> DatasetShards:
    return DatasetShards(datasets.load_dataset(kind, data_files=paths, split="train", streaming=True), name="set")


def test_no_flipped_byte_of_a_parquet_file_raises(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{n}.parquet") for n in range(2)]
    for path in paths:
        columns = {"image": [f"{n}.png" for n in range(9)], "caption": [f"é {n}" for n in range(9)]}
        datasets.Dataset.from_dict(columns).to_parquet(path)
    data = Path(paths[1]).read_bytes()
    damaged = 0
    for cut in (True, False):
        for number in range(30):
            at = number * len(data) // 30
            Path(paths[1]).write_bytes(data[:at] if cut else data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
            rest = [(entry, cursor) for entry, cursor in entries(streamed(paths), 1) if isinstance(entry, dict)]
            assert [cursor for _, cursor in rest] in ([], [END])
            damaged += bool(rest)
    assert damaged > 40


def test_a_broken_line_of_a_json_stream_ends_its_shard_only(tmp_path: Path) -> None:
    line = '{"image": "a", "caption": "x"}\n'
    for name, content in (("0", line), ("1", line + '{"image": "b", "capt')):
        (tmp_path / f"{name}.jsonl").write_text(content)
    ((entry, cursor),) = entries(streamed([str(tmp_path / f"{n}.jsonl") for n in range(2)], "json"), 1)
    assert (entry["reason"], cursor) == ("unreadable rest of shard", END)
    assert "set, shard 1: " in entry["where"]


def test_streamed_sets_are_checked() -> None:
    table = datasets.Dataset.from_dict({"image": ["a"], "text": ["b"]})
    with pytest.raises(ValueError, match="`dataset` must be a datasets.IterableDataset"):
        DatasetShards(table, name="set")
    with pytest.raises(ValueError, match="`caption_column` 'caption' is not a column"):
        DatasetShards(table.to_iterable_dataset(), name="set")
