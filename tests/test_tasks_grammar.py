"""The table over beliefs, held against every derivation written out, in fractions."""

import math
import random
import re
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import pairwise, product

import pytest
import torch

from heed.tasks import grammar
from heed.tasks.grammar import CAST, RULES, Grammar, pairs

# One sheep or many, two who may be "she", a rule that says nothing, a role in a rule in a rule.
TINY_RULES = {
    "SENTENCE": "2 MEET | FLOCK",
    "MEET": "3 A met B so A.she RAN EH | B met A as B.she RAN so A.she | A met A",
    "FLOCK": "2 the D D.RAN | the D D.RAN EH D.too",
    "RAN": "runs | 3 sleeps EH",
    "EH": "2 | eh",
}
MANY = {"runs": "run", "sleeps": "sleep", "too": "all"}
TINY_CAST = {
    "A": {"Ann Eve": {}, "Bob": {"she": "he"}},
    "B": {"Ann Eve": {}, "Bob": {"she": "he"}},
    "D": {"sheep dog": {}, "sheep dogs": MANY},
}

# The whole language with fewer words: small enough to write out.
SMALL_RULES = RULES | {
    "WHEN": "again",
    "PHONED": "met",
    "VISITED": "visited",
    "WAS": "was",
    "GAVE": "gave",
    "BOUGHT": "bought",
    "DET": "a",
    "LOOK": "2 | red",
    "SEES": "sees",
    "RUNS": "runs",
    "FUN": "book",
}
SMALL_CAST = CAST | {
    "A": {"Ann Eve": {}, "Bob": grammar.HE},
    "B": {"Ann Eve": {}, "Bob": grammar.HE},
    "D": {"dog sheep": {}, "sheep": grammar.MANY},
    "E": {"dog sheep": {}, "sheep": grammar.MANY},
    "T": {"trophy book": {}},
    "C": {"box": {}},
}


def derivations(rules, cast, name="SENTENCE", forms=None):
    """Every derivation of a rule: its probability and its words. Nothing is shared or merged."""
    ways = [way.split() for way in rules[name].split("|")]
    weighed = [(int(w[0]), w[1:]) if w and w[0].isdigit() else (1, w) for w in ways]
    for weight, way in weighed:
        roles = [role for role in cast if any(part.split(".")[0] == role for part in way)]
        players = [
            [(name, own) for names, own in cast[role].items() for name in names.split()]
            for role in roles
        ]
        companies = [
            dict(zip(roles, company, strict=True))
            for company in product(*players)
            if len({name for name, _ in company}) == len(company)
        ]
        for company in companies:
            p = Fraction(weight, sum(w for w, _ in weighed) * len(companies))
            choices = [list(told(rules, cast, part, company, forms or {})) for part in way]
            for choice in product(*choices):
                yield p * math.prod(q for q, _ in choice), sum((words for _, words in choice), ())


def told(rules, cast, part, company, forms):
    role, _, word = part.partition(".")
    if role in company:
        name, own = company[role]
        part, forms = (word, own) if word else (name, {})
    part = forms.get(part, part)
    if part in rules:
        yield from derivations(rules, cast, part, forms)
    else:
        yield Fraction(1), (part,)


def sentences(rules, cast):
    found = defaultdict(Fraction)
    for p, words in derivations(rules, cast):
        found[(*words, ".")] += p
    return dict(found)


def texts(found, length):
    """P of every text of that length, after the END in front: sentences in a row, cut."""
    whole = defaultdict(Fraction)
    for words, p in found.items():
        if len(words) >= length:
            whole[words[:length]] += p
        else:
            for rest, q in texts(found, length - len(words)).items():
                whole[words + rest] += p * q
    return whole


def entropy(probabilities):
    return -math.fsum(float(p) * math.log(p) for p in probabilities)


def after(model, text):
    """What may come after a text, as a dictionary."""
    p = model.predictive(model.encode(text)[None])[0, -1]
    return {model.vocab[i]: p[i].item() for i in p.nonzero()[:, 0]}


@pytest.fixture(scope="module")
def english():
    return Grammar()


@pytest.fixture(scope="module")
def tiny():
    return Grammar(TINY_RULES, TINY_CAST)


TINY = sentences(TINY_RULES, TINY_CAST)
LENGTH = 9


# Against everything that can be said


