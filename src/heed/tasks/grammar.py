"""A small English whose entropy is known exactly: the floor under a training curve.

The grammar is the two tables below; read them aloud. A rule lists the ways to say it, between bars,
each with a weight in front (1 if none is written). In it a word in CAPITALS is another rule, and a
single capital is a role, cast anew whenever the rule is used, all roles differently. `A.she` is the
word "she" as said of A: "he" if A is Bob. All other words are themselves.

B texts · T words in each · V words in the vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from fractions import Fraction
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

RULES = {
    "SENTENCE": "2 STORY | ANIMALS | LUGGAGE",
    # Whoever phones needs something, as a rule; whoever is visited needs something, as a rule. When
    # Ann phones Eve and "she" is cold, only the end says who it was.
    "STORY": """
        3 A PHONED B BECAUSE A.she WAS N SO B GAVE A.her a LOOK N.gift WHEN
      | 1 A PHONED B BECAUSE B.she WAS N SO A GAVE B.her a LOOK N.gift WHEN
      | 1 A VISITED B BECAUSE A.she WAS N SO B GAVE A.her a LOOK N.gift WHEN
      | 3 A VISITED B BECAUSE B.she WAS N SO A GAVE B.her a LOOK N.gift WHEN""",
    # One sheep or many? The word does not say; the verb does.
    "ANIMALS": """
        2 the LOOK D that the LOOK E E.SEES D.RUNS BECAUSE D.IT-FELT WHEN
      | 1 the LOOK D near the LOOK E D.RUNS BECAUSE D.IT-FELT WHEN""",
    "IT-FELT": "it WAS N",
    # The schema of Levesque, Davis and Morgenstern (2012), after Winograd (1972).
    "LUGGAGE": """
        the LOOK T DID not fit in the LOOK C BECAUSE it WAS too big
          SO SOMEONE BOUGHT a smaller LOOK T WHEN
      | the LOOK T DID not fit in the LOOK C BECAUSE it WAS too small
          SO SOMEONE BOUGHT a bigger LOOK C WHEN""",
    "SOMEONE": "A",
    "WHEN": "2 | again | today",
    "DID": "did | could",
    "PHONED": "phoned | met",
    "VISITED": "visited | helped",
    "BECAUSE": "2 because | as",
    "WAS": "was | felt | looked | seemed",
    "SO": "so | and",
    "GAVE": "gave | lent | brought",
    "BOUGHT": "bought | found",
    "LOOK": "3 | red | blue | green | black | white | new",
    "SEES": "sees | likes | hears",
    "RUNS": "runs | sleeps | sings",
    "WARM": "coat | scarf",
    "FOOD": "pear | cake",
    "GUIDE": "map | lamp",
    "FUN": "book | drum",
}

HE = {"she": "he", "her": "him"}
MANY = {"sees": "see", "likes": "like", "hears": "hear", "runs": "run", "sleeps": "sleep"}
MANY |= {"sings": "sing", "it": "they", "was": "were"}

PEOPLE = [("Ann", {}), ("Eve", {}), ("Mia", {}), ("Bob", HE), ("Max", HE), ("Tom", HE)]
ANIMALS = [("dog", {}), ("cat", {}), ("bird", {}), ("sheep", {})]
ANIMALS += [("dogs", MANY), ("cats", MANY), ("birds", MANY), ("sheep", MANY)]

# Who may play a role, and which words change when they are said of them.
CAST = {
    "A": PEOPLE,
    "B": PEOPLE,
    "D": ANIMALS,
    "E": ANIMALS,
    "N": [
        ("cold", {"gift": "WARM"}),
        ("hungry", {"gift": "FOOD"}),
        ("lost", {"gift": "GUIDE"}),
        ("bored", {"gift": "FUN"}),
    ],
    "T": [("trophy", {}), ("lamp", {}), ("book", {}), ("drum", {}), ("coat", {})],
    "C": [("suitcase", {}), ("box", {}), ("bag", {}), ("basket", {})],
}

END = "."  # ends every sentence, and stands before the first: a text begins with it

Forms = frozenset[tuple[str, str]]  # "she" becomes "he", ...: a dict that can be hashed
State = tuple[tuple[str, Forms], ...]  # what is still to be said; the first of it is a word
Steps = list[dict[str, tuple[Fraction, int]]]


class Grammar:
    """The rules, compiled into a table over beliefs: all one can know after a prefix.

    A derivation is hidden: the same words can come from several. What a reader can know is a
    belief, the probability of each derivation state given the words so far (the forward algorithm
    of a hidden Markov model). Two prefixes with the same belief have the same future. There are
    finitely many beliefs, found in exact fractions, so prediction, sampling and entropy are
    look-ups.
    """

    def __init__(
        self,
        rules: Mapping[str, str] = RULES,
        cast: Mapping[str, Iterable[tuple[str, Mapping[str, str]]]] = CAST,
    ) -> None:
        steps = _steps(rules, {role: list(players) for role, players in cast.items()})
        words = {word for step in steps for word in step}
        self.vocab = [END, *sorted(words - {END})]
        self._ids = {word: i for i, word in enumerate(self.vocab)}
        N, V = len(steps), len(self.vocab)  # N beliefs; the first is the one after END
        self._p = torch.zeros(N, V, dtype=torch.float64)
        self._cdf = torch.zeros(N, V, dtype=torch.float64)
        self._next = torch.full((N, V), -1)  # -1: this word cannot come here
        for belief, step in enumerate(steps):
            below = Fraction(0)
            for i, word in enumerate(self.vocab):
                p, after = step.get(word, (Fraction(0), -1))
                below += p
                self._p[belief, i], self._cdf[belief, i] = float(p), float(below)
                self._next[belief, i] = after

    def encode(self, text: str) -> Int64[Tensor, " T"]:
        """Ids of words that stand apart: ". Ann phoned Bob because he was lost"."""
        unknown = [word for word in text.split() if word not in self._ids]
        if unknown:
            raise ValueError(f"not in the vocabulary: {unknown}")
        return torch.tensor([self._ids[word] for word in text.split()], dtype=torch.int64)

    def decode(self, ids: Int64[Tensor, " T"]) -> str:
        """The words of one text, apart by a space: what `encode` reads."""
        self._check(ids, 1)
        return " ".join(self.vocab[i] for i in ids.tolist())

    def sample(self, n: int, length: int, generator: torch.Generator) -> Int64[Tensor, "n length"]:
        """n texts of that many tokens. Each begins with END, then a sentence begins; cut anywhere.

        Train on `ids[:, :-1]` and `ids[:, 1:]` of length + 1 tokens: every target has a floor.
        """
        _positive(n=n, length=length)
        belief = torch.zeros(n, dtype=torch.int64)
        ids = torch.zeros(n, length, dtype=torch.int64)
        for t in range(1, length):
            u = torch.rand(n, 1, dtype=torch.float64, generator=generator)
            ids[:, t] = torch.searchsorted(self._cdf[belief], u, right=True)[:, 0]
            belief = self._next[belief, ids[:, t]]
        return ids

    def predictive(self, ids: Int64[Tensor, "B T"]) -> Float64[Tensor, "B T V"]:
        """P(next word | ids[:, : t + 1]) at [:, t]: the softmax of a perfect model's logits."""
        beliefs = self._read(ids)
        for row, t in (beliefs < 0).nonzero()[:1].tolist():
            said = self.decode(ids[row, : t + 1])
            raise ValueError(f"row {row}, position {t}: the grammar cannot say {said!r}")
        return self._p[beliefs]

    def log_prob(self, ids: Int64[Tensor, "B T"]) -> Float64[Tensor, " B"]:
        """ln P(text), in nats; -inf if the grammar cannot say it. The first END costs nothing."""
        beliefs = self._read(ids)
        p = self._p[beliefs[:, :-1].clamp(min=0)].gather(2, ids[:, 1:, None])[:, :, 0]  # (B, T - 1)
        return p.log().masked_fill(beliefs[:, 1:] < 0, -torch.inf).sum(1)

    def floor(self, length: int) -> Float64[Tensor, " length"]:
        """H(next word | words up to t) in nats, for t < length: the least loss at each position.

        Exact: the probability of every belief at t, times the entropy of what comes after it.
        """
        _positive(length=length)
        entropy = torch.special.entr(self._p).sum(1)
        source, word = self._p.nonzero(as_tuple=True)
        p, target = self._p[source, word], self._next[source, word]
        occupied = torch.zeros(len(entropy), dtype=torch.float64)
        occupied[0] = 1
        floor = []
        for _ in range(length):
            floor.append(occupied @ entropy)
            occupied = torch.zeros_like(occupied).index_add(0, target, occupied[source] * p)
        return torch.stack(floor)

    def _read(self, ids: Tensor) -> Tensor:
        """The belief after each word; -1 from the first word that cannot come."""
        self._check(ids, 2)
        belief = torch.where(ids[:, 0] == 0, 0, -1)
        beliefs = [belief]
        for word in ids[:, 1:].unbind(1):
            belief = torch.where(belief < 0, -1, self._next[belief, word])
            beliefs.append(belief)
        return torch.stack(beliefs, 1)

    def _check(self, ids: Tensor, ndim: int) -> None:
        if ids.dtype != torch.int64 or ids.ndim != ndim or ids.shape[-1] == 0:
            raise ValueError(
                f"ids must be int64, {ndim}-D and not empty, got {ids.dtype} {ids.shape}"
            )
        if ids.numel() and not 0 <= ids.min() <= ids.max() < len(self.vocab):
            low, high = ids.min().item(), ids.max().item()
            raise ValueError(f"ids from {low} to {high}, but the vocabulary has {len(self.vocab)}")


