"""heed.checks.ch09: its references against heed.stretch and brute force, its problems exactly."""

import math
from fractions import Fraction

import pytest
import torch

from heed import stretch
from heed.checks import ch09
from heed.positions import frequencies


def test_unfinished_pairs_are_counted_as_the_theorem_counts_them():
    for trained in (7, 48, 97, 4096, 100_003):
        for base, D in ((50.0, 6), (10000.0, 128), (500000.0, 64)):
            x = D / 2 * math.log(trained / (2 * math.pi)) / math.log(base)
            want = max(0, D // 2 - 1 - math.floor(x))
            assert ch09.unfinished(trained, base, D) == want


@pytest.mark.parametrize("length", [10, 4096, 5000, 40_000])
def test_ntk_and_dynamic_are_heeds_which_are_transformers(length):
    want = stretch.dynamic(frequencies(64), length, 4096, factor=3.0)
    got = ch09.dynamic_ntk(64, 10000.0, 4096, length, 3.0)
    torch.testing.assert_close(got, want, atol=0, rtol=1e-12)
    s = 3.0 * max(1, length / 4096) - 2
    torch.testing.assert_close(ch09.ntk_aware(64, 10000.0, s), want, atol=0, rtol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 8.0, 31.0])
def test_both_ways_to_write_llamas_scaling_are_heeds(factor):
    before = frequencies(64, 500000.0)
    want = stretch.by_parts(before, factor, 4096)
    for f in (ch09.by_parts, ch09.llama3_frequencies, ch09.by_wavelength):
        torch.testing.assert_close(f(before, factor, 4096), want, atol=0, rtol=1e-12)


def test_good_up_to_is_where_the_first_angle_is_new_by_brute_force():
    before, trained = frequencies(16), 128
    after = stretch.ntk(before, 8.0)
    got = ch09.good_up_to(before, after, trained)
    seen = trained * before  # the arc of each pair
    new = [n for n in range(1, 2000) if ((n * after > seen) & (seen < 2 * math.pi)).any()]
    assert new[0] - 1 <= got <= new[0]
    assert ch09.good_up_to(before, stretch.by_parts(before, 8.0, 128), 128) == pytest.approx(1024)


def test_above_perfect_is_zero_for_the_perfect_and_the_divergence_on_average():
    generator = torch.Generator().manual_seed(0)
    chances, guess = torch.randn(2, 5, generator=generator).double().softmax(-1)
    targets = torch.multinomial(chances, 20_000, replacement=True, generator=generator)[:, None]
    both = [p.log().expand(20_000, 1, 5) for p in (guess, chances)]
    got = ch09.above_perfect(both[0], targets, both[1].exp()).item()
    want = (chances * (chances / guess).log()).sum().item()
    assert abs(got - want) < 0.05
    assert ch09.above_perfect(both[1], targets, both[1].exp()).abs().item() < 1e-12


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_is_exact_and_heed_comes_near(random_seed):
    p = ch09.problem(random_seed)
    assert all(isinstance(x, Fraction) for found in p.answer.values() for x in found)
    assert 1 <= p.unfinished <= 3 and p.turns[0] > 1
    assert p.unfinished == int((stretch.turns(p.frequencies(), p.trained) < 1 - 1e-12).sum())
    before, s = p.frequencies(), float(p.factor)
    ours = {
        "interpolated": stretch.interpolated(before, s),
        "NTK-aware": stretch.ntk(before, s),
        "by parts": stretch.by_parts(before, s, p.trained, slow=1.0, fast=4.0),
    }
    for name, exact in p.answer.items():
        want = 2 * math.pi * torch.tensor([float(x) for x in exact], dtype=torch.float64)
        torch.testing.assert_close(ours[name], want, atol=1e-13, rtol=0)
    for exact, n in zip(p.answer["by parts"], p.turns, strict=True):
        if n <= 1:  # back in the arc that it saw
            assert p.factor * p.trained * exact == n


def test_problems_are_repeatable_and_many():
    assert repr(ch09.problem(5)) == repr(ch09.problem(5))
    assert len({repr(ch09.problem(s)).split("\n", 1)[1] for s in range(200)}) > 50


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it():
    p = ch09.problem(5)
    assert f"trained on {p.trained} words" in repr(p) and str(p.factor) in repr(p)
    for found in p.answer.values():
        assert ", ".join(map(str, found)) in p.worked()
        assert ", ".join(map(str, found)) not in repr(p)
