"""A small English whose entropy is known exactly: the floor under a training curve.

Two ideas. The language is data: the tables below, to be read aloud. A rule lists the ways to say
it, between bars, each with a weight in front (1 if none is written). A word in CAPITALS is another
rule. A single capital is a role, cast anew whenever its rule is used, all roles differently; "she"
as said of A is `A.she`: "he" if A is Bob. All other words are themselves. Then a class turns any
such tables into exact probabilities.

B texts · T words in each · V words in the vocabulary.
"""

from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from graphlib import TopologicalSorter
from itertools import permutations, product
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

RULES = {
    "SENTENCE": "2 STORY | ANIMALS | LUGGAGE",
    # Who phones is in need, three times in four; who visits, one time in four. When Ann phones Eve
    # because "she" is cold, the words leave open who is. The end says it.
    "STORY": """
        3 A PHONED B BECAUSE A.she WAS N SO B GAVE A.her DET LOOK N.gift WHEN
      | 1 A PHONED B BECAUSE B.she WAS N SO A GAVE B.her DET LOOK N.gift WHEN
      | 1 A VISITED B BECAUSE A.she WAS N SO B GAVE A.her DET LOOK N.gift WHEN
      | 3 A VISITED B BECAUSE B.she WAS N SO A GAVE B.her DET LOOK N.gift WHEN""",
    # One sheep or many? The word does not say; the verb does.
    "ANIMALS": """
        2 the LOOK D that the LOOK E E.SEES D.RUNS BECAUSE D.IT-FELT WHEN
      | 1 the LOOK D near the LOOK E D.RUNS BECAUSE D.IT-FELT WHEN""",
    "IT-FELT": "it WAS N",
    # The schema of Levesque, Davis and Morgenstern (2012), after Winograd (1972).
    "LUGGAGE": """
        the LOOK T DID not fit in the LOOK C BECAUSE it WAS too big
          SO SOMEONE BOUGHT DET smaller LOOK T WHEN
      | the LOOK T DID not fit in the LOOK C BECAUSE it WAS too small
          SO SOMEONE BOUGHT DET bigger LOOK C WHEN""",
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
    "DET": "a | the | that",
    "LOOK": "3 | red | blue | green | black | white | new",
    "SEES": "sees | likes | hears",
    "RUNS": "runs | sleeps | sings",
    "WARM": "coat | scarf",
    "FOOD": "pear | cake",
    "GUIDE": "map | lamp",
    "FUN": "book | drum",
}

Who = Mapping[str, Mapping[str, str]]  # names, and the words that change when said of them

HE = {"she": "he", "her": "him"}
MANY = {"sees": "see", "likes": "like", "hears": "hear", "runs": "run", "sleeps": "sleep"}
MANY |= {"sings": "sing", "it": "they", "was": "were"}
PEOPLE: Who = {"Ann Eve Mia": {}, "Bob Max Tom": HE}
ANIMALS: Who = {"dog cat bird sheep": {}, "dogs cats birds sheep": MANY}
NEEDS = {"cold": {"gift": "WARM"}, "hungry": {"gift": "FOOD"}}
NEEDS |= {"lost": {"gift": "GUIDE"}, "bored": {"gift": "FUN"}}
THINGS: Who = {"trophy lamp book drum coat": {}}
CASES: Who = {"suitcase box bag basket": {}}
CAST = {"A": PEOPLE, "B": PEOPLE, "D": ANIMALS, "E": ANIMALS, "N": NEEDS, "T": THINGS, "C": CASES}

END = "."  # ends every sentence, and stands before the first: a text begins with it

Cast = Mapping[str, Who]  # who may play a role
Player = tuple[str, Mapping[str, str]]
Forms = frozenset[tuple[str, str]]  # changes that can be hashed
State = tuple[tuple[str, Forms], ...]  # what is still to be said; the first of it is a word


