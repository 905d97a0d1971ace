"""Minimal pairs of English sentences from a small grammar: one acceptable, one not, otherwise alike.

The columns are those of BLiMP (arXiv 1912.00582), so that its tools read the file; grammar, lexicon and sentences
are this project's own. A pair is judged right when the model gives the acceptable sentence the higher probability.

    python -m entkd.tasks.minimal_pairs.generate

rewrites ``pairs.jsonl``. The same seed and the same grammar give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from entkd.tasks.minimal_pairs import lexicon as lex

SEED = 20240
PAIRS = 100
FILE = Path(__file__).parent / "pairs.jsonl"

Pair = tuple[str, str]


def _number(rng: Random, noun: tuple[str, str]) -> tuple[str, int]:
    """A noun in a random number: its form, and 0 for singular or 1 for plural."""
    number = rng.randrange(2)
    return noun[number], number


def _agreement_simple(rng: Random) -> Pair:
    noun, number = _number(rng, rng.choice(lex.PEOPLE))
    verb, adverb = rng.choice(lex.INTRANSITIVE), rng.choice(lex.ADVERBS)
    return f"The {noun} {verb[number]} {adverb}.", f"The {noun} {verb[1 - number]} {adverb}."


def _agreement_across_phrase(rng: Random) -> Pair:
    noun, number = _number(rng, rng.choice(lex.PEOPLE))
    attractor = rng.choice(lex.PLACES)[1 - number]
    start = f"The {noun} {rng.choice(lex.NEAR)} the {attractor}"
    verb = rng.choice(lex.INTRANSITIVE)
    return f"{start} {verb[number]}.", f"{start} {verb[1 - number]}."


def _agreement_across_relative(rng: Random) -> Pair:
    subject, other = rng.sample(lex.PEOPLE, 2)
    noun, number = _number(rng, subject)
    start = f"The {noun} that the {other[1 - number]} {rng.choice(lex.OBJECT_VERBS)[2]}"
    be, state = ("is", "are"), rng.choice(lex.STATES)
    return f"{start} {be[number]} {state}.", f"{start} {be[1 - number]} {state}."


def _determiner_noun(rng: Random) -> Pair:
    thing, number = rng.choice(lex.THINGS), rng.randrange(2)
    determiner = rng.choice((("this", "these"), ("that", "those")))[number]
    start = f"{rng.choice(lex.NAMES)} {rng.choice(('bought', 'found', 'lost', 'sold', 'saw'))} {determiner}"
    adjective = rng.choice((*lex.SIZES, *lex.COLOURS))
    return f"{start} {adjective} {thing[number]}.", f"{start} {adjective} {thing[1 - number]}."


def _reflexive_gender(rng: Random) -> Pair:
    words, own, other = rng.choice(((lex.MALE, "himself", "herself"), (lex.FEMALE, "herself", "himself")))
    start = f"The {rng.choice(words)} {rng.choice(lex.SELF_VERBS)}"
    return f"{start} {own}.", f"{start} {other}."


def _reflexive_number(rng: Random) -> Pair:
    if rng.randrange(2):
        # Singular subjects have a known gender: `themselves` is acceptable for one person of unknown gender.
        words, own = rng.choice(((lex.MALE, "himself"), (lex.FEMALE, "herself")))
        subject, attractor, other = rng.choice(words), rng.choice(lex.PEOPLE)[1], "themselves"
    else:
        subject, attractor = rng.choice(lex.PEOPLE)[1], rng.choice((*lex.MALE, *lex.FEMALE))
        own, other = "themselves", rng.choice(("himself", "herself"))
    phrase = rng.choice(("", f" {rng.choice(lex.NEAR)} the {attractor}"))
    start = f"The {subject}{phrase} {rng.choice(lex.SELF_VERBS)}"
    return f"{start} {own}.", f"{start} {other}."


def _negative_polarity(rng: Random) -> Pair:
    start = f"{rng.choice(lex.NAMES)} said that"
    verb, name = rng.choice(lex.OBJECT_VERBS)[3], rng.choice(lex.NAMES)
    end = f"{rng.choice(lex.PEOPLE)[1]} have ever {verb} {name}."
    return f"{start} {rng.choice(('no', 'few'))} {end}", f"{start} {rng.choice(('some', 'many', 'most'))} {end}"


def _past_tense(rng: Random) -> Pair:
    past, participle, things = rng.choice(lex.IRREGULAR)
    start = f"The {rng.choice(lex.PEOPLE)[rng.randrange(2)]}"
    end = f"the {rng.choice(things)} {rng.choice(lex.ADJUNCT_TIMES)}."
    return f"{start} {past} {end}", f"{start} {participle} {end}"


def _passive_transitive(rng: Random) -> Pair:
    subject, agent = rng.sample(lex.PEOPLE, 2)
    noun, number = _number(rng, subject)
    start = f"The {noun} {('was', 'were')[number]}"
    end = f"by the {agent[rng.randrange(2)]}."
    return f"{start} {rng.choice(lex.TRANSITIVE_PAST)} {end}", f"{start} {rng.choice(lex.UNACCUSATIVE)} {end}"


PHENOMENA: dict[str, tuple[str, str, Callable[[Random], Pair]]] = {  # UID: field, term, rule
    "agreement_simple": ("morphology", "subject_verb_agreement", _agreement_simple),
    "agreement_across_phrase": ("morphology", "subject_verb_agreement", _agreement_across_phrase),
    "agreement_across_relative": ("morphology", "subject_verb_agreement", _agreement_across_relative),
    "determiner_noun": ("morphology", "determiner_noun_agreement", _determiner_noun),
    "reflexive_gender": ("morphology", "anaphor_agreement", _reflexive_gender),
    "reflexive_number": ("morphology", "anaphor_agreement", _reflexive_number),
    "negative_polarity": ("semantics", "npi_licensing", _negative_polarity),
    "past_tense": ("morphology", "irregular_forms", _past_tense),
    "passive_transitive": ("syntax", "argument_structure", _passive_transitive),
}


def generate(seed: int = SEED, pairs: int = PAIRS) -> list[dict[str, str]]:
    """``pairs`` rows of every phenomenon; no sentence occurs twice in all of them."""
    rows: list[dict[str, str]] = []
    used: set[str] = set()
    for uid, (field, term, rule) in PHENOMENA.items():
        rng = Random(f"{seed}/{uid}")  # a stream for each, so that a change to one rule leaves the others alone
        number = 0
        while number < pairs:
            good, bad = rule(rng)
            if good in used or bad in used:
                continue
            used |= {good, bad}
            row = {"sentence_good": good, "sentence_bad": bad, "field": field, "linguistics_term": term}
            rows.append(row | {"UID": uid, "pairID": str(number)})
            number += 1
    return rows


def to_jsonl(rows: list[dict[str, str]]) -> str:
    """The rows as the text of the file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    FILE.write_text(to_jsonl(generate()), encoding="utf-8")
