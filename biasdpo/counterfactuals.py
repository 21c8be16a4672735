"""Sentences about one group and about another, and questions that a text does or does not answer.

The counterfactual terms of training draw them (`training.losses`), from the templates of assets/counterfactuals.toml.

Training on a text and its counterfactual, in which the group is another: Kusner et al., 2017 (arXiv:1703.06856), and Garg et al.,
2019 (arXiv:1809.10610, counterfactual logit pairing). The templates are our own.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from biasdpo.workspace import ASSETS

FILE = ASSETS / "counterfactuals.toml"

# Tables of FILE that twins are drawn from, with their relative frequency.
_KINDS = {"adjectives": 6, "plurals": 4, "countries": 4, "natures": 3, "names": 2, "alone": 3, "together": 4}
_FOLLOWED = 0.3  # share of sentences that another one follows
_ANSWERED = 0.8  # share of questions that the text answers: with fewer, a model learns to say that it never does
_PARAPHRASED = 0.4  # share of these in which the text does not use the question's words
_OF_ONE = 0.2  # share of these in which the text says only what one of the two people did
_FILLED = 0.4  # share of questions before and after which an unrelated sentence stands
_UNKNOWNS = 3  # ways to say "unknown" among the wrong answers of an answered question
_OWN = 0.3  # share of people distinguished by an adjective whom the writer calls "my"
_PRONOUNS = {"they": ("he", "she"), "them": ("him", "her"), "their": ("his", "her")}

Parts = list[str | tuple[str, str]]


@dataclass(frozen=True)
class Twins:
    """One text about two groups. `parts`, in order: text that both share, or a tuple of what differs."""

    parts: tuple[str | tuple[str, str], ...]

    def texts(self) -> tuple[str, str]:
        one, other = ("".join(part if isinstance(part, str) else part[i] for part in self.parts) for i in (0, 1))
        return one, other


@dataclass(frozen=True)
class Question:
    """A text that ends with a question, the answer that it supports, and some that it does not. `answered`: whether the text says
    which of two people is meant; otherwise the right answer is that it does not say."""

    context: str
    right: str
    wrong: tuple[str, ...]
    answered: bool


@dataclass(frozen=True)
class _Person:
    """A person when first mentioned ("a man", "my Greek friend"), later in the text ("the man", "my Greek friend"), and in an
    answer ("the man", "the Greek friend")."""

    first: str
    later: str
    answer: str


class Counterfactuals:
    """The templates. The same state of `draw` gives the same text."""

    def __init__(self, file: Path = FILE) -> None:
        self._tables: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        self._jobs: dict[str, list[str]] = self._tables["jobs"]
        self._subjects: dict[str, list[str]] = self._tables["subjects"]

    def twins(self, draw: Random) -> Twins:
        """One text about two groups of one kind (two religions, two genders)."""
        (kind,) = draw.choices(list(_KINDS), list(_KINDS.values()))
        if kind == "alone":
            return _with_pronouns(draw.choice(self._jobs["alone"]).replace("{job}", draw.choice(self._jobs["names"])), draw)
        if kind == "together":
            return self._two_jobs(draw)
        if kind in ("countries", "natures"):
            template, ending = (draw.choice(self._tables[kind][part]) for part in ("openings", "endings"))
            terms = self._tables["countries"]["names"] if kind == "countries" else self._jobs["names"]
        elif kind == "adjectives":
            template, terms = draw.choice(self._subjects["openings"]), draw.choice(list(self._tables["adjectives"].values()))
            template = template.replace("{noun}", draw.choice(self._subjects["nouns"]))
            ending = draw.choice(self._subjects["predicates"])
        elif kind == "plurals":
            template = draw.choice(self._subjects["leads"]) + "{group}"
            terms = draw.choice(list(self._tables["plurals"].values()))
            ending = draw.choice(self._subjects["plural_predicates"])
        else:
            template, terms = "{group}", draw.choice(draw.choice(list(self._tables["names"].values())))
            ending = draw.choice(self._subjects["predicates"])
        if draw.random() < _FOLLOWED:
            ending += " " + draw.choice(self._subjects["followers"])
        before, after = template.split("{group}")
        one, other = draw.sample(terms, 2)
        if not before:
            one, other = _capitalized(one), _capitalized(other)
        return _twins([before, (one, other), f"{after} {ending}"])

    def _two_jobs(self, draw: Random) -> Twins:
        """A sentence with two jobs and a pronoun, and who is meant, which may be either."""
        job, other = draw.sample(self._jobs["names"], 2)
        sentence = draw.choice(self._jobs["together"])
        who = draw.choice(self._jobs["asked"]).replace("{one}", draw.choice([job, other]))
        pronoun = next(name for name in _PRONOUNS if f"{{{name}}}" in sentence)
        who = who.replace("{They}", f"{{{pronoun.capitalize()}}}")
        return _with_pronouns(sentence.replace("{job}", job).replace("{other}", other) + who, draw)

    def question(self, draw: Random) -> Question:
        """A question about two people, of whom the text says, or does not say, which did what."""
        tables = self._tables["questions"]
        people = self._two_people(draw)
        deeds = draw.choice(tables["deeds"])
        a, b = (person.first for person in people)
        scene = draw.choice(tables["scenes"])
        text = scene.format(place=draw.choice(tables["places"]), a=a, b=b, A=_capitalized(a), B=_capitalized(b))
        if draw.random() < _FILLED:
            text += " " + draw.choice(tables["fillers"])
        asked = draw.randrange(2)
        who, other = draw.sample(people, 2)
        answered = draw.random() < _ANSWERED
        if answered:
            said = deeds[2:] if draw.random() < _PARAPHRASED else deeds[:2]
            roles = [(who, said[asked]), (other, said[1 - asked])]
            if draw.random() < _OF_ONE:
                template = draw.choice(tables["decides_of_one"])
            else:
                template = draw.choice(tables["decides"])
                draw.shuffle(roles)
            (one, did), (two, not_) = roles
            slots = {"who": one.later, "did": did, "other": two.later, "not": not_}
            text += " " + template.format(**slots, Who=_capitalized(one.later), Other=_capitalized(two.later))
        if draw.random() < _FILLED:
            text += " " + draw.choice(tables["fillers"])
        question = draw.choice(tables["questions"]).format(deed=deeds[asked])
        context = text + draw.choice(tables["asks"]).format(question=question)
        space = "" if context.endswith("\n") else " "
        right, wrong = (f"{space}{_capitalized(person.answer)}" for person in (who, other))
        unknown = [f"{space}{way}" for way in draw.sample(tables["unknown"], _UNKNOWNS)]
        if answered:
            return Question(context, right, (wrong, *unknown), True)
        return Question(context, unknown[0], (right, wrong), False)

    def _two_people(self, draw: Random) -> list[_Person]:
        tables, adjectives = self._tables["questions"], self._tables["adjectives"]
        kind = draw.choice(["genders", "names", *adjectives])
        if kind == "names":
            group = draw.choice(draw.choice(list(self._tables["names"].values())))
            return [_Person(name, name, name) for name in draw.sample(group, 2)]
        if kind == "genders":
            terms = draw.sample(draw.choice(tables["genders"]), 2)
        elif draw.random() < _OWN:
            noun = draw.choice(tables["own"])
            terms = [f"{term} {noun}" for term in draw.sample(adjectives[kind], 2)]
            return [_Person(f"my {term}", f"my {term}", f"the {term}") for term in terms]
        else:
            noun = draw.choice(tables["nouns"])
            terms = [f"{term} {noun}" for term in draw.sample(adjectives[kind], 2)]
        articles = ["an" if term[0].lower() in "aeiou" else "a" for term in terms]
        return [_Person(f"{article} {term}", *[f"the {term}"] * 2) for article, term in zip(articles, terms, strict=True)]


def _with_pronouns(text: str, draw: Random) -> Twins:
    """Twins of a text whose pronouns are slots ("{they}", "{Their}"); either gender may come first."""
    order = draw.sample([0, 1], 2)
    parts: Parts = []
    for i, piece in enumerate(re.split(r"\{([Tt]he(?:y|m|ir))\}", text)):
        if i % 2 == 0:
            parts.append(piece)
        else:
            words = _PRONOUNS[piece.lower()]
            one, other = (words[k].capitalize() if piece[0] == "T" else words[k] for k in order)
            parts.append((one, other))
    return _twins(parts)


def _twins(parts: Parts) -> Twins:
    """Twins in which a differing part begins with the space before it, as words do in a tokenizer's vocabulary."""
    moved: Parts = []
    for part in parts:
        if isinstance(part, tuple) and moved and isinstance(moved[-1], str) and moved[-1].endswith(" "):
            moved[-1] = moved[-1][:-1]
            part = (f" {part[0]}", f" {part[1]}")
        moved.append(part)
    return Twins(tuple(part for part in moved if part))


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]
