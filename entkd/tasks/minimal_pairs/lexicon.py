"""Words of the minimal pairs' grammar, chosen so that any combination that the grammar allows makes sense."""

from __future__ import annotations

MALE = ("boy", "man", "king", "father", "uncle", "prince", "brother", "grandfather", "waiter", "actor")
FEMALE = ("girl", "woman", "queen", "mother", "aunt", "princess", "sister", "grandmother", "waitress", "actress")

PEOPLE = (  # singular, plural
    ("teacher", "teachers"),
    ("doctor", "doctors"),
    ("farmer", "farmers"),
    ("pilot", "pilots"),
    ("lawyer", "lawyers"),
    ("singer", "singers"),
    ("student", "students"),
    ("nurse", "nurses"),
    ("painter", "painters"),
    ("soldier", "soldiers"),
    ("baker", "bakers"),
    ("senator", "senators"),
    ("author", "authors"),
    ("guard", "guards"),
    ("child", "children"),
    ("neighbour", "neighbours"),
)

THINGS = (  # singular, plural; can be bought, sold, found, lost
    ("book", "books"),
    ("lamp", "lamps"),
    ("chair", "chairs"),
    ("knife", "knives"),
    ("map", "maps"),
    ("clock", "clocks"),
    ("basket", "baskets"),
    ("bottle", "bottles"),
    ("guitar", "guitars"),
    ("shelf", "shelves"),
    ("mirror", "mirrors"),
    ("painting", "paintings"),
    ("coat", "coats"),
    ("watch", "watches"),
)

PLACES = (  # singular, plural; one can stand near them
    ("lake", "lakes"),
    ("tree", "trees"),
    ("window", "windows"),
    ("bridge", "bridges"),
    ("wall", "walls"),
    ("tower", "towers"),
    ("boat", "boats"),
    ("statue", "statues"),
    ("bench", "benches"),
    ("gate", "gates"),
)

NEAR = ("near", "behind", "beside")

NAMES = ("Anna", "Maria", "Peter", "Thomas", "Laura", "Martin", "Susan", "David", "Emma", "Robert", "Julia", "Paul")

INTRANSITIVE = (  # third person singular, plural
    ("laughs", "laugh"),
    ("sings", "sing"),
    ("works", "work"),
    ("waits", "wait"),
    ("sleeps", "sleep"),
    ("complains", "complain"),
    ("smiles", "smile"),
    ("dances", "dance"),
    ("shouts", "shout"),
    ("cries", "cry"),
)

ADVERBS = ("every day", "in the morning", "at night", "all the time", "on Sundays", "in the kitchen", "quite often")

OBJECT_VERBS = (  # third person singular, plural, past, participle; need an object
    ("likes", "like", "liked", "liked"),
    ("admires", "admire", "admired", "admired"),
    ("trusts", "trust", "trusted", "trusted"),
    ("praises", "praise", "praised", "praised"),
    ("blames", "blame", "blamed", "blamed"),
    ("thanks", "thank", "thanked", "thanked"),
    ("avoids", "avoid", "avoided", "avoided"),
    ("respects", "respect", "respected", "respected"),
)

SELF_VERBS = ("hurt", "blamed", "described", "introduced", "defended", "trusted", "surprised", "admired")

STATES = ("old", "happy", "famous", "tired", "friendly", "strange", "clever", "quiet")

IRREGULAR = (  # past, participle, things that it is done to
    ("wrote", "written", ("letter", "story", "song")),
    ("broke", "broken", ("window", "lamp", "chair")),
    ("stole", "stolen", ("watch", "car", "painting")),
    ("ate", "eaten", ("cake", "apple", "soup")),
    ("took", "taken", ("map", "key", "coat")),
    ("drew", "drawn", ("picture", "map", "portrait")),
    ("hid", "hidden", ("treasure", "key", "box")),
    ("chose", "chosen", ("song", "dress", "name")),
    ("drove", "driven", ("truck", "car", "bus")),
    ("threw", "thrown", ("ball", "stone", "bottle")),
    ("gave", "given", ("speech", "answer", "present")),
    ("wore", "worn", ("dress", "coat", "crown")),
)

ADJUNCT_TIMES = ("yesterday", "last week", "this morning", "in the end", "years ago", "before noon")

UNACCUSATIVE = ("arrived", "vanished", "slept", "laughed", "fell", "disappeared", "died", "smiled")
TRANSITIVE_PAST = ("helped", "welcomed", "invited", "followed", "warned", "visited", "punished", "rescued")

SIZES = ("big", "small", "large", "tiny")
COLOURS = ("red", "green", "black", "white", "yellow")
