"""One pair to a sample, samples to a batch; nothing is cut or dropped silently."""

import functools
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from blip2_hf.augmentation import TrainingAugmentation
from blip2_hf.data.captions import normalise_caption, normalise_question
from blip2_hf.data.collator import ImageTextCollator, PairTransform
from blip2_hf.data.skipped import SkipSample
from blip2_hf.image_processing import Blip2ImageProcessor
from blip2_hf.processing import Blip2Processor
from tiny_images import encoded, photo
from tiny_tokenizers import tiny_bert_tokenizer, tiny_opt_tokenizer, tiny_t5_tokenizer

PAD = 0
TOKENIZER = tiny_bert_tokenizer()
AUGMENTATION = TrainingAugmentation(14)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def tokens(ids: list[int]) -> str:
    return " ".join(TOKENIZER.convert_ids_to_tokens(ids))


def sample(*ids: int, **more) -> dict:
    ids = ids or (2, 7, 3)
    return {"pixel_values": np.full((3, 4, 4), ids[0], np.float32), "input_ids": list(ids)} | more


def test_a_pair_becomes_a_sample() -> None:
    image = photo(30, 20)
    result = PairTransform(AUGMENTATION, TOKENIZER)(image, "A Dog, sitting on the BEACH.", rng(1))
    assert set(result) == {"pixel_values", "input_ids", "truncated"}
    assert tokens(result["input_ids"]) == "[CLS] a dog , sitting on the beach [SEP]"
    assert result["truncated"] == 0
    assert np.array_equal(result["pixel_values"], AUGMENTATION(image, rng(1)))
    assert result["pixel_values"].shape == (3, 14, 14) and result["pixel_values"].dtype == np.float32


def test_the_caption_function_can_be_chosen() -> None:
    def words(caption, text: str) -> str:
        return tokens(PairTransform(AUGMENTATION, TOKENIZER, caption=caption).encode_caption(text)["input_ids"])

    assert words(None, "a dog.") == "[CLS] a dog . [SEP]"
    assert words(normalise_question, "a dog?.") == "[CLS] a dog ? [SEP]"
    assert words(functools.partial(normalise_caption, prompt="a photo of "), "a dog.") == "[CLS] a photo of a dog [SEP]"


@pytest.mark.parametrize("length", [3, 4, 5, 6])
def test_long_captions_keep_their_end_token_and_are_counted(length: int) -> None:
    transform = PairTransform(AUGMENTATION, TOKENIZER, max_length=length)
    whole = "[CLS] the red ball [SEP]".split()
    result = transform.encode_caption("the red ball")
    assert len(result["input_ids"]) == min(length, 5)
    assert result["truncated"] == int(length < 5)
    expected = [*whole[: length - 1], "[SEP]"] if length < 5 else whole
    assert tokens(result["input_ids"]) == " ".join(expected)


def test_truncation_is_that_of_the_tokenizer() -> None:
    text = "a man riding a horse on the beach"
    theirs = TOKENIZER(text, truncation=True, max_length=6)["input_ids"]
    assert PairTransform(AUGMENTATION, TOKENIZER, max_length=6).encode_caption(text)["input_ids"] == theirs


def test_of_a_processor() -> None:
    images = Blip2ImageProcessor(size=12, image_mean=0.1)
    image = photo(30, 20)
    for processor in (
        Blip2Processor(images, TOKENIZER),
        Blip2Processor(images, tiny_opt_tokenizer(), num_query_tokens=4, qformer_tokenizer=TOKENIZER),
    ):
        train = PairTransform.for_training(processor, max_length=4, flip=0.0)
        augmentation = TrainingAugmentation.from_image_processor(images, flip=0.0)
        result = train(image, "a small red dog", rng(2))
        assert np.array_equal(result["pixel_values"], augmentation(image, rng(2)))
        assert tokens(result["input_ids"]) == "[CLS] a small [SEP]" and result["truncated"] == 1

        evaluate = PairTransform.for_evaluation(processor)
        result = evaluate(encoded(image), "a small red dog", rng(2))
        assert np.array_equal(result["pixel_values"], images(image, return_tensors="np")["pixel_values"][0])
        assert tokens(result["input_ids"]) == "[CLS] a small red dog [SEP]"


