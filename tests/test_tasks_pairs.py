"""Answers against Python's own lists and calendar, alignments read aloud, batches spelt out."""

from datetime import date, timedelta

import pytest
import torch

from heed.tasks.pairs import dates, numbers, reversal
from heed.tasks.words import english

TASKS = {
    "reversal": reversal(2, 7),
    "dates": dates(),
    "german": numbers("german"),
    "french": numbers("french"),
}


def generator(random_seed=0):
    return torch.Generator().manual_seed(random_seed)


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def lines(task, source):
    """Each target symbol with the source symbols it comes from, to be read aloud."""
    target = task.answer(source)
    split = (lambda text: text.split(" ")) if task.space else list
    rows = task.alignment(source, target).tolist()
    return [
        (symbol, " ".join(s for s, comes in zip(split(source), row, strict=True) if comes))
        for symbol, row in zip(split(target), rows, strict=True)
    ]


# The answers


def test_every_day_is_the_one_of_pythons_calendar():
    task, day = dates(), date(1900, 1, 1)
    while day <= date(2099, 12, 31):
        source = f"{day.day} {day:%B} {day.year}"
        assert task.answer(source) == day.isoformat()
        day += timedelta(days=29)


def test_a_reversal_is_a_reversal():
    assert reversal(3).answer("312") == "213"
    assert {len(source) for source, _ in reversal(2, 4).sample(60, generator())} == {2, 3, 4}


# Where each symbol is from


def test_a_reversal_is_aligned_backwards():
    assert reversal(3).alignment("312", "213").tolist() == torch.eye(3).flip(0).bool().tolist()


def test_a_date_takes_its_month_from_the_whole_name():
    got = lines(dates(), "3 May 2021")
    assert got == [*zip("2021", "2021", strict=True), ("-", ""), ("0", "M a y"), ("5", "M a y")] + [
        ("-", ""),
        ("0", "3"),
        ("3", "3"),
    ]
    assert lines(dates(), "31 May 2021")[-2:] == [("3", "3"), ("1", "1")]
    equal_digits = dates().alignment("22 May 2022", "2022-05-22").int()
    assert equal_digits.argmax(1).tolist() == [7, 8, 9, 10, 0, 3, 3, 0, 0, 1]


@pytest.mark.parametrize(
    ("language", "n", "want"),
    [
        ("german", 27, [("sieben", "seven"), ("und", ""), ("zwanzig", "twenty")]),
        ("german", 100, [("ein", "one"), ("hundert", "hundred")]),
        ("french", 97, [(w, "ninety") for w in ("quatre", "vingt", "dix")] + [("sept", "seven")]),
        ("french", 71, [("soixante", "seventy"), ("et", ""), ("onze", "seventy one")]),
        ("french", 72, [("soixante", "seventy"), ("douze", "seventy two")]),
        ("french", 77, [("soixante", "seventy"), ("dix", "seventy"), ("sept", "seven")]),
        ("french", 17, [("dix", "seventeen"), ("sept", "seventeen")]),
        ("french", 21, [("vingt", "twenty"), ("et", ""), ("un", "one")]),
        ("french", 101, [("cent", "one hundred"), ("un", "one")]),
        ("french", 280, [("deux", "two"), ("cent", "hundred"), ("quatre", "eighty")]),
    ],
)
def test_a_number_word_knows_where_it_is_from(language, n, want):
    assert lines(TASKS[language], " ".join(english(n)))[: len(want)] == want


def test_every_number_word_but_and_is_translated():
    for language in ("german", "french"):
        task = TASKS[language]
        for n in range(1000):
            words = english(n)
            used = task.alignment(" ".join(words), task.answer(" ".join(words))).any(0).tolist()
            assert [word for word, is_used in zip(words, used, strict=True) if not is_used] == [
                "and"
            ] * words.count("and")


def test_the_alignment_of_a_wrong_translation_is_refused():
    with pytest.raises(ValueError, match="'312' is '213', not '312'"):
        reversal(3).alignment("312", "312")


# Batches


