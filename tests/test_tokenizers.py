"""heed.tokenizers against a trainer that reads everything again, and against `tokenizers`."""

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from heed.tasks.grammar import Grammar
from heed.tokenizers import BPE, PIECE, Bytes, Characters, merge, pieces

ALICE = (
    "It was no use: she could not reach it, and she couldn't say why; it wasn't 12 or 1024 steps "
    "away!\n    But she said, “I’ll try.” Then she tried, and tried again. Σήμερα. आज 🙂\t\n\n"
)
LEARNED = BPE.train(ALICE, 320)
EVERY = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def whole(data):
    return [data]


def slowly(words, n):
    """Sennrich's loop as it is written: count everything, merge everywhere, again."""
    texts, merges = [list(word) for word in words], []
    for new in range(256, 256 + n):
        counts = Counter(pair for ids in texts for pair in pairwise(ids))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        texts = [merge(ids, best, new) for ids in texts]
        merges.append(best)
    return merges


def exhausted(data, split):
    """As many merges as the text gives."""
    return len(slowly(split(data), len(data)))


def theirs(words, n, names="latin-1"):
    """The n tokens that `tokenizers` learns from words, a byte read as the character of its number.

    Its trainer numbers characters in the order of code points and breaks ties by the smallest
    numbers, so with bytes as characters both its rules are ours.
    """
    library = Tokenizer(models.BPE())
    alphabet = {byte for word in words for byte in word}
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + n, show_progress=False)
    library.train_from_iterator((word.decode(names) for word in words), trainer)
    names = sorted(library.get_vocab().items(), key=lambda item: item[1])
    return library, [name.encode("latin-1") for name, _ in names[len(alphabet) :]]


# The bijection


@EVERY
@given(data=st.binary(max_size=200), n=st.integers(0, 20))
def test_any_bytes_come_back_through_any_merges(data, n):
    bpe = BPE(LEARNED.merges[: 3 * n])
    assert bpe.decode(bpe.encode(data)) == data == Bytes().decode(Bytes().encode(data))


@EVERY
@given(text=st.text(max_size=80))
def test_any_text_comes_back(text):
    assert LEARNED.decode(LEARNED.encode(text)).decode() == text
    if text:
        letters = Characters(text)
        assert letters.decode(letters.encode(text)) == text
        assert letters.vocab_size == len(set(text))


@EVERY
@given(ids=st.lists(st.integers(0, 319), max_size=30))
def test_decode_takes_ids_that_encode_would_never_write(ids):
    data = LEARNED.decode(ids)
    assert data == b"".join(LEARNED.tokens[i] for i in ids)
    assert LEARNED.decode(LEARNED.encode(data)) == data


def test_ids_in_a_tensor_are_ids():
    bpe = BPE.train(ALICE, 300)
    assert bpe.decode(torch.tensor(bpe.encode(ALICE))) == ALICE.encode()


# Training


@EVERY
@given(words=st.lists(st.binary(max_size=12).map(lambda b: bytes(x % 4 for x in b)), max_size=12))
def test_the_fast_trainer_is_the_slow_one(words):
    data, split = b"".join(words), lambda data: words
    n = exhausted(data, split)
    assert BPE.train(data, 256 + n, split=split).merges == slowly(words, n)


@EVERY
@given(data=st.text("ab é\n7'", max_size=120).map(str.encode))
def test_the_fast_trainer_is_the_slow_one_on_pieces(data):
    n = exhausted(data, pieces)
    assert BPE.train(data, 256 + n).merges == slowly(pieces(data), n)


@EVERY
@given(words=st.lists(st.binary(min_size=1, max_size=9).map(lambda b: bytes(x % 3 for x in b))))
def test_the_tokens_are_those_of_the_tokenizers_library_down_to_the_last_merge(words):
    split = lambda data: words  # noqa: E731
    n = exhausted(b"".join(words), split)
    bpe = BPE.train(b"".join(words), 256 + n, split=split)
    assert bpe.tokens[256:] == theirs(words, n)[1]
    assert len(set(bpe.tokens)) == len(bpe.tokens)


