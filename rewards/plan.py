"""The plan reward scores whether the plan says what the prompt asks for. It compares words with annotations.

The annotations are a set A of facts. What the plan says about the same things is a set P of facts:

    thing      a phrase of nouns, attr_nouns, spatial_info or numeracy_info, such as "apple" or "red apple"
    count      a number and the thing that numeracy_info counts, such as 3 "bottle"
    relation   the two things of spatial_info, and where the first stands from the second

    score = F1 = 2 |A ∩ P| / (|A| + |P|),   precision = |A ∩ P| / |P|,   recall = |A ∩ P| / |A|

A plan may add details that the prompt leaves open. Contradictions lower the precision: another number of a counted
thing, another direction between the two things, or another attribute of a thing that has one. A contradicting attribute
stands right before the thing ("green apple" where a red one is asked for) and is another attribute of the prompt, or a
colour in place of a colour. The words of a thing stand together; case, plural and number words do not matter: "Three
bottles" is 3 "bottle". In a sentence

- a number counts the next counted thing, with at most two words between ("three tall glass bottles"). "a" is 1 only if
  1 is asked for, because a plan may describe three bottles and then go on about "a bottle";
- a relation stands between its two things. "A left of B" is "B right of A", and "above" is "on top of". "near" counts
  only if it is asked for, because a thing can be near another and left of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ..kernels.host import upload
from .base import Example
from .layout import DIRECTIONS, NEAR, fold

Words = tuple[str, ...]
Fact = tuple[object, ...]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
OTHER_FORMS = {"people": "person", "children": "child", "mice": "mouse", "geese": "goose", "feet": "foot"}
OTHER_FORMS |= {"teeth": "tooth", "grey": "gray", "lenses": "lens", "canvases": "canvas", "thermoses": "thermos"}
OTHER_FORMS |= {"gases": "gas", "atlases": "atlas", "irises": "iris", "rhinoceroses": "rhinoceros"}
SYNONYMS = {  # what plans say -> what prompts say
    "over": "above",
    "under": "below",
    "underneath": "below",
    "beneath": "below",
    "left side of": "left of",
    "right side of": "right of",
    "side of": "near",
    "beside": "near",
}
END = "."  # stands for the end of a sentence in a list of words


class PlanReward:
    """F1 of the facts in the plan, in [0, 1]; see the module's docstring."""

    name = "plan"

    def applies(self, example: Example) -> bool:
        """Whether the prompt has annotations."""
        return bool(asked(example))

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """S examples with their plans -> [S] float32 on the device of `images`, which are not used otherwise."""
        scores = []
        for example in examples:
            wanted, stated = asked(example), said(example)
            scores.append(2 * len(wanted & stated) / (len(wanted) + len(stated)))
        return upload(scores, images.device)


def asked(example: Example) -> set[Fact]:
    """A: the facts of the annotations."""
    facts: set[Fact] = {("thing", name) for name in map(words, _names(example)) if name}
    facts |= {("count", str(entry.num), words(entry.obj_name)) for entry in example.numeracy_info}
    if info := example.spatial_info:
        facts.add(relation(words(info.obj1), info.locality, words(info.obj2)))
    return facts


def said(example: Example) -> set[Fact]:
    """P: the facts of the plan about the things of the annotations."""
    plan, wanted = words(example.plan), asked(example)
    names = map(words, _names(example))
    facts: set[Fact] = {("thing", name) for name in names if any(spans(plan, [name]))}
    return facts | _attributes(plan, example) | _counts(plan, example, wanted) | _relations(plan, example, wanted)


def _names(example: Example) -> list[str]:
    """All things of the annotations."""
    info = example.spatial_info
    pair = [info.obj1, info.obj2] if info else []
    return [*example.nouns, *example.attr_nouns, *pair, *(entry.obj_name for entry in example.numeracy_info)]


def words(text: str) -> Words:
    """A text as stems, with numbers as digits, and END at the end of a sentence: "Two knives." -> "2", "knif", "."."""
    return tuple(_stem(word) for word in re.findall(r"\w+|[.!?;:\n]", text.lower()))


