"""Prompt files: the published one whole, and every way a row can be wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PUBLISHED_PROMPTS

from bicot.grpo.data import load_examples, step_indices
from bicot.rewards.base import NumeracyInfo, SpatialInfo

GOOD = {"prompt": "a cat", "task_type": "object"}


@pytest.mark.skipif(not PUBLISHED_PROMPTS.exists(), reason="the published prompts are not here")
def test_published_file_loads_whole() -> None:
    examples = load_examples(PUBLISHED_PROMPTS)
    assert len(examples) == 7223
    assert Counter(e.task_type for e in examples)["spatial"] == 2195
    assert sum(e.spatial_info is not None for e in examples) == 2195 + 185
    assert examples[0].spatial_info == SpatialInfo("car", "zebra", "below")
    assert any(e.numeracy_info == (NumeracyInfo(4, "bandage"),) for e in examples)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"p\.jsonl:2: Expecting property name"),
        ("[1]", r"p\.jsonl:2: expected a JSON object, got list"),
        ({"task_type": "object"}, r"p\.jsonl:2: prompt must be a non-empty string, got None"),
        ({**GOOD, "prompt": "  "}, r"p\.jsonl:2: prompt must be a non-empty string"),
        ({"prompt": "a"}, r"p\.jsonl:2: task_type must be"),
        ({**GOOD, "nuns": []}, r"p\.jsonl:2: unknown key 'nuns'"),
        ({**GOOD, "nouns": "cat"}, r"p\.jsonl:2: nouns must be a list"),
        ({**GOOD, "nouns": [1]}, r"p\.jsonl:2: nouns must hold non-empty strings"),
        ({**GOOD, "spatial_info": {"obj1": "a", "obj2": "b"}}, r"p\.jsonl:2: locality must be"),
        ({**GOOD, "numeracy_info": [{"num": "2", "obj_name": "a"}]}, r"p\.jsonl:2: numeracy_info.num must be a whole"),
        ({**GOOD, "numeracy_info": [3]}, r"p\.jsonl:2: numeracy_info must hold objects"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(ValueError, match=message):
        load_examples(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--train_file"):
        load_examples(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        load_examples(tmp_path / "empty.jsonl")


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 3))
def test_each_epoch_sees_every_example_once(num_examples: int, batch: int, seed: int) -> None:
    steps = -(-3 * num_examples // batch)
    order = [i for step in range(steps) for i in step_indices(num_examples, batch, step, seed)]
    for epoch in range(3):
        assert sorted(order[epoch * num_examples : (epoch + 1) * num_examples]) == list(range(num_examples))
