"""Prompt files: the published one whole, and every way a row can be wrong."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import PUBLISHED_PROMPTS

from bicot.grpo.data import PromptFile, read_prompts, step_indices
from bicot.rewards.base import Example, NumeracyInfo, SpatialInfo

GOOD = {"prompt": "a cat", "task_type": "object"}


@pytest.mark.skipif(not PUBLISHED_PROMPTS.exists(), reason="the published prompts are not here")
def test_published_file_loads_whole() -> None:
    examples = PromptFile(PUBLISHED_PROMPTS).examples
    assert len(examples) == 7223
    assert Counter(e.task_type for e in examples)["spatial"] == 2195
    assert sum(e.spatial_info is not None for e in examples) == 2195 + 185
    assert examples[0].spatial_info == SpatialInfo("car", "zebra", "below")
    assert any(e.numeracy_info == (NumeracyInfo(4, "bandage"),) for e in examples)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"p\.jsonl:2: Expecting property name"),
        ("[1]", r"p\.jsonl:2: expected a JSON object on each line, got list"),
        ({"task_type": "object"}, r"p\.jsonl:2: prompt must be a non-empty string, got None"),
        ({**GOOD, "prompt": "  "}, r"p\.jsonl:2: prompt must be a non-empty string"),
        ({"prompt": "a"}, r"p\.jsonl:2: task_type must be"),
        ({**GOOD, "nuns": []}, r"p\.jsonl:2: unknown key 'nuns'"),
        ({**GOOD, "attr_noun": []}, r"p\.jsonl:2: unknown key 'attr_noun'; did you mean 'attr_nouns'"),
        ({**GOOD, "weight": {"a": [1.5, math.nan]}}, r"p\.jsonl:2: 'weight' has a number that is not finite"),
        ('{"prompt": "a cat", "task_type": "object", "far": 1e999}', r"p\.jsonl:2: 'far' has a number that is not"),
        ({**GOOD, "nouns": "cat"}, r"p\.jsonl:2: nouns must be a list"),
        ({**GOOD, "nouns": [1]}, r"p\.jsonl:2: nouns must hold non-empty strings"),
        ({**GOOD, "spatial_info": {"obj1": "a", "obj2": "b"}}, r"p\.jsonl:2: locality must be"),
        ({**GOOD, "numeracy_info": [{"num": "2", "obj_name": "a"}]}, r"p\.jsonl:2: numeracy_info.num must be a whole"),
        ({**GOOD, "numeracy_info": [3]}, r"p\.jsonl:2: numeracy_info must hold objects"),
        ({**GOOD, "prompt": "caf\ud800"}, r"p\.jsonl:2: '\\ud800' is half of a surrogate pair"),
        ({**GOOD, "nouns": ["cat", "\udc00"]}, r"p\.jsonl:2: '\\udc00' is half of a surrogate pair"),
        ({**GOOD, "\ud800": 1}, r"p\.jsonl:2: '\\ud800' is half of a surrogate pair"),
        ("[" * 100_000, r"p\.jsonl:2: nested too deeply"),
        ('{"prompt": "a cat", "task_type": "object", "nouns": ' + "[" * 600 + "]" * 600 + "}", r"p\.jsonl:2: "),
        (b'{"prompt": "a caf\xe9", "task_type": "object"}', r"p\.jsonl:2: byte 0xe9 at character 18 is not UTF-8"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "p.jsonl"
    text = row if isinstance(row, (str, bytes)) else json.dumps(row)
    lines = [json.dumps(GOOD).encode(), text if isinstance(text, bytes) else text.encode(), json.dumps(GOOD).encode()]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=message + ".*--skip_bad_prompts") as error:
        PromptFile(path)
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
    file = PromptFile(path, skip_bad=True)
    assert [number for number, _ in file.rows] == [1, 3] and len(file.examples) == 2
    assert file.said()[0].endswith("1 of 3 lines are left out:") and re.match(f".*{message}", file.said()[1])


def test_keys_of_the_user_s_own_are_kept(tmp_path: Path) -> None:
    own = {"id": 7, "must mention": ["fur", "été"], "source": {"url": None, "sharp": True}, "weight": 0.5}
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (GOOD, {**GOOD, **own}, {**GOOD, **own, "prompt": ""})))
    file = PromptFile(path, skip_bad=True)
    file.check(lambda example: None)
    assert [example.metadata for example in file.examples] == [{}, own]
    assert file.examples[1] != file.examples[0] and len(set(file.examples)) == 2  # an example is still hashable


def test_prompts_without_a_reward_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({**GOOD, "prompt": f"prompt {i}"}) for i in range(3)))
    file = PromptFile(path)
    assert file.unscored(lambda _: True) == []
    (said,) = file.unscored(lambda example: example.prompt == "prompt 0")
    assert said.startswith(f"{path}: no reward applies to 2 of 3 prompts") and "line 2: 'prompt 1'" in said
    with pytest.raises(ValueError, match=r"p\.jsonl: no reward applies to 3 of 3 prompts, so nothing can be trained"):
        file.unscored(lambda _: False)


def test_bad_rows_are_counted_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [GOOD if i % 3 else {**GOOD, "prompt": ""} for i in range(90)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=r"p\.jsonl:1: prompt must .* \(and 29 more\)"):
        PromptFile(path)
    numbers = iter(range(60))

    def odd_ones_only(example: Example) -> None:
        if next(numbers, 0) % 2 == 0:
            raise ValueError("even")

    file = PromptFile(path, skip_bad=True)
    file.check(odd_ones_only)
    assert len(file.examples) == 30
    first, *listed, last = file.said()
    assert first == f"{path}: 60 of 90 lines are left out:" and last == "  … and 40 more" and len(listed) == 20
    assert listed[:3] == [
        f"  {path}:1: prompt must be a non-empty string, got ''",
        f"  {path}:2: even",
        f"  {path}:4: prompt must be a non-empty string, got ''",
    ]
    numbers = iter(())
    with pytest.raises(ValueError, match=r"p\.jsonl:3: even \(and 29 more\); no line is left"):
        file.check(odd_ones_only)


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        "\r\n".join(json.dumps({**GOOD, "prompt": "a café"}, ensure_ascii=False) for _ in range(2)), "utf-8-sig"
    )
    assert [example.prompt for example in PromptFile(path).examples] == ["a café", "a café"]


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 3))
def test_each_epoch_sees_every_example_once(num_examples: int, batch: int, seed: int) -> None:
    steps = -(-3 * num_examples // batch)
    order = [i for step in range(steps) for i in step_indices(num_examples, batch, step, seed)]
    for epoch in range(3):
        assert sorted(order[epoch * num_examples : (epoch + 1) * num_examples]) == list(range(num_examples))


def test_prompts_to_draw_are_lines_or_rows(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(b"\xef\xbb\xbfa cat\r\n\n a dog \n")
    assert [example.prompt for example in read_prompts(str(file))] == ["a cat", "a dog"]
    file.write_text('{"prompt": "a cat", "nouns": ["cat"]}\n{"prompt": "a dog", "task_type": "color"}\n')
    cat, dog = read_prompts(str(file))
    assert (cat.prompt, cat.nouns, dog.task_type) == ("a cat", ("cat",), "color")
    for text, error in (
        ("\n", "has no prompts"),
        ('{"prompt": "a"}\na', "prompts:2: Expecting"),
        ("{}", ":1: prompt must"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=error):
            read_prompts(str(file))
    with pytest.raises(FileNotFoundError, match="no prompt file at nowhere; give lines of text"):
        read_prompts("nowhere")