def _stem(word: str) -> str:
    """A form that singular and plural share; it need not be a word."""
    if word in NUMBERS:
        return str(NUMBERS.index(word))
    if not word[0].isalnum():
        return END
    word = OTHER_FORMS.get(word, re.sub("men$", "man", word))
    stem = re.sub("(?<!e)es$|(?<![su])s$|(?<!e)e$", "", word) if len(word) > 2 else word
    return re.sub("v$", "f", re.sub("y$", "i", stem))


def spans(plan: Words, phrases: Sequence[Words]) -> Iterator[tuple[int, int, Words]]:
    """Find the phrases in the plan -> start, end and phrase. They do not overlap; the longest one has precedence."""
    start = 0
    while start < len(plan):
        longest = max((p for p in phrases if plan[start : start + len(p)] == p), key=len, default=())
        if longest:
            yield start, start + len(longest), longest
        start += len(longest) or 1


COLOURS = set(words("red orange yellow green blue purple pink brown black white gray"))
NO_ATTRIBUTES = set(words("a an the and or of in on with"))


def _attributes(plan: Words, example: Example) -> set[Fact]:
    """Find contradictions: things with an attribute that belongs to another thing, or with another colour."""
    nouns = sorted(map(words, example.nouns), key=len)
    own: dict[Words, set[str]] = {}  # thing -> its attributes
    phrases = list(map(words, example.attr_nouns))
    for phrase in phrases:
        thing = next((noun for noun in reversed(nouns) if phrase[-len(noun) :] == noun), phrase[-1:])
        own.setdefault(thing, set()).update(phrase[: len(phrase) - len(thing)])
    every = set().union(*own.values()) - NO_ATTRIBUTES
    facts: set[Fact] = set()
    for start, _, thing in spans(plan, [*own, *phrases]):  # also the phrases, which may contain another thing
        right = own.get(thing, set())
        wrong = (every | COLOURS if right & COLOURS else every) - right
        if right and start and plan[start - 1] in wrong:
            facts.add(("thing", (plan[start - 1], *thing)))
    return facts


def _counts(plan: Words, example: Example, wanted: set[Fact]) -> set[Fact]:
    things = [words(entry.obj_name) for entry in example.numeracy_info]
    facts: set[Fact] = set()
    last = 0  # end of the previous thing: a number counts one thing only
    for start, end, thing in spans(plan, things):
        for word in reversed(plan[max(last, start - 3) : start]):
            if word in (END, "of"):  # "one of the dogs"
                break
            if word.isdecimal() or word in ("a", "an"):
                fact = ("count", word if word.isdecimal() else "1", thing)
                facts |= {fact} if word.isdecimal() else {fact} & wanted
                break
        last = end
    return facts


def relation(one: Words, locality: str, two: Words) -> Fact:
    """The fact that `one` is `locality` `two`. It is equal for all ways to say it."""
    kind = SYNONYMS.get(fold(locality), fold(locality))
    if kind in NEAR:
        return ("near", *sorted((one, two)))
    axis, sign = DIRECTIONS.get(kind, (kind, 1))
    return ("relation", axis, one, two) if sign > 0 else ("relation", axis, two, one)


def _relations(plan: Words, example: Example, wanted: set[Fact]) -> set[Fact]:
    info = example.spatial_info
    if info is None:
        return set()
    things = {words(info.obj1), words(info.obj2)}
    known = {words(locality): locality for locality in (*DIRECTIONS, *NEAR, *SYNONYMS, info.locality)}
    facts: set[Fact] = set()
    for (_, end, one), (start, _, two) in pairwise(spans(plan, list(things))):
        between = plan[end:start]
        if {one, two} == things and END not in between:
            for _, behind, phrase in spans(between, list(known)):
                if between[behind : behind + 1] not in (("it",), ("them",)):  # "a chair, and above it a dog"
                    facts.add(relation(one, known[phrase], two))
    return {fact for fact in facts if fact[0] == "relation" or fact in wanted}