def test_each_prediction_is_the_share_of_all_texts_that_go_on_so(tiny):
    for n in range(LENGTH):
        before, now = texts(TINY, n), texts(TINY, n + 1)
        want = torch.zeros(len(before), len(tiny.vocab), dtype=torch.float64)
        rows = {words: row for row, words in enumerate(before)}
        for (*words, word), p in now.items():
            share = p / before[tuple(words)]
            want[rows[tuple(words)], tiny.vocab.index(word)] = float(share)
        ids = torch.stack([tiny.encode(" ".join([".", *words])) for words in before])
        got = tiny.predictive(ids)
        assert got.shape == (len(before), n + 1, len(tiny.vocab)) and got.dtype == torch.float64
        assert (got[:, -1] - want).abs().max() <= 1e-12
        assert torch.equal(got[:, -1] > 0, want > 0)


def test_the_floor_is_what_one_more_word_adds_to_the_entropy_of_all_texts(tiny):
    total = [entropy(texts(TINY, n).values()) for n in range(LENGTH + 1)]
    want = torch.tensor([b - a for a, b in pairwise(total)], dtype=torch.float64)
    floor = tiny.floor(LENGTH)
    assert floor.shape == (LENGTH,) and floor.dtype == torch.float64
    assert (floor - want).abs().max() <= 1e-12


def test_log_prob_is_the_logarithm_of_a_sum_over_derivations(tiny):
    whole = texts(TINY, LENGTH)
    ids = torch.stack([tiny.encode(" ".join([".", *words])) for words in whole])
    want = torch.tensor([math.log(p) for p in whole.values()], dtype=torch.float64)
    assert (tiny.log_prob(ids) - want).abs().max() <= 1e-12
    assert tiny.log_prob(ids).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_in_the_long_run_a_word_costs_the_entropy_of_a_sentence_over_its_length(tiny):
    length = sum(p * len(words) for words, p in TINY.items())
    rate = entropy(TINY.values()) / float(length)
    assert tiny.floor(3000)[-1].item() == pytest.approx(rate, abs=1e-12)


def test_every_prefix_of_every_sentence_of_the_small_english_is_predicted_exactly():
    model, found = Grammar(SMALL_RULES, SMALL_CAST), sentences(SMALL_RULES, SMALL_CAST)
    prefix = defaultdict(Fraction)
    for words, p in found.items():
        for n in range(len(words) + 1):
            prefix[words[:n]] += p
    for words in found:
        p = model.predictive(model.encode(" ".join([".", *words]))[None])[0]
        for n, word in enumerate(words):
            share = float(prefix[words[: n + 1]] / prefix[words[:n]])
            assert abs(p[n, model.vocab.index(word)].item() - share) <= 1e-12
    assert len(found) > 500 and sum(found.values()) == 1


# The derivation is hidden


def test_the_entropy_of_the_rules_is_not_the_floor(tiny):
    """It also counts choices that leave no trace in the words: here 0.12 nats a sentence."""
    known = entropy(p for p, _ in derivations(TINY_RULES, TINY_CAST))
    assert 0.1 < known - entropy(TINY.values()) < 0.2


@pytest.mark.parametrize(("verb", "subject"), [("phoned", 3), ("met", 3), ("helped", 1)])
def test_whom_she_means_stays_open_until_the_end_says_it(english, verb, subject):
    """Who knew the derivation would know the next word; the words alone leave odds of 3 to 1."""
    start = f". Ann {verb} Eve because she was cold so"
    assert after(english, start) == pytest.approx({"Eve": subject / 4, "Ann": 1 - subject / 4})
    assert after(english, start + " Ann") == pytest.approx(
        dict.fromkeys(["gave", "lent", "brought"], 1 / 3)
    )


def test_where_the_pronoun_can_mean_one_only_the_next_name_is_certain(english):
    assert after(english, ". Ann met Bob because he was lost so") == {"Ann": 1}
    assert after(english, ". Ann met Bob because she was lost and") == {"Bob": 1}
    assert after(english, ". Ann met Bob because she was lost and Bob gave") == {"her": 1}
    chances = after(english, ". Ann met Bob because")
    assert chances == pytest.approx({"she": 3 / 4, "he": 1 / 4})


def test_one_sheep_and_many_are_told_apart_by_the_verb(english):
    verbs = ["run", "runs", "sing", "sings", "sleep", "sleeps"]
    chances = after(english, ". the sheep near the dogs")
    assert chances == pytest.approx(dict.fromkeys(verbs, 1 / 6))
    assert after(english, ". the sheep near the dogs run because") == {"they": 1}
    assert after(english, ". the sheep near the dogs runs because") == {"it": 1}


def test_the_number_that_counts_is_that_of_the_head_and_not_of_the_nearest_noun(english):
    assert {"run", "sleep", "sing"} == after(english, ". the dogs that the cat sees").keys()
    assert {"runs", "sleeps", "sings"} == after(english, ". the dog that the cats see").keys()