@pytest.mark.parametrize("tokenizer", [tiny_opt_tokenizer, tiny_t5_tokenizer])
def test_other_tokenizers_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"`tokenizer` must write \[CLS\]"):
        PairTransform(AUGMENTATION, tokenizer())
    with pytest.raises(ValueError, match=r"`tokenizer` must write \[CLS\]"):
        PairTransform.for_training(Blip2Processor(Blip2ImageProcessor(), tokenizer()))


def test_bad_pairs() -> None:
    transform = PairTransform(AUGMENTATION, TOKENIZER)
    for blank in ("", "  \n", "...", '"!"'):
        with pytest.raises(SkipSample, match="blank caption"):
            transform(photo(30, 20), blank, rng())
    with pytest.raises(SkipSample, match="blank caption"):
        PairTransform(AUGMENTATION, TOKENIZER, caption=None).encode_caption(" ")
    with pytest.raises(ValueError, match="`caption` must be a string, got list"):
        transform(photo(30, 20), ["a dog"], rng())
    with pytest.raises(ValueError, match="cannot load image"):
        transform(b"junk", "a dog", rng())
    for length in (2, 0, None, 5.0):
        with pytest.raises(ValueError, match="`max_length` must be an int of at least 3"):
            PairTransform(AUGMENTATION, TOKENIZER, max_length=length)
    with pytest.raises(ValueError, match="`image_transform` must be callable, got NoneType"):
        PairTransform(None, TOKENIZER)


