"""Trains and uploads, in a process of its own: `huggingface_hub` reads its settings when it is imported."""

import sys
from pathlib import Path

from blip2_hf import Blip2ForImageTextRetrieval
from tiny_training import arguments, pairs, retrieval_model, trainer


def main() -> None:
    folder = Path(sys.argv[1])
    retrieval_model().push_to_hub("tester/base")
    model = Blip2ForImageTextRetrieval.from_pretrained("tester/base")
    model.freeze_vision()
    fields = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_connector_only": True}
    fields |= {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True}
    run = trainer(model, arguments(folder / "run", hub_model_id="tester/tuned", **fields), pairs(8))
    run.train()
    run.push_to_hub(license="mit", tags=["birds"])
    again = Blip2ForImageTextRetrieval.from_pretrained("tester/tuned")
    assert (again.query_tokens == run.model.query_tokens).all()

    local = folder / "local"
    retrieval_model().save_pretrained(local)
    model = Blip2ForImageTextRetrieval.from_pretrained(local)
    try:
        trainer(model, arguments(folder / "other", hub_model_id="tester/other", **fields), pairs(8))
    except ValueError as error:
        assert "only on" in str(error) or "on the Hub" in str(error), error
    else:
        raise AssertionError("a connector whose backbones nobody else has was accepted")


if __name__ == "__main__":
    main()
