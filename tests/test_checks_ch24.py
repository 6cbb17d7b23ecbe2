"""heed.checks.ch24: the wrong answers are caught, and the right ones agree with better ones."""

import itertools
import random
import time
from collections import Counter
from fractions import Fraction

import pytest
import torch

from heed.checks import ch24, check, edited
from heed.roofline import Cost, Machine

H100 = Machine("H100", 989 * 10**12, 3350 * 10**9)  # in whole numbers


def task_id(x):
    return getattr(x, "id", None) or getattr(x, "name", None)


@pytest.mark.parametrize("task", ch24.TASKS, ids=task_id)
def test_a_check_takes_less_than_a_second(task):
    start = time.process_time()
    check(task.id, task.reference)
    assert time.process_time() - start < 1


def test_a_decode_step_takes_as_long_as_heeds_machine_says():
    machine = Machine("paper", 90, 7)
    for N, kappa, group, B, S in ((50, 4, 1, 3, 7), (99, 2, 3, 40, 1), (5, 4, 1, 1, 0)):
        cost = Cost(B * (2 * N + group * kappa * S), 2 * N + B * kappa * S)
        seconds, intensity, batch = ch24.decode_step(N, kappa, group, B, S, machine)
        assert (seconds, intensity) == (machine.seconds(cost), cost.intensity)
        limit = group + 2 * N / (S * kappa) if S else float("inf")
        assert (batch > 0) == (limit > machine.ridge)


def test_the_ridge_of_an_h100_is_out_of_reach_for_llama_from_393_tokens_on():
    batches = [
        ch24.decode_step(7_500_000_000, 131_072, 4, 1, S, H100)[2] for S in (0, 100, 392, 393)
    ]
    assert batches == [296, 396, 120_167, 0]
    assert 4 + 15e9 / (393 * 131_072) < H100.ridge < 4 + 15e9 / (392 * 131_072)


def test_tokens_come_back_from_where_they_were_laid():
    rng = random.Random(1)
    for _ in range(50):
        page_len, free = rng.randint(1, 4), rng.sample(range(20), 20)
        pool, table, text = [None] * 20 * page_len, [], []
        for new in (rng.randint(0, 5) for _ in range(4)):
            before = table
            slots, table, empty = ch24.lay_out(table, len(text), new, page_len, free)
            free = free[len(table) - len(before) :]
            for slot in slots:
                assert pool[slot] is None  # nothing is written over
                pool[slot] = len(text)
                text.append(slot)
            line = [x for p in table for x in pool[p * page_len :][:page_len]]
            assert line == [*range(len(text)), *[None] * empty] and empty < page_len


def test_a_pool_in_random_hands_never_gives_a_page_to_two_and_never_loses_one():
    rng = random.Random(2)
    holders, take, share, give_back, write = ch24.page_pool(6)
    held = []  # one list of pages for each text
    for _ in range(3000):
        before, call = list(holders), rng.choice(("take", "share", "back", "write", "wrong"))
        try:
            if call == "take":
                held.append(take(rng.randint(0, 3)))
                assert all(before[page] == 0 for page in held[-1])
            elif call == "share" and held:
                held.append(list(rng.choice(held)))
                share(held[-1])
            elif call == "back" and held:
                give_back(held.pop(rng.randrange(len(held))))
            elif call == "write" and held and any(held):
                pages = rng.choice([pages for pages in held if pages])
                i = rng.randrange(len(pages))
                pages[i] = write(pages[i])
                assert holders[pages[i]] == 1
            elif call == "wrong":
                give_back([rng.randrange(6)] * 20)
        except ValueError:
            assert holders == before
        count = Counter(page for pages in held for page in pages)
        assert holders == [count[page] for page in range(6)]


def test_the_rule_gives_p_and_accepts_as_often_as_p_and_q_overlap():
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        p, q = ch24._two(generator, least=0)
        parts = [ch24._shares(ch24.accept, p, q, x) if q[x] else [0] * 3 for x in range(3)]
        assert [sum(q[x] * parts[x][t] for x in range(3)) for t in range(3)] == p
        assert sum(q[x] * parts[x][x] for x in range(3)) == sum(map(min, p, q))


def test_tokens_a_pass_are_counted_over_all_outcomes():
    alpha = Fraction(2, 5)
    for k in range(6):
        mean = Fraction(0)
        for outcome in itertools.product((True, False), repeat=k):
            chance = Fraction(1)
            for accepted in outcome:
                chance *= alpha if accepted else 1 - alpha
            run = next((i for i, accepted in enumerate(outcome) if not accepted), k)
            mean += chance * (run + 1)
        passes = [Fraction(100)] * k + [Fraction(1)]  # only the last is worth it
        assert ch24.best_draft(alpha, passes, Fraction(0)) == (k, mean, mean)


def test_four_in_five_are_worth_six_free_drafts_and_four_at_a_tenth():
    passes = [1 + Fraction(k, 12) for k in range(40)]
    for draft, best, tokens, rate in (
        (Fraction(0), 6, 3.95, 2.63),
        (Fraction(1, 10), 4, 3.36, 1.94),
    ):
        got = ch24.best_draft(Fraction(4, 5), passes, draft)
        assert got[0] == best
        assert [float(x) for x in got[1:]] == pytest.approx([tokens, rate], abs=0.005)
        for k in (best - 1, best + 1):
            nearby = sum(Fraction(4, 5) ** i for i in range(k + 1)) / (passes[k] + k * draft)
            assert 0.98 < nearby / got[2] < 1