class Grammar:
    """The rules, compiled into a table over beliefs: all that can be known after a prefix.

    Several derivations can say the same words, so the derivation is hidden. A reader can know only
    a belief: the probability of every state of the derivation, given the words so far (the forward
    algorithm of a hidden Markov model). Equal beliefs have equal futures. They are few, and found
    in exact fractions; after that, to predict, to sample and to take the entropy is to look up.
    """

    def __init__(self, rules: Mapping[str, str] = RULES, cast: Cast = CAST) -> None:
        steps = _steps(rules, cast)
        self.vocab = [END, *sorted({word for step in steps for word in step} - {END})]
        self._ids = {word: i for i, word in enumerate(self.vocab)}
        never = (Fraction(0), -1)
        table = [[step.get(word, never) for word in self.vocab] for step in steps]
        self._p = torch.tensor([[float(p) for p, _ in row] for row in table], dtype=torch.float64)
        self._next = torch.tensor([[after for _, after in row] for row in table])
        below = self._p.cumsum(1)
        self._below = below / below[:, -1:]  # ends at exactly 1: no u in [0, 1) falls beyond

    def encode(self, text: str) -> Int64[Tensor, " T"]:
        """Ids of words that stand apart: ". Ann met Bob because he was lost"."""
        unknown = [word for word in text.split() if word not in self._ids]
        if unknown:
            raise ValueError(f"not in the vocabulary: {unknown}")
        return torch.tensor([self._ids[word] for word in text.split()], dtype=torch.int64)

    def decode(self, ids: Int64[Tensor, " T"]) -> str:
        """The words of one text, with spaces between: what `encode` reads."""
        self._check(ids, 1)
        return " ".join(self.vocab[i] for i in ids.tolist())

    def sample(self, n: int, length: int, generator: torch.Generator) -> Int64[Tensor, "n length"]:
        """n texts of so many tokens: END, then sentence after sentence, cut wherever it ends.

        To train on T positions, draw T + 1: inputs `ids[:, :-1]`, targets `ids[:, 1:]`.
        """
        if min(n, length) < 1:
            raise ValueError(f"n and length must be at least 1, got {n} and {length}")
        belief = torch.zeros(n, dtype=torch.int64)
        ids = torch.zeros(n, length, dtype=torch.int64)
        for t in range(1, length):
            u = torch.rand(n, 1, dtype=torch.float64, generator=generator)
            ids[:, t] = torch.searchsorted(self._below[belief], u, right=True)[:, 0]
            belief = self._next[belief, ids[:, t]]
        return ids

    def predictive(self, ids: Int64[Tensor, "B T"]) -> Float64[Tensor, "B T V"]:
        """P(next word | ids[:, : t + 1]) at [:, t]: the softmax of a perfect model's logits."""
        beliefs = self._read(ids)
        for row, t in (beliefs < 0).nonzero()[:1].tolist():
            said = self.decode(ids[row, : t + 1])
            raise ValueError(f"row {row}, position {t}: no text begins {said!r}")
        return self._p[beliefs]

    def log_prob(self, ids: Int64[Tensor, "B T"]) -> Float64[Tensor, " B"]:
        """ln P(text) in nats; -inf for what the grammar cannot say. The first END costs nothing."""
        beliefs = self._read(ids)
        p = self._p[beliefs[:, :-1]].gather(2, ids[:, 1:, None])[:, :, 0]  # (B, T - 1)
        return p.log().sum(1).masked_fill(beliefs[:, -1] < 0, -torch.inf)

    def floor(self, length: int) -> Float64[Tensor, " length"]:
        """H(next word | words 0 to t) in nats, for t < length: the least loss at each position.

        Exact: how likely each belief is at t, times the entropy of the word after it.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        entropy = torch.special.entr(self._p).sum(1)
        source, word = self._p.nonzero(as_tuple=True)
        p, target = self._p[source, word], self._next[source, word]
        likely = torch.zeros_like(entropy)
        likely[0] = 1
        floor = []
        for _ in range(length):
            floor.append(likely @ entropy)
            likely = torch.zeros_like(entropy).index_add(0, target, likely[source] * p)
        return torch.stack(floor)

    def _read(self, ids: Tensor) -> Tensor:
        """The belief after each word; -1 from the first word that cannot come."""
        self._check(ids, 2)
        beliefs = [torch.where(ids[:, 0] == 0, 0, -1)]
        for word in ids[:, 1:].unbind(1):
            beliefs.append(torch.where(beliefs[-1] < 0, -1, self._next[beliefs[-1], word]))
        return torch.stack(beliefs, 1)

    def _check(self, ids: Tensor, ndim: int) -> None:
        if ids.dtype != torch.int64 or ids.ndim != ndim or ids.numel() == 0:
            got = f"{ids.dtype} {tuple(ids.shape)}"
            raise ValueError(f"ids must be int64, not empty, of {ndim} axes, got {got}")
        if not 0 <= ids.min() <= ids.max() < len(self.vocab):
            low, high = ids.min().item(), ids.max().item()
            raise ValueError(f"ids from {low} to {high}, but the vocabulary has {len(self.vocab)}")


class Pair(NamedTuple):
    """One half of a minimal pair: a text, and positions in it."""

    text: str
    pronoun: int
    antecedent: int  # whom or what it means
    resolver: int  # the word that decides it; in the other half another word stands here
    answer: int  # a word that only this reading allows


def pairs() -> list[tuple[Pair, Pair]]:
    """Two texts that differ in one word, and so in what a pronoun means and in how they end."""
    fit = ". the {} did not fit in the {} because it was too {} so Ann bought a {} {} ."
    met = ". {} met {} because {} was cold so {} gave {} a red coat ."
    found = []
    for (thing, _), (case, _) in product(_players(THINGS), _players(CASES)):
        one = Pair(fit.format(thing, case, "big", "smaller", thing), 10, 2, 13, 19)
        two = Pair(fit.format(thing, case, "small", "bigger", case), 10, 8, 13, 19)
        found.append((one, two))
    for (a, of_a), (b, of_b) in permutations(_players(PEOPLE), 2):
        if of_a != of_b:
            she, her, he, him = (of.get(w, w) for of in (of_a, of_b) for w in ("she", "her"))
            one = Pair(met.format(a, b, she, b, her), 5, 1, 5, 9)
            two = Pair(met.format(a, b, he, a, him), 5, 3, 5, 9)
            found.append((one, two))
    return found


def _steps(rules: Mapping[str, str], cast: Cast) -> list[dict[str, tuple[Fraction, int]]]:
    """For every belief, the words that can come: how likely, and the belief after. 0 is the start.

    A state is what is still to be said, as on the stack of a leftmost derivation, so sentences that
    will end alike share it.
    """
    _check_rules(rules, cast)

    @cache
    def futures(stack: State) -> dict[State, Fraction]:
        """Expand rules until the first thing to say is a word. After a sentence, a new one."""
        (name, forms), *rest = stack or (("SENTENCE", frozenset()), (END, frozenset()))
        if name not in rules:
            return {stack: Fraction(1)}
        found: dict[State, Fraction] = defaultdict(Fraction)
        ways = _ways(rules[name])
        for weight, way in ways:
            castings = _castings(way, cast)
            share = Fraction(weight, sum(weight for weight, _ in ways) * len(castings))
            for roles in castings:
                said = [_said(part, roles, forms, rules) for part in way]
                for state, p in futures((*said, *rest)).items():
                    found[state] += p * share
        return found

    beliefs = [frozenset(futures(()).items())]
    index, steps = {beliefs[0]: 0}, []
    for belief in beliefs:  # it grows while it is read
        after: dict[str, dict[State, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
        for state, p in belief:
            for later, q in futures(state[1:]).items():
                after[state[0][0]][later] += p * q
        step = {}
        for word, states in after.items():
            total = sum(states.values(), Fraction(0))
            posterior = frozenset((state, p / total) for state, p in states.items())  # Bayes
            if posterior not in index:
                index[posterior] = len(beliefs)
                beliefs.append(posterior)
            step[word] = (total, index[posterior])
        steps.append(step)
    return steps


def _ways(rule: str) -> list[tuple[int, list[str]]]:
    """The alternatives of a rule, each with its weight."""
    ways = [way.split() for way in rule.split("|")]
    return [(int(w[0]), w[1:]) if w and w[0].isdecimal() else (1, w) for w in ways]


def _players(who: Who) -> list[Player]:
    return [(name, changes) for names, changes in who.items() for name in names.split()]


def _castings(way: list[str], cast: Cast) -> list[dict[str, Player]]:
    """Every way to give the roles of an alternative to different players."""
    roles = sorted({part.partition(".")[0] for part in way} & cast.keys())
    return [
        dict(zip(roles, company, strict=True))
        for company in product(*(_players(cast[role]) for role in roles))
        if len({name for name, _ in company}) == len(roles)
    ]


def _said(
    part: str, roles: dict[str, Player], forms: Forms, rules: Mapping[str, str]
) -> tuple[str, Forms]:
    """A word, or a rule with the forms that its words will take."""
    role, _, word = part.partition(".")
    if role in roles:
        name, own = roles[role]
        part, forms = (word, frozenset(own.items())) if word else (name, frozenset())
    part = dict(forms).get(part, part)
    return part, forms if part in rules else frozenset()


def _check_rules(rules: Mapping[str, str], cast: Cast) -> None:
    if "SENTENCE" not in rules:
        raise ValueError(f"no rule is called SENTENCE, only {list(rules)}")
    mentions: dict[str, set[str]] = {rule: set() for rule in rules}
    for rule in rules:
        for weight, way in _ways(rules[rule]):
            if weight < 1 or not _castings(way, cast):
                raise ValueError(f"{rule} can never be said so: {weight} {' '.join(way)}")
            for part in way:
                role, _, word = part.partition(".")
                name, known = (word, {*rules}) if word else (part, {*rules, *cast})
                if word and role not in cast or name.isupper() and name not in known or name == END:
                    raise ValueError(f"{rule}: {part!r} is neither a word nor a rule nor a role")
                changed = {to for own in cast.get(role, {}).values() for to in own.values()}
                mentions[rule] |= ({name} | changed) & rules.keys()
    list(TopologicalSorter(mentions).static_order())  # a rule in itself: CycleError, a ValueError
