"""Short sentences with a negation or a contrast, made by a grammar: what long reviews hardly teach.

Each comes with its label and the words that decide it. None of them is in ``negations.csv``, which measures.
"""

from __future__ import annotations

import csv
import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SURE = 0.97  # probability of the label
SIXTY = Path(__file__).parent / "negations.csv"
NOUNS = (
    "film", "movie", "story", "plot", "script", "cast", "acting", "ending", "beginning", "music", "dialogue",
    "direction", "comedy", "thriller", "drama", "sequel", "soundtrack", "camera work", "first hour", "lead",
)  # fmt: skip
GOOD = (
    "good", "great", "excellent", "wonderful", "funny", "moving", "brilliant", "superb", "charming", "clever",
    "fresh", "gripping", "touching", "delightful", "beautiful", "lovely", "convincing", "exciting", "enjoyable",
    "warm", "sincere", "memorable", "original", "satisfying", "entertaining",
)  # fmt: skip
BAD = (
    "bad", "awful", "boring", "dull", "terrible", "weak", "predictable", "tedious", "clumsy", "silly", "stupid",
    "dreadful", "horrible", "slow", "cheap", "shallow", "painful", "confusing", "lifeless", "wooden", "pointless",
    "annoying", "forgettable", "poor", "ugly",
)  # fmt: skip
PRAISED = ("warmth", "charm", "wit", "beauty", "humour", "heart", "suspense", "tenderness", "imagination", "power")
BLAMED = ("boredom", "cliches", "noise", "confusion", "bad taste", "silliness", "cheap tricks", "filler")
SLIPS = ("a bit long", "a little slow", "cheaply made", "poorly edited", "badly cut", "badly dubbed", "too short",
         "hard to follow")  # fmt: skip
WORDS = {"{g}": GOOD, "{b}": BAD, "{p}": PRAISED, "{f}": BLAMED, "{s}": SLIPS, "{n}": NOUNS, "{m}": NOUNS}
# what stands in brackets decides
POSITIVE = (
    "The {n} is [{g}].", "What a [{g}] {n}!", "A [{g}] {n}.", "[{g}] and [{g}].", "I [loved] the {n}.",
    "The {n} is [not {b}].", "This {n} was [not {b}].",
    "The {n} is [not {b}] at all.", "The {n} was [never {b}].", "This is [not] a [{b}] {n}.",
    "[Not {b}], this {n}.", "It is [anything but {b}].", "The {n} is [far from {b}].",
    "There is [nothing {b}] about the {n}.", "[Not] a [{b}] scene in it.", "I was [never bored].",
    "I [did not] find the {n} [{b}].", "The {n} is [hardly {b}].", "You [won't be bored].",
    "I [couldn't] look away.", "It [never] gets [{b}].", "[No] one should [miss] this {n}.",
    "I [wouldn't change] a thing.", "You [won't regret] it.", "It [never disappoints].", "Do [not miss] this {n}.",
    "{b} in places, but [{g}].", "The {n} is {b}, but the {m} is [{g}].", "{b}, yet [{g}].",
    "A {b} {n}, a [{g}] {m}.", "It begins {b} and ends [{g}].",
    "Although the {n} is {b}, I [enjoyed] every minute.", "Full of [{p}], even if {s}.", "A {n} of [great {p}], {s}.",
    "Despite the {b} {n}, it is [{g}].", "They say it is {b}; I found it [{g}].",
    "I expected it to be {b}, and it is [{g}].", "{s}, but full of [{p}].", "It [works].", "Simple and [{g}].",
    "Small, quiet and [{g}].", "[Better] than they say.", "It [stays with you].", "Well [worth seeing].",
    "[Surprisingly {g}].", "[Good enough] for an evening.", "It gets [better] and [better].", "Pure [{p}].",
)  # fmt: skip
NEGATIVE = (
    "The {n} is [{b}].", "What a [{b}] {n}!", "A [{b}] {n}.", "[{b}] and [{b}].", "I [hated] the {n}.",
    "The {n} is [not {g}].", "This {n} was [not {g}].",
    "The {n} is [not {g}] at all.", "The {n} was [never {g}].", "This is [not] a [{g}] {n}.",
    "[Not {g}], this {n}.", "It is [anything but {g}].", "The {n} is [far from {g}].",
    "There is [nothing {g}] about the {n}.", "[Not] a [{g}] scene in it.", "I was [never moved].",
    "I [did not] find the {n} [{g}].", "The {n} is [hardly {g}].", "You [won't enjoy] it.",
    "I [couldn't wait] to leave.", "It [never] gets [{g}].", "[No] one should [watch] this {n}.",
    "I [wouldn't watch] it again.", "You [will regret] it.", "It [always disappoints].", "Do [not watch] this {n}.",
    "{g} in places, but [{b}].", "The {n} is {g}, but the {m} is [{b}].", "{g}, yet [{b}].",
    "A {g} {n}, a [{b}] {m}.", "It begins {g} and ends [{b}].", "Although the {n} is {g}, I was [bored] to death.",
    "Full of [{f}], even if well made.", "A {n} of [endless {f}], well made.", "Despite the {g} {n}, it is [{b}].",
    "They say it is {g}; I found it [{b}].", "I expected it to be {g}, and it is [{b}].",
    "Well acted, but full of [{f}].", "It [does not work].", "Loud and [{b}].", "Big, expensive and [{b}].",
    "[Worse] than they say.", "It is [soon forgotten].", "[Not worth] seeing.", "[Barely {g}].",
    "[At best] half {g}.", "It gets [worse] and [worse].", "Only the {n} is {g}, [nothing else].",
)  # fmt: skip


def short_sentences(count: int, labels: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """``count`` rows of recorded knowledge, half of each class: ``text``, ``probabilities`` and ``rationale``."""
    with SIXTY.open(encoding="utf-8", newline="") as lines:
        measured = {row["text"].lower() for row in csv.DictReader(lines)}
    draw, rows = random.Random(seed), {}
    while len(rows) < count:
        label, frames = (("positive", POSITIVE), ("negative", NEGATIVE))[len(rows) % 2]
        marked = draw.choice(frames)
        for name, words in WORDS.items():
            for word in draw.sample(words, marked.count(name)):
                marked = marked.replace(name, word, 1)
        pieces = re.split(r"[\[\]]", marked)  # those with an odd number stood in brackets
        ends = list(itertools.accumulate(map(len, pieces)))
        text = "".join(pieces)
        text = text[0].upper() + text[1:]
        if text.lower() not in measured:
            rows.setdefault(text, {
                "text": text, "probabilities": [SURE if each == label else 1 - SURE for each in labels],
                "rationale": [[ends[index - 1], ends[index]] for index in range(1, len(pieces), 2)],
            })  # fmt: skip
    return list(rows.values())
