"""The engine: what each kind of step makes, what is checked, what is refused."""

from __future__ import annotations

import pytest
import torch

from conversion.rows import Relation, Row, listed
from conversion.steps import Check, Conversion, How, Step, Target, TensorInfo, apply, check, plan
from original_keys import infos

Tensors = dict[str, torch.Tensor]

WORDS = Row("words", "language_model.words", Relation.VOCABULARY, source="llm")
AGAIN = Row("again", "language_model.head", Relation.TIED, "once more", tied_to="language_model.words", alone=True)
TABLE = (
    WORDS,
    AGAIN,
    Row("fixed.{n}.{p}", "ours.{n}.{p}"),
    Row("tower.{rest}", "ours.{rest}", source="tower"),
    Row("old", None, Relation.DROPPED, "left over"),
    Row(None, "scale", Relation.DROPPED, "of ours", fill=0.5),
    Row(None, "head.{rest}", Relation.DROPPED, "of ours"),
)


def planned(tensors: Tensors, target: dict[str, tuple[int, ...]] | None = None, tied=None, **options) -> Conversion:
    named = {name: info for name, info in infos(tensors).items()}
    wanted = None
    if target is not None:
        wanted = Target({name: TensorInfo(shape, torch.float32) for name, shape in target.items()}, tied or {})
    return plan(TABLE, named, "to_ours", wanted, **options)


def made(conversion: Conversion, tensors: Tensors) -> Tensors:
    return {step.target: apply(step, tensors.__getitem__) for step in conversion.steps}


def test_source_target_and_everything_between_are_accounted_for():
    tensors = {"bridge:fixed.0.weight": torch.ones(2), "bridge:old": torch.ones(1), "llm:words": torch.ones(3, 2)}
    target = {"ours.0.weight": (2,), "language_model.words": (3, 2), "scale": (1,), "head.a.b": (2,)}
    conversion = planned(tensors, target)
    assert conversion.dropped == {"bridge:old": "left over"}
    assert conversion.generated == {"scale": "0.5: of ours"}
    assert conversion.absent == {"head.a.b": "of ours"}
    assert made(conversion, tensors)["scale"].tolist() == [0.5]
    assert conversion.steps[0] == Step("ours.0.weight", ("bridge:fixed.0.weight",), How.RENAMED, (2,), torch.float32)


def test_a_second_name_of_the_target_needs_no_tensor():
    tensors = {"llm:words": torch.ones(3, 2)}
    target = {"language_model.words": (3, 2), "language_model.head": (3, 2)}
    tied = {"language_model.head": "language_model.words"}
    assert planned(tensors, target, tied).tied == tied
    with pytest.raises(ValueError, match="1 keys which no source has: language_model.head"):
        planned(tensors, target)


def test_new_rows_are_the_mean_of_all():
    """Their logit is the mean of all logits, so that together they take no more than their share."""
    words = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    tensors = {"llm:words": words}
    conversion = planned(tensors, {"language_model.words": (60, 8)})
    grown = made(conversion, tensors)["language_model.words"]
    assert conversion.steps[0].how is How.GROWN
    assert torch.equal(grown[:50], words)
    torch.testing.assert_close(grown[50:], words.mean(0).expand(10, 8))
    hidden = torch.randn(100, 8, generator=torch.Generator().manual_seed(1)) * 3
    assert ((hidden @ grown.T).softmax(-1)[:, 50:].sum(-1) <= 10 / 60 + 1e-6).all()
    half = apply(conversion.steps[0], {"llm:words": words.half()}.__getitem__)
    assert half.dtype == torch.float16 and torch.equal(half[50:], half[50:51].expand(10, 8))


def test_only_a_vocabulary_grows():
    with pytest.raises(ValueError, match=r"1 keys of another shape: ours.0.weight \[2\] instead of \[3\]"):
        planned({"bridge:fixed.0.weight": torch.ones(2)}, {"ours.0.weight": (3,)})
    with pytest.raises(ValueError, match=r"language_model.words \[3, 2\] instead of \[2, 2\]"):
        planned({"llm:words": torch.ones(3, 2)}, {"language_model.words": (2, 2)})


