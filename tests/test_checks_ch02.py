"""The references of chapter 02 against torch, brute force and exact fractions; fresh problems."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from heed.checks import ch02
from heed.models.seq2seq import Seq2Seq, Seq2SeqConfig
from heed.tasks import pairs
from heed.training import cross_entropy

f64 = torch.float64


def normal(*shape):
    return torch.randn(*shape, dtype=f64)


@pytest.mark.parametrize("base", [2, 3, 10])
def test_every_short_string_comes_back_and_no_two_share_a_number(base):
    strings = list(itertools.product(range(base), repeat=3))
    numbers = [ch02.pack(list(digits), base)[-1] for digits in strings]
    assert len(set(numbers)) == base**3 and all(0 < h < 1 for h in numbers)
    for digits, h in zip(strings, numbers, strict=True):
        assert ch02.unpack(h, 3, base) == list(digits[::-1])


def test_capacity_is_the_last_length_with_a_code_for_every_string():
    for n_floats, bits, base in itertools.product((1, 2, 3), (1, 4, 7), (2, 3, 10)):
        n = ch02.capacity(n_floats, bits, base)
        assert base**n <= 2 ** (n_floats * bits) < base ** (n + 1)


def test_a_logarithm_in_floats_would_be_wrong_where_the_check_says_so():
    """3**1000 lies between 2**1584 and 2**1585; and floats round 29 bits to the wrong side."""
    assert 2**1584 < 3**1000 < 2**1585
    assert math.floor(29 * 15 * math.log(2) / math.log(2**29)) in (14, 15)


@pytest.mark.parametrize("reset_first", [False, True])
def test_a_step_is_torchs_cell_or_the_papers_equation(reset_first):
    x, h, W, U, a, b = normal(2, 3), normal(2, 5), normal(15, 3), normal(15, 5), *normal(2, 15)
    got = ch02.gru_step(x, h, W, U, a, b, reset_first)
    want = torch.gru_cell(x, h, W, U, a, b)
    if not reset_first:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    else:
        assert (got - want).abs().max() > 0.01
        r, z = torch.sigmoid(x @ W[:10].T + a[:10] + h @ U[:10].T + b[:10]).chunk(2, 1)
        n = torch.tanh(x @ W[10:].T + a[10:] + (r * h) @ U[10:].T + b[10:])
        torch.testing.assert_close(got, n + z * (h - n), rtol=0, atol=1e-12)


def test_the_two_versions_agree_for_one_channel_without_a_bias_and_not_with_it():
    x, h, W, U, a = normal(2, 3), normal(2, 1), normal(3, 3), normal(3, 1), normal(3)
    for b, same in ((torch.zeros(3, dtype=f64), True), (normal(3), False)):
        both = [ch02.gru_step(x, h, W, U, a, b, first) for first in (False, True)]
        assert torch.allclose(*both, atol=1e-12) is same


def test_shares_are_the_products_of_the_formula():
    gates = torch.rand(6, 4, dtype=f64)
    got = ch02.shares(gates)
    torch.testing.assert_close(got[0], gates.prod(0))
    for t in range(6):
        torch.testing.assert_close(got[t + 1], (1 - gates[t]) * gates[t + 1 :].prod(0))


def test_bits_carried_stay_below_the_logarithm_of_the_number_of_codes():
    """Any decoder that sees one of M codes, on all strings: the counting bound of the chapter."""
    strings = torch.tensor(list(itertools.product(range(3), repeat=3)))
    for M in (1, 2, 5):
        for _ in range(20):
            codes, tables = torch.randint(M, (27,)), 3 * normal(M, 3, 3)
            assert ch02.bits_carried(tables[codes], strings) <= math.log2(M) + 1e-9
    cells = strings[:, 0]  # three codes, used as well as can be: the first symbol is sure
    tables = torch.zeros(3, 3, 3, dtype=f64)
    tables[:, 0] = 300 * torch.eye(3, dtype=f64)
    assert abs(ch02.bits_carried(tables[cells], strings) - math.log2(3)) < 1e-9


def test_bits_carried_are_those_of_the_loss():
    logits, targets = normal(4, 6, 9), torch.randint(9, (4, 6))
    targets[1, 3:] = -100
    loss = cross_entropy(logits, targets).item() / math.log(2)
    want = 21 / 4 * (math.log2(9) - loss)
    assert abs(ch02.bits_carried(logits, targets) - want) < 1e-9


def test_greedy_writes_what_the_model_of_the_book_translates():
    model = Seq2Seq(Seq2SeqConfig(n_source=13, n_target=13, d_embed=4, d_model=7, start="copy"))
    for p in model.parameters():
        p.data = 1.5 * torch.randn_like(p)
    source, _, _ = pairs.reversal(2, 6).batch(40, torch.Generator().manual_seed(0))

    def step(word, state):
        state = torch.gru_cell(model.target(word), state, *model.decoder.all_weights[0])
        return model.head(state), state

    written = ch02.greedy(step, model.encode(source).summary, 1, 2, 9)
    assert torch.equal(written, model.translate(source, 9))
    assert len({(row == 2).any().item() for row in written}) == 2, "some rows end, some do not"


def test_two_ways_to_the_last_states_agree():
    gru = nn.GRU(3, 5, batch_first=True, bidirectional=True).double()
    x, lengths = normal(6, 7, 3), torch.tensor([2, 7, 1, 4, 7, 3])
    got = ch02.last_states(gru, x, lengths)
    torch.testing.assert_close(got, ch02.row_by_row(gru, x, lengths), rtol=0, atol=1e-12)


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_is_what_its_digits_say_in_its_base(random_seed):
    p = ch02.problem(random_seed)
    whole = sum(digit * p.base**place for place, digit in enumerate(p.digits))
    assert p.answer == Fraction(2 * whole + 1, 2 * p.base ** len(p.digits))
    assert ch02.unpack(p.answer, len(p.digits), p.base) == list(p.digits[::-1])
    assert p.states[0] == Fraction(1, 2) and len(p.states) == len(p.digits) + 1


def test_problems_are_repeatable_and_fresh():
    assert repr(ch02.problem(5)) == repr(ch02.problem(5))
    assert len({repr(ch02.problem(s)).split("\n", 1)[1] for s in range(200)}) > 150


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it():
    p = ch02.problem(3)
    said = " ".join(map(str, p.digits))
    assert f"h = 1/2, then h becomes (h + x) / {p.base} for x = {said}" in repr(p)
    assert str(p.answer) not in repr(p)
    for h in p.states:
        assert str(h) in p.worked()
    assert p.worked().count("read") == p.worked().count("write") == len(p.digits)