def test_continuous_batching_is_never_slower_and_ends_by_the_two_bounds():
    rng = random.Random(4)
    for _ in range(50):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 20))]
        rows = rng.randint(1, 5)
        (static, _), (continuous, first) = ch24.two_schedules(lengths, rows)
        low = max(max(lengths), -(-sum(lengths) // rows))
        assert low <= continuous <= static and continuous < low + max(lengths)
        assert max(a + n for a, n in zip(first, lengths, strict=True)) == continuous + 1
    same = ch24.two_schedules([7] * 10, 3)
    assert same[0] == same[1]


def test_both_ways_to_verify_give_the_same_distribution_of_answers():
    p, q = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], [[0.2, 0.7, 0.1]]
    for drafted in ([0], [1], [2]):
        seen = []
        for f in (ch24.verify, ch24.verify_at_once):
            rng = random.Random(5)
            seen.append(Counter(str(f(p, q, drafted, rng)) for _ in range(2000)))
        assert seen[0].keys() == seen[1].keys()
        assert all(abs(seen[0][x] - seen[1][x]) < 150 for x in seen[0])
    assert ch24.verify(p[:1], [], [], random.Random(1))[1] == 0


def test_each_bug_but_those_of_the_record_changes_how_often_a_token_comes():
    """So a test that only counts the tokens can find them, and the hints do not mislead."""
    counts = {}
    p = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.1, 0.7]]
    q = [[0.2, 0.7, 0.1], [0.6, 0.1, 0.3]]
    for name, f in [("none", ch24.verify)] + [
        (bug.name, edited(ch24.verify, bug.edits)) for bug in ch24.BUGS
    ]:
        rng, places = random.Random(6), [Counter() for _ in p]
        mine = [row[:] for row in p]
        for _ in range(2000):
            drafted = [rng.choices(range(3), row)[0] for row in q]
            for place, token in zip(places, f(mine, q, drafted, rng)[0], strict=False):
                place[token] += 1
        counts[name] = [place[t] / 2000 for place in places for t in range(3)]
    same = {
        name
        for name, got in counts.items()
        if max(abs(a - b) for a, b in zip(got, counts["none"], strict=True)) < 0.03
    }
    assert same == {"none", "refused drafts stay in the cache"}


def test_a_wrong_answer_is_shown_with_its_numbers():
    said = repr(check("24.4", lambda p, q, drafted, u: drafted))
    assert "p = 1/2, 1/3, 1/6, q = 1/6, 7/12, 1/4, drafted 1; how often 1 is returned" in said
    assert "expected  4/7\n  got       1\n" in said
    assert "a token, 0 to 2" in repr(check("24.4", lambda p, q, drafted, u: 3))
    said = repr(check("24.6", lambda lengths, rows: ((9, []), (9, []))))
    assert "lengths [3, 5, 2], 3 rows; static, steps" in said
    assert "5 results" in repr(check("24.3", lambda n: [0] * n))
    assert "a list of holders" in repr(check("24.3", lambda n: ((0,) * n, *[len] * 4)))
    assert "got       a str" in repr(check("24.5", lambda *costs: ("1", 1, 1)))


# A hundred problems


@pytest.mark.parametrize("random_seed", range(100))
def test_a_problem_has_the_numbers_of_the_tasks(random_seed):
    p = ch24.problem(random_seed)
    answer, machine = p.answer, p.machine
    step = ch24.decode_step(p.numbers, p.kept, 1, p.rows, p.read, machine)
    exact = (answer["a token written"] * p.rows, answer["intensity, write"])
    assert step[:2] == pytest.approx(tuple(map(float, exact)), rel=1e-12)
    rest = answer["drawn instead"]
    model, draft = ([Fraction(n, 12) for n in row] for row in (p.p, p.q))
    accepted = Fraction(0)
    for x in range(len(model)):
        shares = ch24._shares(ch24.accept, model, draft, x)
        accepted += draft[x] * shares[x]
        if shares[x] < 1:
            others = [s * (t != x) for t, s in enumerate(shares)]
            assert [s / sum(others) for s in others] == list(rest)
    assert accepted == answer["accepted"]
    passes = [Fraction(99)] * p.drafted + [Fraction(1)]
    _, tokens, _ = ch24.best_draft(accepted, passes, Fraction(0))
    assert tokens == answer["tokens a pass"]
    a, b, c = p.lengths
    tables = {}
    free = list(range(99))
    for name, n in (("A", a), ("B", b), ("C", c)):
        _, tables[name], _ = ch24.lay_out([], 0, n, p.page, free)
        free = [page for page in free if page not in tables[name]]
    free = sorted(free + tables.pop("B"))
    _, tables["A"], left = ch24.lay_out(tables["A"], a, p.more, p.page, free)
    assert {name: tuple(pages) for name, pages in tables.items()} == {
        name: answer[name] for name in ("A", "C")
    }
    assert answer["empty"] == left + -c % p.page


def test_problems_are_repeatable_and_fresh_and_can_be_read():
    assert repr(ch24.problem(5)) == repr(ch24.problem(5))
    assert len({repr(ch24.problem(s)) for s in range(200)}) > 190
    for s in range(20):
        p = ch24.problem(s)
        assert max(map(len, repr(p).splitlines())) <= 96
        assert str(p.answer["tokens a pass"]) not in repr(p)
        assert str(p.answer["tokens a pass"]) in p.worked()


def test_the_tasks_are_numbered_and_the_last_is_to_write_the_test():
    assert [task.id for task in ch24.TASKS] == [f"24.{n}" for n in range(1, 8)]
    assert [bool(task.bugs) for task in ch24.TASKS] == [False] * 6 + [True]