def test_back_from_ours_the_vocabulary_is_cut():
    ours = {"bridge:language_model.words": torch.arange(8.0).reshape(4, 2)}
    conversion = plan(TABLE, infos(ours), "from_ours", vocabulary=3)
    assert torch.equal(made(conversion, ours)["words"], torch.arange(6.0).reshape(3, 2))
    whole = plan(TABLE, infos(ours), "from_ours")
    assert [step.how for step in whole.steps] == [How.RENAMED]


def run_checks(tensors: Tensors, target: dict[str, tuple[int, ...]] | None = None) -> None:
    for rule in planned(tensors, target).checks:
        check(rule, tensors.__getitem__)


def test_what_is_dropped_as_known_is_compared():
    words = torch.randn(9000, 4, generator=torch.Generator().manual_seed(0))
    run_checks({"llm:words": words, "bridge:again": words.clone()})
    run_checks({"llm:words": words, "bridge:again": words.bfloat16()})  # the original's precision
    run_checks({"llm:words": words.half(), "bridge:again": words.half().float()})
    run_checks({"llm:words": words, "bridge:again": words}, {"language_model.words": (9005, 4)})
    other = words.clone()
    other[8999, 3] += 0.1
    for changed in (other, other.bfloat16(), words[:, :2]):
        with pytest.raises(ValueError, match="'again' must be equal to words, and is not: it would be lost"):
            run_checks({"llm:words": words, "bridge:again": changed})


def test_counted_positions_are_compared():
    rule = Check("bridge:ids", Step("ids", (), How.COUNTED, (1, 4), torch.int64))
    check(rule, {"bridge:ids": torch.arange(4)[None]}.__getitem__)
    with pytest.raises(ValueError, match="'ids' must be equal to 0, 1, 2, …"):
        check(rule, {"bridge:ids": torch.arange(1, 5)[None]}.__getitem__)


def test_the_checkpoint_goes_before_the_towers_file():
    tensors = {"tower:tower.0.weight": torch.zeros(2), "bridge:fixed.0.weight": torch.ones(2)}
    conversion = planned(tensors)
    assert conversion.dropped == {"tower:tower.0.weight": "the checkpoint that is converted has its own"}
    assert made(conversion, tensors)["ours.0.weight"].tolist() == [1, 1]


def test_an_input_of_another_shape_than_planned_is_refused():
    (step,) = planned({"bridge:fixed.0.weight": torch.ones(2)}).steps
    with pytest.raises(ValueError, match=r"'ours.0.weight' must have shape \(2,\), but .* give \(3,\)"):
        apply(step, {"bridge:fixed.0.weight": torch.ones(3)}.__getitem__)


def test_all_kinds_of_faults_are_told_at_once():
    tensors = {"bridge:fixed.0.weight": torch.ones(2), "bridge:fixed.1.weight": torch.ones(2)}
    with pytest.raises(ValueError) as told:
        planned(tensors, {"ours.0.weight": (3,), "ours.2.weight": (2,)})
    message = str(told.value)
    assert "1 keys which no source has: ours.2.weight" in message
    assert "1 keys that the target has no place for: ours.1.weight" in message
    assert "1 keys of another shape: ours.0.weight [2] instead of [3]" in message


def test_names_of_a_source_are_explained_by_its_own_rows_only():
    with pytest.raises(ValueError, match="2 keys of the source are not in the table: words, llm:fixed.0.weight"):
        planned({"llm:fixed.0.weight": torch.ones(2), "bridge:words": torch.ones(2)})


def test_direction():
    with pytest.raises(ValueError, match="`direction` must be 'to_ours' or 'from_ours', got 'back'"):
        plan(TABLE, {}, "back")


def test_many_names_are_told_briefly_but_all_of_them():
    assert listed(["a.0.b", "a.1.b", "a.2.b", "c", "d.3.e"]) == "a.{0…2}.b, c, d.3.e"
    assert listed(["a.0.b", "a.2.b"]) == "a.{0, 2}.b"
    assert listed(["a.0.b.1.c", "a.1.b.1.c"]) == "a.0.b.1.c, a.1.b.1.c"
