"""heed.checks.ch12: its references against heed.tokenizers, autograd and brute force."""

import codecs
import math
import random
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from heed.checks import ch12
from heed.tokenizers import BPE


def whole(data):
    return [data]


def test_the_best_pairs_in_turn_are_the_merges_of_heed():
    data = b"to be or not to be, that is the question; to be is to be"
    words, merges = [list(data)], []
    for new in range(256, 256 + 12):
        pair = ch12.best_pair(words, [1])
        merges.append(pair)
        words = [ch12.merge(words[0], pair, new)]
    assert merges == BPE.train(data, 256 + 12, split=whole).merges
    assert words[0] == ch12.encode(merges, data)


def test_a_stream_is_that_of_pythons_decoder():
    data = "Σήμερα “heute” आज 🙂🙂 né".encode()
    for seed in range(50):
        where = sorted(random.Random(seed).sample(range(1, len(data)), 20))
        tokens = [data[a:b] for a, b in pairwise([0, *where, len(data)])]
        decoder = codecs.getincrementaldecoder("utf-8")()
        assert ch12.stream(tokens) == [decoder.decode(token) for token in tokens]


def test_the_fewest_tokens_are_never_more_than_those_of_the_merges():
    bpe = BPE([(97, 98), (256, 99), (99, 100), (258, 101)])
    counts = []
    for seed in range(50):
        data = bytes(random.Random(seed).choices(b"abcde", k=25))
        counts.append((ch12.fewest(bpe.tokens, data), len(bpe.encode(data))))
    assert ch12.fewest(bpe.tokens, b"abcde") == 2 < len(bpe.encode(b"abcde"))
    assert all(least <= n for least, n in counts) and any(least < n for least, n in counts)


def test_bits_per_byte_is_the_logarithm_of_the_whole_probability():
    n_tokens, n_bytes = [3, 5], [10, 4]
    p = Fraction(1, 8) ** 3 * Fraction(1, 2) ** 5
    nats = torch.tensor([math.log(8), math.log(2)], dtype=torch.float64)
    got = ch12.bits_per_byte(nats, torch.tensor(n_tokens), torch.tensor(n_bytes))
    assert got == pytest.approx(math.log2(p.denominator) / 14, abs=1e-12)


def test_the_tied_gradient_is_autograds():
    ids, targets = torch.tensor([2, 0, 2, 2]), torch.tensor([0, 2, 2, 1])
    table = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x = table[ids]
    h = x.square()
    scores = h @ table.T
    loss = torch.nn.functional.cross_entropy(scores, targets)
    d_x, d_scores, want = torch.autograd.grad(loss, [x, scores, table])
    torch.testing.assert_close(ch12.tied_gradient(ids, d_x, h.detach(), d_scores), want)


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_does_what_heed_does(random_seed):
    p = ch12.problem(random_seed)
    corpus = "\n".join(word for word, n in p.words.items() for _ in range(n))
    bpe = BPE.train(corpus, 260)
    assert ["".join(pair) for pair in p.answer["merges"]] == [t.decode() for t in bpe.tokens[256:]]
    size = sum(n * len(bpe.encode(word)) for word, n in p.words.items())
    assert p.answer["tokens"] == size == p.letters - sum(step.count for step in p.steps)
    assert p.answer["bytes_per_token"] * size == p.letters
    assert [bpe.tokens[i].decode() for i in bpe.encode(p.new)] == list(p.encoded)
    assert p.new not in p.words and len(p.words) == 5


def test_problems_are_repeatable_and_fresh():
    assert repr(ch12.problem(5)) == repr(ch12.problem(5))
    assert len({repr(ch12.problem(s)) for s in range(200)}) == 200


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it():
    p = ch12.problem(3)
    assert str(p.answer["tokens"]) not in repr(p).split("\n", 1)[1]
    worked = p.worked()
    for step in p.steps:
        assert f"{' '.join(step.pair)} stands {step.count} times" in worked
    assert str(p.answer["bytes_per_token"]) in worked and " ".join(p.encoded) in worked