def test_texts_are_padded_to_the_longest_of_the_batch() -> None:
    batch = ImageTextCollator(9)([sample(2, 5, 3), sample(2, 6, 7, 8, 3), sample(2, 3)])
    assert batch["input_ids"].tolist() == [[2, 5, 3, 9, 9], [2, 6, 7, 8, 3], [2, 3, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "image_ids"}
    shorter = ImageTextCollator(9)([sample(2, 5, 3)])
    assert shorter["input_ids"].tolist() == [[2, 5, 3]]


def test_pixels_and_tensors() -> None:
    samples = [sample(2, 3), sample(4, 3)]
    batch = ImageTextCollator(PAD)(samples)
    assert batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_values"], torch.tensor([2.0, 4.0])[:, None, None, None].expand(2, 3, 4, 4))
    as_tensors = [{name: torch.as_tensor(value) for name, value in entry.items()} for entry in samples]
    again = ImageTextCollator(PAD)(as_tensors)
    assert all(torch.equal(again[name], batch[name]) for name in ("pixel_values", "input_ids", "attention_mask"))
    batch["pixel_values"].zero_()
    assert samples[0]["pixel_values"].max() == 2, "the batch is a copy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_of_the_tower(dtype: torch.dtype) -> None:
    features = torch.randn(2, 5, 8).to(dtype)
    rows = [{"vision_features": row, "input_ids": [2, 3]} for row in features]
    batch = ImageTextCollator(PAD)(rows)
    assert torch.equal(batch["vision_features"], features) and batch["vision_features"].dtype == dtype
    assert "pixel_values" not in batch


def test_read_only_features_do_not_warn(recwarn) -> None:
    features = np.ones((5, 8), np.float16)
    features.flags.writeable = False
    batch = ImageTextCollator(PAD)([{"vision_features": features, "input_ids": [2, 3]}])
    assert batch["vision_features"].dtype == torch.float16 and not recwarn.list


def test_image_ids() -> None:
    collate = ImageTextCollator(PAD)
    given = [7, np.int64(2**62), torch.tensor(7)]
    batch = collate([sample(image_id=number) for number in given])
    assert batch["image_ids"].tolist() == [7, 2**62, 7] and batch["image_ids"].dtype == torch.int64

    mixed = [sample(image_id=7), sample(), sample(image_id=None), sample(image_id=0)]
    first, second = (collate(mixed)["image_ids"].tolist() for _ in range(2))
    assert first[0] == second[0] == 7 and first[3] == second[3] == 0
    made = first[1:3] + second[1:3]  # the second batch could be another process's
    assert max(made) < 0 and len(set(made)) == 4

    without = collate([sample(), sample(image_id=None)])["image_ids"]
    assert without.max() < 0 and without[0] != without[1]


def test_bookkeeping() -> None:
    skipped = [{"reason": "unreadable image", "where": "a.jpg"}, {"reason": "blank caption", "where": "b.jpg"}]
    samples = [
        sample(truncated=1, stream_position={"shard": 0}),
        sample(truncated=0, skipped=skipped[:1]),
        sample(truncated=1, skipped=skipped[1:], stream_position={"shard": 1}),
    ]
    batch = ImageTextCollator(PAD)(samples)
    assert batch["truncated"] == 2
    assert batch["skipped"] == skipped
    assert batch["stream_position"] == [{"shard": 0}, {"shard": 1}]
    assert ImageTextCollator(PAD)([sample(truncated=0)])["truncated"] == 0
    tensors = {"pixel_values", "input_ids", "attention_mask", "image_ids"}
    assert set(ImageTextCollator(PAD, bookkeeping=())(samples)) == tensors
    some = ImageTextCollator(PAD, bookkeeping=["truncated"])(samples)
    assert set(some) == tensors | {"truncated"}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "`samples` is empty"),
        ([sample(), {"input_ids": [2, 3]}], "sample 1 must have either `pixel_values` or `vision_features`"),
        ([sample(vision_features=np.ones((5, 8)))], "sample 0 must have either"),
        ([{"pixel_values": np.ones((3, 4, 4))}], "sample 0 has no `input_ids`"),
        ([sample(), {"vision_features": np.ones((5, 8)), "input_ids": [2]}], "got 1 `pixel_values` and 1 `vision_fea"),
        (
            [sample(), sample(pixel_values=np.ones((3, 5, 4), np.float32))],
            r"one shape and dtype, got \(3, 4, 4\) float32, \(3, 5, 4\) float32",
        ),
        ([sample(), sample(pixel_values=np.ones((3, 4, 4)))], r"\(3, 4, 4\) float32, \(3, 4, 4\) float64"),
        ([sample(pixel_values=np.ones((4, 4, 3)))], r"shape \[3, height, width\], got \(4, 4, 3\)"),
        ([{"vision_features": np.ones(8), "input_ids": [2, 3]}], r"shape \[patches, width\], got \(8,\)"),
        ([sample(), sample(input_ids=[])], "`input_ids` of sample 1 must be one row of at least one int"),
        ([sample(input_ids=[[2, 3]])], "`input_ids` of sample 0"),
        ([sample(input_ids=[2.0, 3.0])], "`input_ids` of sample 0"),
        ([sample(image_id="coco_1")], r"`image_id` of sample 0 must be an integer, got 'coco_1' \(str\)"),
        ([sample(), sample(image_id=2**63)], "`image_id` of sample 1 must fit 64 bits"),
        ([sample(), sample(caption="a dog")], r"sample 1 has unknown keys \['caption'\]"),
    ],
)
def test_bad_samples(samples: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTextCollator(PAD)(samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_token_id": None}, "`pad_token_id` must be an int of at least 0, got None"),
        ({"pad_token_id": -1}, "`pad_token_id`"),
        ({"pad_token_id": 0, "bookkeeping": ("loss",)}, "`bookkeeping` must be some of"),
        ({"pad_token_id": 0, "bookkeeping": "skipped"}, "`bookkeeping` must be some of"),
    ],
)
def test_bad_collator(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTextCollator(**options)


class Pairs(Dataset):
    """Two colours, named."""

    def __init__(self, transform: PairTransform) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        captions = ("a dog", "two red dog in the snow", "a cat", "a " * 40)
        return self.transform(photo(30 + index, 20), captions[index], rng(index)) | {"image_id": index // 2}


def test_in_workers() -> None:
    pairs = Pairs(PairTransform(AUGMENTATION, TOKENIZER))
    copy = pickle.loads(pickle.dumps(pairs.transform))  # as where workers are not forked
    assert copy.encode_caption("a dog") == pairs.transform.encode_caption("a dog")
    collator = pickle.loads(pickle.dumps(ImageTextCollator(TOKENIZER.pad_token_id)))
    here, there = (list(DataLoader(pairs, 2, collate_fn=collator, num_workers=workers)) for workers in (0, 1))
    assert [batch["input_ids"].shape for batch in here] == [(2, 8), (2, 32)]
    assert [batch["truncated"] for batch in there] == [0, 1]
    assert [batch["image_ids"].tolist() for batch in there] == [[0, 0], [1, 1]]
    for one, other in zip(here, there, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one if isinstance(one[name], torch.Tensor))
