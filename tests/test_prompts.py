"""The ids of prompts: what stands at their ends, and that text stays text."""

from __future__ import annotations

import pytest
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from bicot.model.prompts import PromptEncoder, PromptFormat

FORMAT = PromptFormat("t2i_r1", "", "plan {}")


@pytest.mark.parametrize("template", ["$A", "<bos> $A", "<bos> $A <eos>", "<bos> <bos> $A"])
def test_ends_do_not_depend_on_what_the_tokenizer_adds(template: str) -> None:
    """The unconditional row of guidance begins and ends as the conditional one does."""
    tokenizer = tiny_tokenizer(61)
    want = PromptEncoder(tokenizer, FORMAT, 128).plan_ids("a red circle", 0)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    encoder = PromptEncoder(tokenizer, FORMAT, 128)
    ids = encoder.image_ids("a red circle", "two blue square", 16)
    row = encoder.unconditional_ids(len(ids))
    assert (ids[0], ids[-1]) == (row[0], row[-1]) == (tokenizer.bos_token_id, tokenizer.boi_token_id)
    assert not {0, 1, 5} & set(ids[1:-1])
    assert encoder.plan_ids("a red circle", 0) == want