def test_a_batch_is_the_sample_with_a_begin_an_end_and_padding(task):
    pairs_drawn = task.sample(40, generator(3))
    source, target_in, target_out = task.batch(40, generator(3))
    assert source.dtype == target_in.dtype == target_out.dtype == torch.int64
    split = (lambda text: text.split(" ")) if task.space else list
    for row, (text, target) in enumerate(pairs_drawn):
        ids = [3 + task.source_vocab.index(s) for s in split(text)]
        words = [3 + task.target_vocab.index(s) for s in split(target)]
        rest = target_in.shape[1] - len(words) - 1
        assert source[row].tolist() == ids + [0] * (source.shape[1] - len(ids))
        assert target_in[row].tolist() == [1, *words] + [0] * rest
        assert target_out[row].tolist() == [*words, 2] + [-100] * rest


def test_texts_come_back_from_their_ids(task):
    drawn = task.sample(20, generator(4))
    _, target_in, target_out = task.tensors(drawn)
    targets = [target for _, target in drawn]
    assert task.decode(target_in) == targets
    assert task.decode(target_out.clamp(min=0)) == targets


def test_exact_wants_every_symbol_and_the_end(task):
    source, _, target_out = task.batch(30, generator(5))
    written = target_out.clamp(min=0)
    assert task.exact(source, written).all()
    chatter = written.clone()
    chatter[written == 0] = 4  # after the end anything may stand
    assert task.exact(source, chatter).all()
    one_wrong = written.clone()
    one_wrong[:, 0] = torch.where(written[:, 0] == 3, 4, 3)
    assert not task.exact(source, one_wrong).any()
    assert not task.exact(source, torch.where(written == 2, 0, written)).any()
    assert not task.exact(source, written[:, :1]).any()


def test_only_the_numbers_asked_for_are_drawn():
    drawn = {s for s, _ in numbers("french", among=[7, 80]).sample(50, generator())}
    assert drawn == {"seven", "eighty"}
    assert numbers("french", among=[7]).target_vocab == numbers("french").target_vocab


def test_draws_repeat_with_their_seed_and_differ_without(task):
    assert task.sample(9, generator(1)) == task.sample(9, generator(1))
    assert task.sample(9, generator(1)) != task.sample(9, generator(2))


def test_digits_and_lengths_are_even():
    texts = [source for source, _ in reversal(1, 3).sample(3000, generator())]
    for counts in (
        [sum(len(text) == n for text in texts) / len(texts) for n in (1, 2, 3)],
        [sum(text.count(d) for text in texts) / sum(map(len, texts)) for d in "0123456789"],
    ):
        even, n = 1 / len(counts), 3000
        assert all(abs(share - even) < 4 * (even * (1 - even) / n) ** 0.5 for share in counts)


# Nonsense


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: reversal(0), "low to high"),
        (lambda: reversal(5, 2), "got 5 to 2"),
        (lambda: numbers("dutch"), "'dutch'"),
        (lambda: numbers("german", among=[]), "at least one"),
        (lambda: numbers("german", among=[1000]), "between 0 and 999"),
        (lambda: numbers("german").answer("twenty and"), "'twenty and'"),
        (lambda: numbers("german").encode(["seven", "sieben"]), "'sieben'"),
        (lambda: reversal(2).encode(["1x"]), "'x'"),
        (lambda: reversal(2).sample(0, generator()), "got 0"),
        (lambda: reversal(2).decode(torch.tensor([[13]])), "ends at 12"),
        (lambda: reversal(2).exact(torch.tensor([[3]]), torch.tensor([[3], [3]])), "1 sources"),
        (lambda: dates().answer("30 February 2021"), "'30 February 2021'"),
        (lambda: dates().answer("03 May 2021"), "'03 May 2021'"),
        (lambda: dates().answer("3 May 1821"), "1900 to 2099"),
        (lambda: dates().answer("3 Mai 2021"), "'3 Mai 2021'"),
        (lambda: dates().answer("2021-05-03"), "'2021-05-03'"),
    ],
)
def test_nonsense_is_refused_by_name(unchecked, call, match):
    with pytest.raises(ValueError, match=match):
        call()