def test_a_sheep_is_rarer_after_a_sheep(english):
    """All roles differ by name: E is none of the two sheep when D is one."""
    assert "sheep" not in after(english, ". the sheep near the")
    assert after(english, ". the dog near the")["sheep"] == pytest.approx(2 / 7 / 3)


# Minimal pairs


def test_the_halves_of_a_pair_part_at_the_word_that_resolves_the_pronoun(english):
    assert len(pairs()) == 5 * 4 + 3 * 3 * 2
    for one, two in pairs():
        a, b = one.text.split(), two.text.split()
        assert one.resolver == two.resolver and one.pronoun == two.pronoun <= one.resolver
        assert a[: one.resolver] == b[: one.resolver] and a[one.resolver] != b[one.resolver]
        assert one.antecedent != two.antecedent and max(one.antecedent, two.antecedent) < 9
        assert {a[one.pronoun], b[two.pronoun]} in ({"it"}, {"she", "he"})
        assert a[one.answer] != b[two.answer]
        ids = torch.stack([english.encode(one.text), english.encode(two.text)])
        assert english.log_prob(ids).isfinite().all()


def test_only_the_right_reading_allows_the_answer(english):
    for pair, other in (*pairs(), *((b, a) for a, b in pairs())):
        words, others = pair.text.split(), other.text.split()
        start = " ".join(words[: pair.answer])
        assert words[pair.answer] in after(english, start)
        assert others[other.answer] not in after(english, start)
        mentioned = {words[pair.antecedent], words[other.antecedent]}
        assert {words[pair.answer], others[other.answer]} == mentioned


# The language


def test_the_language_is_what_a_small_model_can_learn(english):
    floor = english.floor(64)
    assert 0.95 < floor.mean() < 1.6 and floor.max() < 2.5
    assert 40 <= len(english.vocab) < 100 and len(set(english.vocab)) == len(english.vocab)
    ids = english.sample(200, 400, torch.Generator().manual_seed(1))
    ends = (ids == 0).nonzero()
    gaps = [int(b - a) for (r, a), (s, b) in pairwise(ends.tolist()) if r == s]
    assert 9 <= min(gaps) and max(gaps) <= 26


def test_every_rule_and_role_is_used(english):
    said = " ".join(RULES.values()).replace(".", " ").split()
    gifts = {to for who in CAST.values() for own in who.values() for to in own.values()}
    assert RULES.keys() - {"SENTENCE"} <= {*said, *gifts}
    assert CAST.keys() <= {*said}


# Drawing


def test_draws_come_as_often_as_the_rules_say(tiny):
    """Chi-square over all texts of six words, fixed seed."""
    whole = texts(TINY, 6)
    drawn = tiny.sample(20_000, 7, torch.Generator().manual_seed(5))
    seen = Counter(tuple(tiny.vocab[i] for i in row[1:]) for row in drawn.tolist())
    assert seen.keys() <= whole.keys()
    chi = sum((seen[words] - 20_000 * p) ** 2 / (20_000 * p) for words, p in whole.items())
    df = len(whole) - 1
    assert chi < df + 6 * math.sqrt(2 * df)


def test_the_mean_surprise_of_an_independent_generator_is_the_floor(english):
    """Derivations drawn rule by rule, without the table: within 4 standard errors everywhere."""
    draw, length, n = random.Random(7), 40, 2000
    stream = [["."] for _ in range(n)]
    for text in stream:
        while len(text) <= length:
            text += [*uttered(draw), "."]
    ids = torch.stack([english.encode(" ".join(text[: length + 1])) for text in stream])
    p = english.predictive(ids)[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0]
    surprise, floor = -p.log(), english.floor(length)
    error = surprise.std(0) / math.sqrt(n)
    assert ((surprise.mean(0) - floor).abs() <= 4 * error + 1e-12).all()
    total = surprise.mean(1)
    assert abs(total.mean() - floor.mean()) <= 4 * total.std() / math.sqrt(n)
    assert surprise.sum(1).neg().allclose(english.log_prob(ids), rtol=0, atol=1e-10)


def uttered(draw, name="SENTENCE", forms=None):
    ways = [way.split() for way in RULES[name].split("|")]
    weights = [int(w.pop(0)) if w and w[0].isdigit() else 1 for w in ways]
    (way,) = draw.choices(ways, weights)
    roles = sorted({part.split(".")[0] for part in way} & CAST.keys())
    company = {"one": ("", {}), "two": ("", {})}
    while len({name for name, _ in company.values()}) < len(company):
        company = {
            role: draw.choice([(n, own) for ns, own in CAST[role].items() for n in ns.split()])
            for role in roles
        }
    words = []
    for part in way:
        role, _, word = part.partition(".")
        own = forms or {}
        if role in company:
            part, own = (word, company[role][1]) if word else (company[role][0], {})
        part = own.get(part, part)
        words += uttered(draw, part, own) if part in RULES else [part]
    return words


