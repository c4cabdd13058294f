"""Captions and questions to prompts and labels: exactly the target is learned, nothing is cut silently."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from blip2_hf.augmentation import TrainingAugmentation
from blip2_hf.data.captions import normalise_answer
from blip2_hf.data.collator import PairTransform
from blip2_hf.data.generation import CaptionTransform, QuestionTransform
from blip2_hf.data.samples import QuestionAnswer
from blip2_hf.data.skipped import SkipSample
from blip2_hf.data.target_rows import split_at_word
from blip2_hf.presets import VQA_PROMPTS
from blip2_hf.processing import Blip2Processor
from tiny_images import encoded, photo
from tiny_processors import QUERIES, TOKENIZERS, tiny_processor
from tiny_tokenizers import WORDS, tiny_bert_tokenizer

KINDS = tuple(TOKENIZERS)
ENDS = {"opt": "\n", "t5": "</s>", "llama": "</s>"}
AUGMENTATION = TrainingAugmentation(14)
CAPTION = "a dog, running on the beach"


def make(kind: str, **settings) -> Blip2Processor:
    return tiny_processor(kind, suffix_end="\n" if kind == "opt" else None, **settings)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def captions(kind: str, **options) -> CaptionTransform:
    return CaptionTransform(AUGMENTATION, make(kind), **options)


def questions(kind: str, **options) -> QuestionTransform:
    return QuestionTransform(AUGMENTATION, make(kind), **options)


def learned(transform, sample: dict) -> str:
    """The text of the labels, end token included."""
    return transform.rows.processor.tokenizer.decode([label for label in sample["labels"] if label != -100])


def prompt_ids(transform, sample: dict) -> list[int]:
    """What stands before the target, placeholders included."""
    if transform.rows.processor.is_encoder_decoder:
        assert -100 not in sample["labels"]
        return sample["input_ids"]
    assert len(sample["labels"]) == len(sample["input_ids"])
    start = sample["labels"].count(-100)
    assert sample["labels"] == [-100] * start + sample["input_ids"][start:]
    return sample["input_ids"][:start]


def in_generation(processor: Blip2Processor, prompt: str) -> list[int]:
    return processor(text=prompt, image_placeholders=processor.num_query_tokens is not None)["input_ids"][0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "a photo of", "a photo of "])
def test_exactly_the_caption_is_learned(kind: str, prompt: str) -> None:
    transform = captions(kind, prompt=prompt)
    sample = transform(photo(30, 20), CAPTION + ".", rng(1))
    assert set(sample) == {"pixel_values", "input_ids", "labels", "truncated"}
    assert learned(transform, sample).strip(" ") == CAPTION + ENDS[kind]
    assert prompt_ids(transform, sample) == in_generation(transform.rows.processor, prompt)
    assert sample["truncated"] == 0
    assert np.array_equal(sample["pixel_values"], AUGMENTATION(photo(30, 20), rng(1)))
    assert sample["pixel_values"].shape == (3, 14, 14) and sample["pixel_values"].dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_models_that_put_the_image_first_themselves(kind: str, prompt: str) -> None:
    processor = make(kind, num_query_tokens=None)
    transform = CaptionTransform(AUGMENTATION, processor, prompt=prompt)
    sample = transform.encode_caption(CAPTION, rng())
    assert prompt_ids(transform, sample) == in_generation(processor, prompt)
    whole = captions(kind, prompt=prompt).encode_caption(CAPTION, rng())
    assert sample["input_ids"] == whole["input_ids"][QUERIES:]
    assert learned(transform, sample).strip() == (CAPTION + ENDS[kind]).strip()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "a photo of"])
@pytest.mark.parametrize("length", [2, 3, 5, 7])
def test_long_captions_keep_their_end_token_and_are_counted(kind: str, prompt: str, length: int) -> None:
    whole = captions(kind, prompt=prompt).encode_caption(CAPTION, rng())
    transform = captions(kind, prompt=prompt, max_length=length)
    sample = transform.encode_caption(CAPTION, rng())
    assert prompt_ids(transform, sample) == prompt_ids(transform, whole), "the prompt does not count"
    target, all_of_it = ([label for label in some["labels"] if label != -100] for some in (sample, whole))
    assert len(all_of_it) > 7
    assert target == [*all_of_it[: length - 1], all_of_it[-1]]
    assert (sample["truncated"], whole["truncated"]) == (1, 0)
    exact = captions(kind, prompt=prompt, max_length=len(all_of_it)).encode_caption(CAPTION, rng())
    assert exact == whole


def test_a_caption_longer_than_the_tokenizer_allows_is_cut_too() -> None:
    for kind in KINDS:
        transform = captions(kind, caption=None)
        sample = transform.encode_caption("dog " * 2000, rng())
        assert sample["truncated"] == 1 and len([label for label in sample["labels"] if label != -100]) == 32


WORD = st.sampled_from(WORDS)


@given(words=st.lists(WORD, min_size=1, max_size=12), prompt=st.sampled_from(["", "a photo of"]), seed=st.integers(0))
@settings(max_examples=150, deadline=None)
def test_prefix_and_suffix_make_the_caption(words: list[str], prompt: str, seed: int) -> None:
    caption = " ".join(words)
    transform = captions("t5", target="prefix_lm", prompt=prompt)
    sample = transform.encode_caption(caption, rng(seed))
    suffix = learned(transform, sample)
    assert suffix.endswith("</s>") and suffix != "</s>"
    encoder = transform.rows.processor.tokenizer.decode(sample["input_ids"][QUERIES:], skip_special_tokens=True)
    joined = f"{encoder} {suffix.removesuffix('</s>')}".split()
    assert joined == [*prompt.split(), *words]
    assert sample["truncated"] == 0
    # the encoder reads what it would in generation
    assert sample["input_ids"] == in_generation(transform.rows.processor, encoder)


@given(text=st.text(st.sampled_from("ab \n\t"), min_size=1).filter(str.strip), seed=st.integers(0))
@settings(deadline=None)
def test_a_split_leaves_every_character_but_the_space_between(text: str, seed: int) -> None:
    prefix, suffix = split_at_word(text, rng(seed))
    assert text.startswith(prefix) and text.endswith(suffix)
    assert not text[len(prefix) : len(text) - len(suffix)].strip()
    assert suffix.strip() and not suffix[0].isspace() and prefix == prefix.rstrip()


def test_every_split_is_as_likely() -> None:
    transform = captions("t5", target="prefix_lm")
    source = rng(3)
    counts = Counter(learned(transform, transform.encode_caption("one two red dog", source)) for _ in range(400))
    assert {text.strip() for text in counts} == {"one two red dog</s>", "two red dog</s>", "red dog</s>", "dog</s>"}
    assert min(counts.values()) > 65  # expected 100, standard deviation 8.7


def test_the_split_depends_on_the_generator_alone() -> None:
    transform = captions("t5", target="prefix_lm")

    def drawn(seed: int) -> list[dict]:
        source = rng(seed)
        return [transform.encode_caption(CAPTION, source) for _ in range(8)]

    first = drawn(1)
    np.random.seed(5)
    assert drawn(1) == first != drawn(2)


@pytest.mark.parametrize("seed", range(8))
def test_a_caption_that_is_split_has_one_limit_for_both_parts(seed: int) -> None:
    words = "one two red dog in the snow and a cat".split()
    transform = captions("t5", target="prefix_lm", max_length=6)
    sample = transform.encode_caption(" ".join(words), rng(seed))
    prefix = transform.rows.processor.tokenizer.decode(sample["input_ids"][QUERIES:], skip_special_tokens=True)
    kept = (prefix + " " + learned(transform, sample).removesuffix("</s>")).split()
    assert kept == words[:5] and sample["truncated"] == 1
    word = "x" * 30  # not a word of the tokenizer: a token per letter
    sample = transform.encode_caption(f"{word} dog", rng(seed))
    assert len(sample["labels"]) == 6 and sample["labels"][-1] == 1 and sample["truncated"] == 1


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_prefix_lm_needs_an_encoder(kind: str) -> None:
    with pytest.raises(ValueError, match="`target` 'prefix_lm' needs an encoder"):
        captions(kind, target="prefix_lm")


@pytest.mark.parametrize("kind", KINDS)
def test_question_and_answer(kind: str) -> None:
    transform = questions(kind)
    sample = transform(photo(30, 20), QuestionAnswer("What is the Dog doing?", "Playing ball."), rng(1))
    processor = transform.rows.processor
    template = VQA_PROMPTS["encoder-decoder" if processor.is_encoder_decoder else "decoder-only"]
    assert prompt_ids(transform, sample) == in_generation(processor, template.format("what is the dog doing?"))
    assert learned(transform, sample).strip(" ") == "Playing ball." + ENDS[kind], "answers as in the source"
    assert set(sample) == {"pixel_values", "input_ids", "labels", "truncated"}
    assert np.array_equal(sample["pixel_values"], AUGMENTATION(photo(30, 20), rng(1)))

    normalised = questions(kind, answer=normalise_answer, prompt="{}", question=None)
    sample = normalised.encode_question(QuestionAnswer("What is {this}?", "Playing ball."))
    assert prompt_ids(normalised, sample) == in_generation(processor, "What is {this}?")
    assert learned(normalised, sample).strip(" ") == "playing ball" + ENDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_question_goes_to_the_qformer_without_the_prompt(kind: str) -> None:
    bert = tiny_bert_tokenizer()
    processor = make(kind, qformer_tokenizer=bert)
    transform = QuestionTransform(AUGMENTATION, processor)
    sample = transform.encode_question(QuestionAnswer("What is this?", "a cat"))
    assert sample["qformer_input_ids"] == bert("what is this?")["input_ids"]
    plain = questions(kind).encode_question(QuestionAnswer("What is this?", "a cat"))
    assert {name: sample[name] for name in plain} == plain
    caption = CaptionTransform(AUGMENTATION, processor, prompt="a photo of").encode_caption(CAPTION, rng())
    assert caption["qformer_input_ids"] == bert("a photo of")["input_ids"], "as the processor does in generation"


@pytest.mark.parametrize("kind", KINDS)
def test_long_answers_are_cut_and_long_questions_skipped(kind: str) -> None:
    sample = questions(kind, max_length=3).encode_question(QuestionAnswer("what?", CAPTION))
    target = [label for label in sample["labels"] if label != -100]
    assert len(target) == 3 and target[-1] == make(kind).suffix_end_id and sample["truncated"] == 1

    asked = QuestionAnswer("what is the dog doing?", "yes")
    sample = questions(kind).encode_question(asked)
    length = len(prompt_ids(questions(kind), sample)) - QUERIES
    assert questions(kind, max_prompt_length=length).encode_question(asked) == sample
    with pytest.raises(SkipSample, match="prompt too long"):
        questions(kind, max_prompt_length=length - 1).encode_question(asked)


def test_a_question_too_long_for_the_qformer_is_skipped() -> None:
    processor = make("t5", qformer_tokenizer=tiny_bert_tokenizer())
    transform = QuestionTransform(AUGMENTATION, processor, max_prompt_length=10**4, question=None)
    with pytest.raises(SkipSample, match="prompt too long"):
        transform.encode_question(QuestionAnswer("dog " * 600, "yes"))


@pytest.mark.parametrize("kind", KINDS)
def test_for_training_and_evaluation(kind: str) -> None:
    processor, image = make(kind), photo(30, 20)
    augmentation = TrainingAugmentation.from_image_processor(processor.image_processor, scale=(0.9, 1.0), flip=0.0)
    text = QuestionAnswer("what?", CAPTION)
    for cls, content in ((CaptionTransform, CAPTION), (QuestionTransform, text)):
        train = cls.for_training(processor, max_length=4, scale=(0.9, 1.0), flip=0.0)(image, content, rng(2))
        assert np.array_equal(train["pixel_values"], augmentation(image, rng(2)))
        assert train["truncated"] == 1
        evaluate = cls.for_evaluation(processor)(encoded(image), content, rng(2))
        assert np.array_equal(
            evaluate["pixel_values"], processor.image_processor(image, return_tensors="np")["pixel_values"][0]
        )
        assert evaluate["truncated"] == 0
    other = QuestionTransform.for_evaluation(processor, prompt="Q: {} A:", max_prompt_length=99, answer=str.upper)
    sample = other.encode_question(QuestionAnswer("what?", "dog"))
    assert prompt_ids(other, sample) == in_generation(processor, "Q: what? A:")
    assert learned(other, sample).strip(" ") == "DOG" + ENDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_can_be_pickled(kind: str) -> None:
    for transform, text in (
        (CaptionTransform.for_training(make(kind), prompt="a photo of"), CAPTION),
        (QuestionTransform.for_evaluation(make(kind)), QuestionAnswer("what?", "a dog")),
    ):
        copy = pickle.loads(pickle.dumps(transform))
        one, other = (some(photo(30, 20), text, rng(4)) for some in (transform, copy))
        assert np.array_equal(one.pop("pixel_values"), other.pop("pixel_values"))
        assert one == other


@pytest.mark.parametrize("kind", KINDS)
def test_unusable_texts_are_skipped(kind: str) -> None:
    for text, reason in (("...", "blank caption"), (" \n", "blank caption"), ("an <image> here", "image token")):
        with pytest.raises(SkipSample, match=reason):
            captions(kind).encode_caption(text, rng())
    for text, reason in (
        (QuestionAnswer("...", "a dog"), "blank question"),
        (QuestionAnswer("what?", "  "), "question without answer"),
        (QuestionAnswer("is <image> one?", "yes"), "image token"),
        (QuestionAnswer("what?", "<image>"), "image token"),
    ):
        with pytest.raises(SkipSample, match=reason):
            questions(kind).encode_question(text)
    with pytest.raises(SkipSample, match="question without answer"):
        questions(kind, answer=normalise_answer).encode_question(QuestionAnswer("what?", "."))


def test_a_target_without_any_word_is_skipped() -> None:
    for text in ("犬", "</s>"):  # unknown, or the end alone
        with pytest.raises(SkipSample, match="blank caption"):
            captions("t5", caption=None).encode_caption(text, rng())
    with pytest.raises(SkipSample, match="question without answer"):
        questions("t5").encode_question(QuestionAnswer("what?", "犬"))


def test_sets_of_the_other_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="`caption` must be a string, got QuestionAnswer; .*QuestionTransform"):
        captions("opt")(photo(30, 20), QuestionAnswer("what?", "a dog"), rng())
    with pytest.raises(ValueError, match="`caption` must be a string, got QuestionAnswer; .*QuestionTransform"):
        PairTransform(AUGMENTATION, tiny_bert_tokenizer())(photo(30, 20), QuestionAnswer("what?", "a dog"), rng())
    with pytest.raises(ValueError, match="`text` must be a QuestionAnswer, got str; a set of captions needs Caption"):
        questions("opt")(photo(30, 20), "a dog", rng())
    with pytest.raises(ValueError, match="`text` must be a QuestionAnswer, got tuple$"):
        questions("opt")(photo(30, 20), ("what?", "a dog"), rng())


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (CaptionTransform, {"target": "suffix"}, r"`target` must be one of \('whole', 'prefix_lm'\), got 'suffix'"),
        (CaptionTransform, {"max_length": 1}, "`max_length` must be an int of at least 2 .* got 1"),
        (CaptionTransform, {"max_length": 32.0}, "`max_length` must be an int of at least 2"),
        (CaptionTransform, {"prompt": None}, "`prompt` must be a string, got NoneType"),
        (CaptionTransform, {"prompt": "<image> a photo of"}, "`prompt` must not have '<image>'"),
        (QuestionTransform, {"prompt": "Answer:"}, r"`prompt` must have {} where the question goes, got 'Answer:'"),
        (QuestionTransform, {"max_prompt_length": 0}, "`max_prompt_length` must be a positive int, got 0"),
    ],
)
def test_bad_settings(cls: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(AUGMENTATION, make("t5"), **options)


def test_bad_parts() -> None:
    with pytest.raises(ValueError, match="`image_transform` must be callable, got NoneType"):
        CaptionTransform(None, make("opt"))
    processor = make("llama")
    processor.suffix_end_id = None
    with pytest.raises(ValueError, match="`processor` must have an end token"):
        QuestionTransform(AUGMENTATION, processor)


@pytest.mark.parametrize("kind", [CaptionTransform, QuestionTransform, PairTransform])
@pytest.mark.parametrize("made", ["for_training", "for_evaluation"])
def test_a_processor_is_needed(kind, made: str) -> None:
    with pytest.raises(ValueError, match="`processor` must be a Blip2Processor, got NoneType"):
        getattr(kind, made)(None)
