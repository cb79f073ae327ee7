"""What a misspelled key is taken for: a key that does the same, not one that looks the same."""

import pytest

from finetune.config import TrainArgs
from finetune.config.fields import all_fields, suggestions
from finetune.config.similar import _SYNONYMS


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("lora.enabled", ["lora.enable"]),
        ("ttt.enable", ["ttt.enabled"]),
        ("tt.enable", ["ttt.enabled"]),
        ("ttt.chunk-size", ["ttt.chunk_size"]),
        ("optim.learning_rate", ["optim.lr"]),
        ("learning_rate", ["optim.lr", "ttt.learning_rate"]),
        *(
            (unknown, ["optim.ttt_lr"])
            for unknown in ("optim.ttt.lr", "ttt.lr", "optim.ttt_learning_rate", "optim.lr_ttt")
        ),
        *((unknown, ["optim.ttt_lr"]) for unknown in ("ttt_lr", "lr_ttt", "ttt_learning_rate")),
        ("steps", ["max_steps"]),
        ("optim.steps", ["max_steps"]),
        ("overwrite", ["overwrite_run_dir"]),
        ("optim.batch_size", ["batch_size"]),
        ("lora.alpha", []),
        ("lora.enable", []),
    ],
)
def test_keys_of_the_same_section_come_first(unknown: str, meant: list[str]) -> None:
    assert suggestions(TrainArgs, unknown) == meant


def test_synonyms_lead_to_keys_and_are_none_themselves() -> None:
    keys = {field.key for field in all_fields(TrainArgs)}
    assert keys.issuperset(_SYNONYMS.values()) and keys.isdisjoint(_SYNONYMS)
