"""Number words against hand-written anchors; and the other way round, they add up again."""

import pytest

from heed.tasks import words
from heed.tasks.words import english, french, german

# Written down by hand, as a grammar book has them.
GERMAN = {
    0: "null",
    1: "eins",
    16: "sechzehn",
    17: "siebzehn",
    21: "ein und zwanzig",
    60: "sechzig",
    61: "ein und sechzig",
    70: "siebzig",
    71: "ein und siebzig",
    77: "sieben und siebzig",
    80: "achtzig",
    81: "ein und achtzig",
    90: "neunzig",
    91: "ein und neunzig",
    97: "sieben und neunzig",
    99: "neun und neunzig",
    100: "ein hundert",
    101: "ein hundert eins",
    112: "ein hundert zwölf",
    121: "ein hundert ein und zwanzig",
    200: "zwei hundert",
    201: "zwei hundert eins",
    730: "sieben hundert dreißig",
    999: "neun hundert neun und neunzig",
}
FRENCH = {
    0: "zéro",
    1: "un",
    16: "seize",
    17: "dix sept",
    20: "vingt",
    21: "vingt et un",
    60: "soixante",
    61: "soixante et un",
    70: "soixante dix",
    71: "soixante et onze",
    72: "soixante douze",
    77: "soixante dix sept",
    80: "quatre vingts",
    81: "quatre vingt un",
    90: "quatre vingt dix",
    91: "quatre vingt onze",
    97: "quatre vingt dix sept",
    99: "quatre vingt dix neuf",
    100: "cent",
    101: "cent un",
    121: "cent vingt et un",
    180: "cent quatre vingts",
    200: "deux cents",
    201: "deux cent un",
    280: "deux cent quatre vingts",
    371: "trois cent soixante et onze",
    999: "neuf cent quatre vingt dix neuf",
}

LANGUAGES = {"german": german, "french": french}


def said(language, n):
    return " ".join(word for word, _ in LANGUAGES[language](n))


@pytest.mark.parametrize(("language", "anchors"), [("german", GERMAN), ("french", FRENCH)])
def test_number_words_are_those_of_a_grammar_book(language, anchors):
    for n, want in anchors.items():
        assert said(language, n) == want


def test_english_numbers_are_spoken_the_british_way():
    want = {
        0: "zero",
        13: "thirteen",
        40: "forty",
        100: "one hundred",
        207: "two hundred and seven",
    }
    want |= {99: "ninety nine", 999: "nine hundred and ninety nine"}
    assert {n: " ".join(english(n)) for n in want} == want
    assert len({tuple(english(n)) for n in range(1000)}) == 1000


GERMAN_VALUES = {word: n for n, word in enumerate(words.GERMAN)} | {"ein": 1}
GERMAN_VALUES |= {word: 20 + 10 * i for i, word in enumerate(words.GERMAN_TENS)}
FRENCH_VALUES = {word: n for n, word in enumerate(words.FRENCH)} | {"vingts": 20}
FRENCH_VALUES |= {word: 20 + 10 * i for i, word in enumerate(words.FRENCH_TENS)}


def german_value(words):
    hundreds, words = (GERMAN_VALUES[words[0]], words[2:]) if "hundert" in words else (0, words)
    return 100 * hundreds + sum(GERMAN_VALUES[word] for word in words if word != "und")


def french_value(words):
    """Adds up; `quatre vingt` and `deux cent` multiply."""
    total = 0
    for word in words:
        if word in ("cent", "cents"):
            total = 100 * max(total, 1)
        elif word in ("vingt", "vingts") and total % 100 == 4:
            total += 76
        elif word != "et":
            total += FRENCH_VALUES[word]
    return total


@pytest.mark.parametrize(
    ("language", "value"), [("german", german_value), ("french", french_value)]
)
def test_every_number_adds_up_to_itself(language, value):
    for n in range(1000):
        assert value(said(language, n).split()) == n


def test_the_rules_of_french_spelling_hold_for_every_number():
    for n in range(1000):
        words = said("french", n).split()
        assert ("et" in words) == (n % 100 in (21, 31, 41, 51, 61, 71))
        assert ("vingts" in words) == (n % 100 == 80)
        assert ("cents" in words) == (n >= 200 and n % 100 == 0)
        assert "un" not in words or words.index("un") == len(words) - 1


def test_german_says_eins_at_the_end_and_ein_before_something():
    for n in range(1000):
        words = said("german", n).split()
        assert ("eins" in words) == (n % 100 == 1)
        assert "eins" not in words[:-1] and words[-1] != "ein"
        assert ("und" in words) == (n % 100 > 20 and n % 10 > 0)


@pytest.mark.parametrize("language", LANGUAGES.values())
def test_every_word_comes_from_places_that_the_english_number_has(language):
    for n in range(1000):
        places = [place for _, origin in language(n) for place in origin]
        without_and = {j for j, word in enumerate(english(n)) if word != "and"}
        assert set(places) == without_and


@pytest.mark.parametrize("language", [english, german, french])
@pytest.mark.parametrize("n", [-1, 1000])
def test_numbers_beyond_999_are_refused(language, n):
    with pytest.raises(ValueError, match=f"not for {n}"):
        language(n)