def test_three_hundred_tokens_of_english_and_how_it_is_cut_are_the_librarys():
    english = Grammar()
    rows = english.sample(100, 60, torch.Generator().manual_seed(0))
    data = ("\n".join(english.decode(row) for row in rows) + 5 * ALICE).encode()
    bpe = BPE.train(data, 256 + 200)
    library, tokens = theirs(pieces(data), 200)
    assert bpe.tokens[256:] == tokens
    for word in {*pieces(data), *pieces(b" phoney visitations, unhelped: coats'll" * 2)}:
        if set(word) <= set(data):
            said = [
                name.encode("latin-1") for name in library.encode(word.decode("latin-1")).tokens
            ]
            assert [bpe.tokens[i] for i in bpe.encode(word)] == said


def test_pieces_of_plain_text_are_those_of_gpt2():
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    draw = random.Random(0)
    texts = [ALICE.encode("ascii", "ignore").decode()]
    texts += ["".join(draw.choices("ab Z9_.'\n\tlsv-", k=60)) for _ in range(200)]
    for text in texts:
        ours = pieces(text.encode())
        assert [word.encode() for word, _ in cut.pre_tokenize_str(text)] == ours
        assert [b - a for _, (a, b) in gpt2.pre_tokenize_str(text)] == list(map(len, ours))


@EVERY
@given(data=st.binary(max_size=100))
def test_pieces_lose_nothing(data):
    assert b"".join(pieces(data)) == data and all(PIECE.fullmatch(p) for p in pieces(data))


def test_ties_go_to_the_smallest_ids_and_overlaps_count():
    assert BPE.train("ba ca", 257, split=bytes.splitlines).merges == [(32, 99)]
    assert BPE.train("cab", 257).merges == [(97, 98)]  # not (99, 97), which stands before
    assert BPE.train("aaabcbc", 257, split=whole).merges == [(97, 97)]  # 2 like bc, and smaller
    assert BPE.train("bbbacac", 257, split=whole).merges == [(97, 99)]


def test_merges_of_a_longer_list_are_those_of_a_shorter_one():
    long = BPE.train(ALICE, 330)
    assert BPE.train(ALICE, 290).merges == long.merges[:34]


def test_a_text_that_was_learned_is_cut_as_training_left_it():
    words = pieces(ALICE.encode())
    bpe = BPE.train(ALICE, 310)
    texts = [list(word) for word in words]
    for new, pair in enumerate(bpe.merges, start=256):
        texts = [merge(ids, pair, new) for ids in texts]
    assert [bpe.encode(word) for word in words] == texts
    assert bpe.encode(ALICE) == [i for ids in texts for i in ids]


# The door


def test_what_cannot_be_encoded_or_decoded_is_named(unchecked):
    bpe, letters = BPE.train(ALICE, 300), Characters("abc")
    for refused, said in (
        (lambda: letters.encode("abxa?"), r"not in the vocabulary: \['\?', 'x'\]"),
        (lambda: letters.decode([0, 3]), "id 3 is not in a vocabulary of 3"),
        (lambda: Bytes().decode([256]), "id 256 is not in a vocabulary of 256"),
        (lambda: bpe.decode([5, -1]), "id -1 is not in a vocabulary of 300"),
        (lambda: bpe.decode([300]), "id 300 is not in a vocabulary of 300"),
        (lambda: BPE.train(ALICE, 255), "256 bytes are tokens already, got vocab_size 255"),
        (lambda: BPE.train("aba", 300), "no pair is left: this text gives 258 tokens, not 300"),
        (lambda: BPE.train("", 257), "this text gives 256 tokens, not 257"),
        (lambda: BPE([(97, 98), (257, 99)]), r"merge \(257, 99\) makes token 257 of ids that are"),
        (lambda: BPE([(97, -1)]), r"merge \(97, -1\) makes token 256"),
        (lambda: BPE([(97, 98), (97, 98)]), r"merge \(97, 98\) stands twice"),
        (lambda: BPE([], split=bytes.split).encode("a b"), "split lost something: 3 bytes in, 2"),
        (lambda: Bytes().encode("\ud800"), "surrogates not allowed"),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
    for wrong in (lambda: bpe.encode(["a"]), lambda: Bytes().encode(None)):
        with pytest.raises(TypeError, match="reads str or bytes, got"):
            wrong()
    with pytest.raises(TypeError):
        bpe.decode([1.0])


def test_nothing_is_a_text_too():
    bpe = BPE.train(ALICE, 300)
    assert bpe.encode("") == bpe.encode(b"") == [] and bpe.decode([]) == b""
    assert BPE([]).vocab_size == 256 and Characters("").vocab_size == 0
