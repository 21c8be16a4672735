"""Sentences said of one group and of another, and questions that a text does or does not answer: what the counterfactual terms of
training draw (`training.losses`). Built from the templates of assets/counterfactuals.toml; no two draws need be alike.

The idea of training on a text and its counterfactual, in which the group is another: Kusner et al., 2017 (arXiv:1703.06856), and
Garg et al., 2019 (arXiv:1809.10610, counterfactual logit pairing). The templates are our own.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from biasdpo.workspace import ASSETS

FILE = ASSETS / "counterfactuals.toml"

# What a draw of twins is about: tables of FILE by how often they are drawn.
_KINDS = {"adjectives": 6, "plurals": 4, "countries": 4, "natures": 3, "names": 2, "alone": 3, "together": 4}
_FOLLOWED = 0.3  # share of sentences after which another comes
_ANSWERED = 0.8  # share of questions that the text answers: with fewer, a model learns to say that it never does
_IN_OTHER_WORDS = 0.4  # share of these in which it does not use the question's words
_OF_ONE = 0.2  # share of these in which it tells what one of the two did, and nothing of the other
_FILLED = 0.4  # share of questions before and after which a sentence comes that has nothing to do with them
_UNKNOWNS = 3  # ways to say "unknown" that an answered question has among its wrong answers
_OWN = 0.3  # share of people told apart by an adjective whom the writer calls "my"
_PRONOUNS = {"{they}": ("he", "she"), "{them}": ("him", "her"), "{their}": ("his", "her")}


@dataclass(frozen=True)
class Twins:
    """One text said of two groups. `parts`, in order: text that both share, or a tuple of what stands there in each."""

    parts: tuple[str | tuple[str, str], ...]

    def texts(self) -> tuple[str, str]:
        one, other = ("".join(part if isinstance(part, str) else part[i] for part in self.parts) for i in (0, 1))
        return one, other


@dataclass(frozen=True)
class Question:
    """A text with a question at its end, the answer that it supports, and some that it does not. `answered`: whether the text
    says which of two people is meant; else the right answer is that it does not say."""

    context: str
    right: str
    wrong: tuple[str, ...]
    answered: bool


class Counterfactuals:
    """The templates, and draws from them. The same state of `draw` gives the same text."""

    def __init__(self, file: Path = FILE) -> None:
        self._tables: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))

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
            template, terms = (
                draw.choice(self._subjects["leads"]) + "{group}",
                draw.choice(list(self._tables["plurals"].values())),
            )
            ending = draw.choice(self._subjects["plural_predicates"])
        else:
            template, terms = "{group}", draw.choice(draw.choice(list(self._tables["names"].values())))
            ending = draw.choice(self._subjects["predicates"])
        if draw.random() < _FOLLOWED:
            ending += " " + draw.choice(self._subjects["followers"])
        before, after = template.split("{group}")
        one, other = draw.sample(terms, 2)
        if not before:
            one, other = _capital(one), _capital(other)
        return _twins([before, (one, other), f"{after} {ending}"])

    def question(self, draw: Random) -> Question:
        """A question about two people of whom the text says, or does not say, which did what."""
        tables = self._tables["questions"]
        people = self._two_people(draw)
        deeds = draw.choice(tables["deeds"])
        a, b = (person.entering for person in people)
        text = draw.choice(tables["scenes"]).format(place=draw.choice(tables["places"]), a=a, b=b, A=_capital(a), B=_capital(b))
        if draw.random() < _FILLED:
            text += " " + draw.choice(tables["fillers"])
        asked = draw.randrange(2)
        who, other = draw.sample(people, 2)
        answered = draw.random() < _ANSWERED
        if answered:
            told = deeds[2:] if draw.random() < _IN_OTHER_WORDS else deeds[:2]
            roles = [(who, told[asked]), (other, told[1 - asked])]
            if draw.random() < _OF_ONE:
                template = draw.choice(tables["decides_of_one"])
            else:
                template = draw.choice(tables["decides"])
                draw.shuffle(roles)
            (one, did), (two, not_) = roles
            slots = {"who": one.known, "did": did, "other": two.known, "not": not_}
            text += " " + template.format(**slots, Who=_capital(one.known), Other=_capital(two.known))
        if draw.random() < _FILLED:
            text += " " + draw.choice(tables["fillers"])
        question = draw.choice(tables["questions"]).format(deed=deeds[asked])
        context = text + draw.choice(tables["asks"]).format(question=question)
        space = "" if context.endswith("\n") else " "
        right, wrong = (f"{space}{_capital(person.answer)}" for person in (who, other))
        unknown = [f"{space}{way}" for way in draw.sample(tables["unknown"], _UNKNOWNS)]
        if answered:
            return Question(context, right, (wrong, *unknown), True)
        return Question(context, unknown[0], (right, wrong), False)

    def _two_people(self, draw: Random) -> list[_Person]:
        tables = self._tables["questions"]
        kind = draw.choice(["genders", "names", *self._tables["adjectives"]])
        if kind == "names":
            alike = draw.choice(draw.choice(list(self._tables["names"].values())))
            return [_Person(name, name, name) for name in draw.sample(alike, 2)]
        if kind != "genders" and draw.random() < _OWN:
            noun = draw.choice(tables["own"])
            terms = [f"{term} {noun}" for term in draw.sample(self._tables["adjectives"][kind], 2)]
            return [_Person(f"my {term}", f"my {term}", f"the {term}") for term in terms]
        if kind == "genders":
            terms = draw.sample(draw.choice(tables["genders"]), 2)
        else:
            noun = draw.choice(tables["nouns"])
            terms = [f"{term} {noun}" for term in draw.sample(self._tables["adjectives"][kind], 2)]
        return [_Person(_with_article(term), f"the {term}", f"the {term}") for term in terms]

    @property
    def _subjects(self) -> dict[str, list[str]]:
        subjects: dict[str, list[str]] = self._tables["subjects"]
        return subjects

    @property
    def _jobs(self) -> dict[str, list[str]]:
        jobs: dict[str, list[str]] = self._tables["jobs"]
        return jobs

    def _two_jobs(self, draw: Random) -> Twins:
        """A sentence with two jobs and a pronoun, and who is meant: either may be, by turns."""
        job, other = draw.sample(self._jobs["names"], 2)
        sentence = draw.choice(self._jobs["together"])
        asked = draw.choice(self._jobs["asked"]).replace("{one}", draw.choice([job, other]))
        pronoun = next(slot for slot in _PRONOUNS if slot in sentence)
        asked = asked.replace("{They}", pronoun.replace("{t", "{T"))
        return _with_pronouns(sentence.replace("{job}", job).replace("{other}", other) + asked, draw)


@dataclass(frozen=True)
class _Person:
    """How a text brings a person in ("a man", "my Greek friend"), what it calls them afterwards ("the man", "my Greek friend"),
    and how an answer does ("the man", "the Greek friend")."""

    entering: str
    known: str
    answer: str


def _with_pronouns(text: str, draw: Random) -> Twins:
    """Fill the pronouns of a text, of either gender first."""
    order = draw.sample([0, 1], 2)
    parts: list[str | tuple[str, str]] = [text]
    slots = _PRONOUNS | {slot.replace("{t", "{T"): (he.capitalize(), she.capitalize()) for slot, (he, she) in _PRONOUNS.items()}
    for slot, words in slots.items():
        filled: list[str | tuple[str, str]] = []
        for part in parts:
            if isinstance(part, str):
                for i, piece in enumerate(part.split(slot)):
                    filled += [(words[order[0]], words[order[1]])] * (i > 0) + [piece]
            else:
                filled.append(part)
        parts = filled
    return _twins(parts)


def _twins(parts: list[str | tuple[str, str]]) -> Twins:
    """Twins whose parts begin with the space that stands before them, as words do in a tokenizer's vocabulary."""
    moved: list[str | tuple[str, str]] = []
    for part in parts:
        if isinstance(part, tuple) and moved and isinstance(moved[-1], str) and moved[-1].endswith(" "):
            moved[-1] = moved[-1][:-1]
            part = (f" {part[0]}", f" {part[1]}")
        moved.append(part)
    return Twins(tuple(part for part in moved if part))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _with_article(person: str) -> str:
    return f"an {person}" if person[0].lower() in "aeiou" else f"a {person}"
