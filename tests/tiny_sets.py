"""Small image-text sets on disk or in memory, and a transform that shows what it was given."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from blip2_hf.data.samples import ImageTextSample
from blip2_hf.data.shards import END
from tiny_images import encoded


def solid(number: int) -> Image.Image:
    """An image whose colour tells its number (below 65536)."""
    return Image.new("RGB", (8, 6), (number % 256, number // 256, 7))


def number_of(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def tiny_samples(count: int, captions: int = 1) -> list[ImageTextSample]:
    return [
        ImageTextSample(encoded(solid(n)), tuple(f"caption {n} {c}" for c in range(captions)), f"tiny/{n}")
        for n in range(count)
    ]


def reveal(image: Image.Image, caption: str, rng: np.random.Generator) -> dict:
    """Number of the image, the caption, and a random draw."""
    return {"number": number_of(image), "caption": caption, "draw": float(rng.random())}


class ListShards:
    """Shards in memory."""

    def __init__(self, shards: list[list]) -> None:
        self.shards = shards
        self.read_entries = 0

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, shard: int, cursor: int):
        if cursor == END:
            return
        for number in range(cursor, len(self.shards[shard])):
            self.read_entries += 1
            yield self.shards[shard][number], number + 1


def tiny_shards(sizes: list[int]) -> ListShards:
    samples = iter(tiny_samples(sum(sizes)))
    return ListShards([[next(samples) for _ in range(size)] for size in sizes])


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tar_members(numbers: range) -> list[tuple[str, bytes]]:
    """Images with captions in text or JSON files, in turn."""
    members = []
    for n in numbers:
        members.append((f"{n:05d}.png", encoded(solid(n))))
        if n % 2:
            members.append((f"{n:05d}.json", json.dumps({"caption": f"caption {n}"}).encode()))
        else:
            members.append((f"{n:05d}.txt", f"caption {n}".encode()))
    return members


def as_list(examples: list[dict]) -> list[dict]:
    """A collator that leaves the examples as they are."""
    return examples


def stream_loader(stream, workers: int, batch_size: int = 3, **options) -> DataLoader:
    return DataLoader(stream, batch_size=batch_size, num_workers=workers, collate_fn=as_list, **options)


def contents(batches: list[list[dict]]) -> list[list[tuple]]:
    return [[(e["number"], e["caption"], e["draw"]) for e in batch] for batch in batches]
