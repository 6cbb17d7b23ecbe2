"""heed.batching.scheduler: thousands of random schedules; every page holds what it should."""

import copy
import random
from collections import Counter

import pytest

from heed.batching.scheduler import POLICIES, Scheduler
from heed.cache.ledger import Ledger


def scheduler(*, page_len, n_pages, **settings):
    return Scheduler(Ledger(1, page_len, n_pages), **settings)


def next_token(text):
    """A stand-in for a model: it depends on every token read."""
    h = 1
    for token in text:
        h = (31 * h + token + 7) % 10007
    return h % 4


def solo(prompt, n_new, eos=None):
    text = list(prompt)
    for _ in range(n_new):
        text.append(next_token(text))
        if text[-1] == eos:
            break
    return text


class Memory:
    """What stands in each slot: filled as planned, and read through the pages of a job."""

    def __init__(self, scheduler):
        self.s, self.slots = scheduler, {}

    def step(self):
        s, ledger = self.s, self.s.ledger
        plan, said = s.plan(), {}
        check_plan(s, plan)
        _, copies = ledger.grow(0, [job.seq for job in plan.stretches], [*plan.stretches.values()])
        assert not copies, "a shared page is written"
        for job, n in plan.stretches.items():
            pages, L, end = ledger.find(job.seq).pages, ledger.page_len, job.read + n
            for p in range(job.read, end):
                assert ledger.counts[pages[p // L]] == 1
                self.slots[pages[p // L], p % L] = job.text[p]
            seen = [self.slots[pages[p // L], p % L] for p in range(end)]
            assert seen == job.text[:end], "a page holds what somebody else wrote"
            if n == job.unread:
                said[job] = next_token(seen)
        assert plan.speakers == [*said]
        ended = s.commit(plan, said)
        check_pages(s)
        return plan, ended


def check_plan(s, plan):
    assert 1 <= len(plan.stretches) <= len(s.running) <= s.max_rows
    assert 1 <= sum(plan.stretches.values()) <= s.max_tokens
    numbers = [job.number for job in [*s.running, *s.waiting]]
    assert numbers == sorted(set(numbers)), "first come, first served"
    for job in (*plan.preempted, *plan.evicted):
        assert job.read == 0 and job.seq == -1 and job not in plan.stretches
    assert all(job in s.waiting for job in plan.preempted)
    assert not plan.preempted or not plan.started, "who has to go does not come back at once"
    assert all(n == job.read and n % s.ledger.page_len == 0 for job, n in plan.started.items())
    for job, n in plan.stretches.items():
        assert 1 <= n <= job.unread and job in s.running
    if s.policy == "chunked":
        speak = [job for job in s.running if job.unread == 1]
        assert all(job in plan.stretches for job in speak[: s.max_tokens])
    else:
        assert len({job.unread > 1 for job in plan.stretches}) == 1
        assert all(n == job.unread for job, n in plan.stretches.items())
    if s.policy == "static" and plan.started:
        assert s.running == [*plan.started], "a batch starts when the one before has ended"


def check_pages(s):
    ledger, holders = s.ledger, [*s.running, *s.kept]
    assert {job.seq for job in holders} == set(ledger.tables)
    tables = {job: ledger.find(job.seq).pages for job in holders}
    owners = Counter(page for pages in tables.values() for page in pages)
    assert [owners[page] for page in range(ledger.n_pages)] == ledger.counts
    used = {page for job in s.running for page in tables[job]}
    cached = {page for job in s.kept for page in tables[job]} - used
    assert len(used) + len(cached) + ledger.free_pages == ledger.n_pages
    for job, pages in tables.items():  # less than one page is wasted
        assert len(set(pages)) == len(pages) == ledger.pages_of(job.read)
        assert ledger.find(job.seq).length == job.read
    assert len({tables[job][-1] for job in s.kept}) == len(s.kept), "kept by two for nothing"
    assert all(job.seq == -1 and not job.read for job in s.waiting)


def settings(rng, policy):
    page_len, n_pages = rng.choice([1, 2, 3, 5]), rng.randint(2, 14)
    sizes = {"page_len": page_len, "n_pages": n_pages, "max_rows": rng.randint(1, 5)}
    return sizes | {"max_tokens": rng.choice([1, 2, 4, 9, 40]), "policy": policy}


def request(rng, s):
    """One that fits, often with the beginning of another one."""
    room = s.ledger.n_pages * s.ledger.page_len
    room = room if s.policy == "chunked" else min(room, s.max_tokens)
    n_new = rng.randint(1, min(8, room))
    prompt = [rng.randrange(2) for _ in range(rng.randint(1, min(12, room - n_new + 1)))]
    return prompt, n_new, rng.choice([None, None, 0, 3])


def play(seed, policy):
    rng = random.Random(seed)
    s = scheduler(**settings(rng, policy))
    memory, want, jobs = Memory(s), {}, []
    asked = [request(rng, s) for _ in range(rng.randint(1, 8))]
    rush, seen = rng.choice([0.1, 0.5, 1.0]), Counter()
    steps, bound, gone = 0, 0, set()
    while asked or s.waiting or s.running:
        while asked and (rng.random() < rush or not (s.waiting or s.running)):
            prompt, n_new, eos = asked.pop()
            job = s.submit(prompt, n_new, eos=eos)
            want[job] = solo(prompt, n_new, eos)
            jobs.append(job)
            bound += len(prompt) + 2 * n_new
        plan, ended = memory.step()
        assert all(job.ended for job in ended)
        steps += 1
        seen["preempted"] += len(plan.preempted)
        seen["evicted"] += len(plan.evicted)
        seen["shared"] += len([n for n in plan.started.values() if n])
        seen["restored"] += len(gone & plan.started.keys())
        gone |= {*plan.preempted}
    # The oldest reads on in every step, or else others say a token, and nobody says one twice.
    assert steps <= bound, "somebody starves"
    assert {job: job.text for job in jobs} == want
    assert not s.running and not s.waiting
    return seen


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_says_what_it_says_alone_in_thousands_of_schedules(policy, unchecked):
    seen = sum((play(seed, policy) for seed in range(1000)), Counter())
    # A test of what never happens is none.
    assert min(seen[what] for what in ("preempted", "restored", "evicted", "shared")) > 50, seen


def read(s, said=None):
    """The next step, in which the speakers say this."""
    plan = s.plan()
    s.ledger.grow(0, [job.seq for job in plan.stretches], [*plan.stretches.values()])
    ended = s.commit(plan, dict.fromkeys(plan.speakers, "!") if said is None else said)
    return plan, ended


def held(s, job):
    return s.ledger.find(job.seq).pages


def test_steps_by_hand():
    # Two rows, pages of two, four tokens a step; b begins like a.
    s = scheduler(n_pages=6, page_len=2, max_rows=2, max_tokens=4)
    a, b, c = s.submit("abcde", 2), s.submit("abx", 2), s.submit("z", 1)
    plan, _ = read(s, {})
    assert plan.started == {a: 0} and plan.stretches == {a: 4} and (a.read, a.unread) == (4, 1)
    plan, _ = read(s, {a: "f", b: "y"})  # b needs only the x of its own
    assert plan.started == {b: 2} and plan.stretches == {a: 1, b: 1}
    assert held(s, b)[0] == held(s, a)[0] and s.ledger.counts[held(s, a)[0]] == 2
    assert a.text[-1] == "f" and s.ledger.free_pages == 2
    plan, ended = read(s, {a: "g", b: "w"})
    assert plan.stretches == {a: 1, b: 1} and ended == [a, b] and list(s.waiting) == [c]
    assert s.kept == [a, b] and (a.read, b.read) == (6, 4) and s.ledger.free_pages == 2
    plan, ended = read(s, {c: "!"})
    assert plan.started == {c: 0} and not plan.evicted and ended == [c] and c.text == ["z", "!"]
    assert s.kept == [a, b] and c.seq == -1 and s.ledger.free_pages == 2
    assert ["".join(job.text) for job in (a, b)] == ["abcdefg", "abxyw"]


def test_the_youngest_goes_when_pages_run_out_and_reads_again_what_it_said():
    s = scheduler(n_pages=4, page_len=1, max_rows=2, max_tokens=9)
    a, b = s.submit("a", 4), s.submit("b", 3)
    read(s, {a: "1", b: "2"})
    read(s, {a: "3", b: "4"})
    plan, _ = read(s, {a: "5"})  # both need a third page, none is free
    assert plan.preempted == [b] and plan.stretches == {a: 1} and not plan.started
    assert list(s.waiting) == [b] and b.text == ["b", "2", "4"] and b.read == 0
    plan, ended = read(s, {a: "6"})  # a has all four pages, b waits
    assert plan.stretches == {a: 1} and ended == [a]
    plan, ended = read(s, {b: "7"})
    assert plan.evicted == [a] and plan.stretches == {b: 3}
    assert ended == [b] and b.text == ["b", "2", "4", "7"]


def test_the_oldest_of_three_goes_on_and_two_others_make_room():
    s = scheduler(n_pages=6, page_len=1, max_rows=3, max_tokens=9)
    a, b, c = (s.submit(x, 6) for x in "abc")
    read(s)
    read(s)
    plan, _ = read(s)  # nine pages are needed: without c there are enough for two
    assert plan.preempted == [c] and s.running == [a, b]
    plan, _ = read(s)
    assert plan.preempted == [b] and list(s.waiting) == [b, c]
    while not a.ended:
        assert list(read(s)[0].stretches) == [a]
    while not b.ended:
        assert b in read(s)[0].stretches
    while not c.ended:
        read(s)
    assert not s.waiting and not s.running


def test_a_batch_waits_for_its_last_request_and_a_continuous_row_does_not():
    first = {}
    for policy in POLICIES:
        s = scheduler(n_pages=99, page_len=4, max_rows=2, max_tokens=99, policy=policy)
        a, b, c = s.submit("aa", 6), s.submit("bb", 1), s.submit("cc", 1)
        for step in range(9):
            plan, _ = read(s)
            if c in plan.stretches and policy not in first:
                first[policy] = step, len(plan.stretches)
            if not s.running and not s.waiting:
                break
        assert a.ended and b.ended and c.ended
    assert first == {"static": (6, 1), "continuous": (1, 1), "chunked": (1, 2)}


def test_what_is_kept_goes_by_its_last_use():
    s = scheduler(n_pages=4, page_len=2, max_rows=1, max_tokens=9)

    def through(prompt):
        job = s.submit(prompt, 1)
        return job, read(s)[0]

    a, _ = through("aa1")
    b, _ = through("bb1")
    assert s.kept == [a, b]
    c, plan = through("aa2")  # a has been used again; c leaves nothing that a has not
    assert plan.started == {c: 2} and s.kept == [b, a] and c.seq == -1
    d, plan = through("ddddd")
    assert plan.evicted == [b] and s.kept == [a, d]
    e, plan = through("bb1")
    assert plan.started == {e: 0} and plan.evicted == [a] and s.kept == [d, e]


def test_pages_that_are_shared_cannot_be_given_away_as_well():
    s = scheduler(n_pages=4, page_len=2, max_rows=2, max_tokens=9)
    a, b = s.submit("aa1", 1), s.submit("bbbb", 3)
    read(s)
    assert s.kept == [a] and s.running == [b]  # b has two pages and will take a third
    c = s.submit("aacd", 1)  # a's page, and one that is not there
    plan, _ = read(s)
    assert not plan.started and not plan.preempted and s.kept == [a] and list(s.waiting) == [c]


def test_a_thousand_equal_requests_leave_one_beginning():
    s = scheduler(n_pages=6, page_len=2, max_rows=1, max_tokens=9)
    for _ in range(1000):
        s.submit("abcde", 1)
    while s.waiting:
        read(s)
    assert len(s.kept) == 1 and s.ledger.free_pages == 4


def test_the_last_token_is_read_even_if_all_pages_are_there():
    s = scheduler(n_pages=4, page_len=2, max_rows=1, max_tokens=9)
    for shared in (0, 2):
        job = s.submit("abcd", 1)
        assert read(s)[0].stretches == {job: 4 - shared}


def snapshot(s):
    jobs = [vars(job) for job in [*s.waiting, *s.running, *s.kept]]
    return copy.deepcopy([jobs, vars(s.ledger), s.submitted])


def test_what_can_never_fit_is_refused_and_nothing_changes(unchecked):
    s = scheduler(n_pages=3, page_len=4, max_rows=2, max_tokens=2)
    s.submit("abc", 2)
    read(s)
    before = snapshot(s)
    for prompt, n_new, words in (
        ("a" * 12, 2, "12 tokens and 2 new ones take 4 pages, but the pool has 3"),
        ("a", 13, "4 pages"),
        ("", 1, "got 0 and 1"),
        ("a", 0, "got 1 and 0"),
        ("a", -1, "got 1 and -1"),
        ("a", 1.0, "got 1 and 1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            s.submit(prompt, n_new)
        assert snapshot(s) == before
    s.submit("a" * 12, 1)  # its last token is never read
    for policy in ("static", "continuous"):
        whole = scheduler(n_pages=9, page_len=4, max_rows=1, max_tokens=8, policy=policy)
        whole.submit("aaaa", 5)
        with pytest.raises(ValueError, match="max_tokens=8"):
            whole.submit("aaaa", 6)


def test_a_step_that_was_not_read_as_planned_is_refused_and_nothing_changes():
    s = scheduler(n_pages=9, page_len=4, max_rows=2, max_tokens=5)
    a, b = s.submit("abc", 2), s.submit("abcd", 2)
    plan = s.plan()
    before = snapshot(s)
    with pytest.raises(ValueError, match="request 0 has not read the 3 tokens"):
        s.commit(plan, {a: "x"})
    assert snapshot(s) == before
    s.ledger.grow(0, [a.seq, b.seq], [3, 2])
    before = snapshot(s)
    for said in ({}, {b: "x"}, {a: "x", b: "x"}):
        with pytest.raises(ValueError, match="1 requests speak"):
            s.commit(plan, said)
        assert snapshot(s) == before
    s.commit(plan, {a: "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_pages", 0), ("page_len", -1), ("max_rows", 1.5), ("max_tokens", None), ("policy", "fair")],
)
def test_bad_settings_are_named(name, value, unchecked):
    good = {"n_pages": 4, "page_len": 2, "max_rows": 2, "max_tokens": 4}
    with pytest.raises(ValueError, match=name):
        scheduler(**good | {name: value})