def _steps(rules: Mapping[str, str], cast: dict) -> Steps:
    """For every belief, the words that can come: how likely, and the belief after. First: start."""

    @cache
    def futures(stack: State) -> dict[State, Fraction]:
        """Say rules, not words, until the first thing to say is a word."""
        stack = stack or (("SENTENCE", frozenset()), (END, frozenset()))
        (name, forms), rest = stack[0], stack[1:]
        if name not in rules:
            return {stack: Fraction(1)}
        found: dict[State, Fraction] = defaultdict(Fraction)
        ways = [way.split() for way in rules[name].split("|")]
        weights = [int(way.pop(0)) if way and way[0].isdecimal() else 1 for way in ways]
        for weight, way in zip(weights, ways, strict=True):
            castings = _castings(way, cast)
            for roles in castings:
                said = tuple(_said(part, roles, forms, rules) for part in way)
                for state, p in futures(said + rest).items():
                    found[state] += p * Fraction(weight, sum(weights) * len(castings))
        return dict(found)

    beliefs = [frozenset(futures(()).items())]
    index, steps = {beliefs[0]: 0}, []
    for belief in beliefs:  # grows as it is read
        after: dict[str, dict[State, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
        for state, p in belief:
            for later, q in futures(state[1:]).items():
                after[state[0][0]][later] += p * q
        step = {}
        for word, states in after.items():
            total = sum(states.values(), Fraction(0))
            posterior = frozenset((state, p / total) for state, p in states.items())
            if posterior not in index:
                index[posterior] = len(beliefs)
                beliefs.append(posterior)
            step[word] = (total, index[posterior])
        steps.append(step)
    return steps


def _castings(way: list[str], cast: dict) -> list[dict[str, tuple[str, Mapping[str, str]]]]:
    roles = sorted({part.partition(".")[0] for part in way} & cast.keys())
    return [
        dict(zip(roles, players, strict=True))
        for players in product(*(cast[role] for role in roles))
        if len({name for name, _ in players}) == len(players)
    ]


def _said(part: str, roles: dict, forms: Forms, rules: Mapping[str, str]) -> tuple[str, Forms]:
    role, _, word = part.partition(".")
    if role in roles:
        name, own = roles[role]
        part, forms = (word, frozenset(own.items())) if word else (name, frozenset())
    part = dict(forms).get(part, part)
    return part, forms if part in rules else frozenset()


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
