"""Numbers from 0 to 999 in English words, and in German and French with the origin of each word.

In German the units come before the tens: 27 is "sieben und zwanzig". In French 70 is sixty-ten and
80 four-twenties: 97 is "quatre vingt dix sept". Words that are written together or with hyphens are
split. German says "ein hundert" here, not "hundert"; French is that of France.
"""

# A translated text in pieces: each target symbol with the places of its source symbols.
Pieces = list[tuple[str, set[int]]]

ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

GERMAN = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
    "fünfzehn sechzehn siebzehn achtzehn neunzehn"
).split()
GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()

FRENCH = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize"
).split()
FRENCH_TENS = "vingt trente quarante cinquante soixante".split()


def english(n: int) -> list[str]:
    """207 is two hundred and seven."""
    _check(n)
    if n >= 100:
        return [ENGLISH[n // 100], "hundred", *(["and", *english(n % 100)] if n % 100 else [])]
    if n < 20:
        return [ENGLISH[n]]
    return [ENGLISH_TENS[n // 10 - 2], *([ENGLISH[n % 10]] if n % 10 else [])]


def german(n: int) -> Pieces:
    """207 is zwei hundert sieben, from the places 0, 1 and 3 of "two hundred and seven"."""
    _check(n)
    if n < 100:
        return _german(n, 0)
    hundreds = "ein" if n < 200 else GERMAN[n // 100]
    return [(hundreds, {0}), ("hundert", {1}), *(_german(n % 100, 3) if n % 100 else [])]


def french(n: int) -> Pieces:
    """207 is deux cent sept. "One hundred" is two words for one, cent."""
    _check(n)
    if n < 100:
        return _french(n, 0)
    after = _french(n % 100, 3) if n % 100 else []
    if n < 200:
        return [("cent", {0, 1}), *after]
    return [(FRENCH[n // 100], {0}), ("cent" if after else "cents", {1}), *after]


def _german(n: int, at: int) -> Pieces:
    """0 to 99; the English tens stand at place `at`, the units behind them. Units come first."""
    if n < 20:
        return [(GERMAN[n], {at})]
    tens, unit = (GERMAN_TENS[n // 10 - 2], {at}), n % 10
    if unit == 0:
        return [tens]
    return [("ein" if unit == 1 else GERMAN[unit], {at + 1}), ("und", set()), tens]


def _french(n: int, at: int) -> Pieces:
    """0 to 99. 70 is sixty-ten and 80 four-twenties, so 77 is sixty-ten-seven."""
    if n < 17:
        return [(FRENCH[n], {at})]
    if n < 20:
        return [("dix", {at}), (FRENCH[n - 10], {at})]
    if n == 80:
        return [("quatre", {at}), ("vingts", {at})]
    scores = n // 10 if n < 70 else n // 20 * 2  # 70 counts on from 60, 90 from 80
    below = n - 10 * scores  # 0 to 19
    tens = FRENCH_TENS[scores - 2 :][:1] if n < 80 else ["quatre", "vingt"]
    pieces: Pieces = [(word, {at}) for word in tens]
    if below % 10 == 1 and n < 80:
        pieces.append(("et", set()))
    if below >= 17:
        return [*pieces, ("dix", {at}), (FRENCH[below - 10], {at + 1})]
    if below > 10:
        return [*pieces, (FRENCH[below], {at, at + 1})]
    return [*pieces, *([(FRENCH[below], {at if below == 10 else at + 1})] if below else [])]


def _check(n: int) -> None:
    if not 0 <= n <= 999:
        raise ValueError(f"there are words for 0 to 999, not for {n}")