def test_a_draw_is_repeated_by_its_seed_and_a_longer_one_begins_alike(english):
    ids = english.sample(3, 30, torch.Generator().manual_seed(2))
    assert ids.dtype == torch.int64 and (ids[:, 0] == 0).all()
    assert torch.equal(ids, english.sample(3, 30, torch.Generator().manual_seed(2)))
    assert torch.equal(ids[:, :9], english.sample(3, 9, torch.Generator().manual_seed(2)))
    assert not torch.equal(ids, english.sample(3, 30, torch.Generator().manual_seed(3)))
    assert torch.equal(english.sample(2, 1, torch.Generator()), torch.zeros(2, 1).long())


# Words and ids


def test_words_go_there_and_back(english):
    text = ". the trophy did not fit in the suitcase because it was too big"
    assert english.decode(english.encode(text)) == text
    assert english.vocab[0] == "." and english.encode(".").tolist() == [0]


def test_a_text_that_cannot_be_said_has_probability_zero(english):
    said = english.encode(". Ann met Bob because she was cold so Bob gave her a coat .")
    unsaid = said.clone()
    unsaid[9] = english.encode("Ann")[0]
    headless = said.roll(-1)
    got = english.log_prob(torch.stack([said, unsaid, headless]))
    assert got.isfinite().tolist() == [True, False, False] and (got[1:] == -torch.inf).all()


# Bad input


@pytest.mark.parametrize("n, length", [(0, 5), (-2, 5), (5, 0), (5, -3)])
def test_no_texts_and_no_length_are_refused(tiny, n, length):
    with pytest.raises(ValueError, match=f"{n} and {length}"):
        tiny.sample(n, length, torch.Generator())


@pytest.mark.parametrize("length", [0, -7])
def test_a_floor_of_no_length_is_refused(tiny, length):
    with pytest.raises(ValueError, match=f"length.* {length}"):
        tiny.floor(length)


def test_unknown_words_are_named(tiny):
    with pytest.raises(ValueError, match="'Zoe', 'flies'"):
        tiny.encode("Ann met Zoe as she flies")


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (torch.zeros(2, 3), "float32"),
        (torch.zeros(2, 3, dtype=torch.int32), "int32"),
        (torch.zeros(3, dtype=torch.int64), r"\(3,\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"\(1, 2, 3\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"\(2, 0\)"),
        (torch.zeros(0, 2, dtype=torch.int64), r"\(0, 2\)"),
        (torch.tensor([[0, 99]]), "0 to 99"),
        (torch.tensor([[0, -1]]), "-1 to 0"),
    ],
)
def test_ids_that_are_no_ids_are_refused(unchecked, tiny, ids, named):
    for question in (tiny.predictive, tiny.log_prob):
        with pytest.raises(ValueError, match=named):
            question(ids)


@pytest.mark.parametrize("ids", [torch.zeros(1, 1, dtype=torch.int64), torch.tensor([98])])
def test_decode_takes_one_text(unchecked, tiny, ids):
    with pytest.raises(ValueError, match=r"\(1, 1\)|98"):
        tiny.decode(ids)


def test_a_prefix_that_cannot_be_said_has_no_prediction(tiny):
    fine = tiny.encode(". Bob met Eve as he")
    wrong = tiny.encode(". Ann met Eve as he")
    with pytest.raises(ValueError, match=r"row 1, position 5: .*'\. Ann met Eve as he'"):
        tiny.predictive(torch.stack([fine, wrong]))
    with pytest.raises(ValueError, match="row 0, position 0: .*'Ann'"):
        tiny.predictive(tiny.encode("Ann met Bob")[None])


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"START": "a"}, "SENTENCE"),
        ({"SENTENCE": "a NOUN"}, "NOUN"),
        ({"SENTENCE": "a B.she"}, "B.she"),
        ({"SENTENCE": "A A.NOUN"}, "A.NOUN"),
        ({"SENTENCE": "0 a | b"}, "0 a"),
        ({"SENTENCE": "A and C"}, "1 A and C"),
        ({"SENTENCE": "a . b"}, "'.'"),
        ({"SENTENCE": "a | SENTENCE b"}, "SENTENCE"),
        ({"SENTENCE": "X", "X": "a Y", "Y": "b | X"}, "X"),
        ({"SENTENCE": "A A.gift", "X": "A A.gift"}, "X"),
    ],
)
def test_rules_that_make_no_language_are_refused(rules, named):
    cast = {"A": {"Ann": {"gift": "X"}}, "C": {"Ann": {}}}
    with pytest.raises(ValueError, match=re.escape(named)):
        Grammar(rules, cast)
