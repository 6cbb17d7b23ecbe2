"""Two memories: what moves is counted, the formulas say the same, and the fast one can be full."""

import math

import pytest
import torch

from heed.attention import attention
from heed.flash import traffic
from heed.flash.traffic import Memory

SIZES = [  # T, S, D, Br, Bc: tiles that fit, that do not, of one, larger than everything
    (1, 1, 1, 1, 1),
    (5, 7, 3, 2, 3),
    (8, 9, 2, 1, 4),
    (9, 8, 3, 4, 1),
    (7, 5, 4, 20, 30),
    (1, 9, 3, 8, 3),
    (33, 17, 4, 8, 16),
    (16, 16, 4, 4, 4),
]


def draw(T, S, D):
    rng = torch.Generator().manual_seed(T * 1000 + S)
    sizes = ((T, D), (S, D), (S, D), (T, D))
    return [torch.randn(size, dtype=torch.float64, generator=rng) for size in sizes]


def forward(function, q, k, v, Br, Bc, room=None):
    memory = Memory(room)
    return memory, function(*map(memory.put, (q, k, v)), Br, Bc)


def backward(function, kept, q, k, v, do, Br, Bc, room=None):
    """The backward pass in a memory of its own, on what the forward pass kept."""
    memory = Memory(room)
    return memory, function(*map(memory.put, (q, k, v, *kept, do)), Br, Bc)


def both(x):
    return x[None, None].clone().requires_grad_()


@pytest.mark.parametrize("T, S, D, Br, Bc", SIZES)
def test_all_versions_compute_attention_and_move_what_the_formulas_say(T, S, D, Br, Bc):
    sizes = (T, S, D, Br, Bc)
    q, k, v, do = draw(T, S, D)
    inputs = [both(x) for x in (q, k, v)]
    want = attention(*inputs)
    want.backward(do[None, None])

    memory, (O, P) = forward(traffic.dense, q, k, v, Br, Bc)
    assert (memory.read, memory.written) == traffic.dense_moves(*sizes)
    torch.testing.assert_close(O.x, want[0, 0].detach(), rtol=0, atol=1e-13)

    memory, (O, lse) = forward(traffic.tiled, q, k, v, Br, Bc)
    assert (memory.read, memory.written) == traffic.tiled_moves(*sizes)
    torch.testing.assert_close(O.x, want[0, 0].detach(), rtol=0, atol=1e-13)
    scores = q @ k.T / math.sqrt(D)
    torch.testing.assert_close(lse.x, scores.logsumexp(-1, keepdim=True), rtol=0, atol=1e-13)

    for function, moves, kept in (
        (traffic.dense_backward, traffic.dense_backward_moves, (P.x,)),
        (traffic.tiled_backward, traffic.tiled_backward_moves, (O.x, lse.x)),
        (traffic.split_backward, traffic.split_backward_moves, (O.x, lse.x)),
    ):
        memory, gradients = backward(function, kept, q, k, v, do, Br, Bc)
        assert (memory.read, memory.written) == moves(*sizes)
        for got, x in zip(gradients, inputs, strict=True):
            torch.testing.assert_close(got.x, x.grad[0, 0], rtol=0, atol=1e-12)
        assert memory.held == 0


def test_tiles_save_the_four_trips_of_the_scores_and_pay_one_column():
    for sizes in SIZES:
        T, S = sizes[:2]
        saved = sum(traffic.dense_moves(*sizes)) - sum(traffic.tiled_moves(*sizes))
        assert saved == 4 * T * S - T


def test_room_for_tiles_does_not_grow_with_the_text_and_room_for_rows_does():
    most = {}
    for n in (16, 32, 64):
        q, k, v, do = draw(n, n, 4)
        memory, (_, P) = forward(traffic.dense, q, k, v, 8, 8)
        dense = memory.most
        memory, (O, lse) = forward(traffic.tiled, q, k, v, 8, 8)
        tiled = memory.most
        memory, _ = backward(traffic.tiled_backward, (O.x, lse.x), q, k, v, do, 8, 8)
        most[n] = dense, tiled, memory.most
    assert most[16][1:] == most[32][1:] == most[64][1:]
    assert most[64][0] > 1.8 * most[32][0]


def test_fast_memory_refuses_what_does_not_fit():
    q, k, v, _ = draw(64, 64, 4)
    memory, _ = forward(traffic.tiled, q, k, v, 8, 8)
    forward(traffic.tiled, q, k, v, 8, 8, room=memory.most)
    with pytest.raises(ValueError, match=rf"room for {memory.most - 1} bytes, asked for \d+"):
        forward(traffic.tiled, q, k, v, 8, 8, room=memory.most - 1)
    with pytest.raises(ValueError, match="asked for"):
        forward(traffic.dense, q, k, v, 8, 8, room=memory.most)


def test_what_is_let_go_leaves_fast_memory():
    outside = torch.zeros(100, dtype=torch.float64)
    with Memory() as memory:
        a = outside + 1
        b = a[:10]  # another name for the same place
        assert memory.held == 800
        del a
        assert memory.held == 800
        b.add_(1)  # in place: nothing new
        assert memory.held == 800
        del b
        assert (memory.held, memory.most) == (0, 800)
        c = outside[3:]
        c.mul_(2)
        outside.view(10, 10).t()
        assert memory.held == 0
        d = torch.ones(5, dtype=torch.bool)
    assert (memory.held, memory.most) == (5, 800)
    del d
    assert memory.held == 0
    assert memory.read == memory.written == 0


def test_it_sees_attention_hold_scores_forward_and_backward():
    def most(n):
        x = torch.randn(1, 1, n, 4, requires_grad=True)
        with Memory() as memory:
            attention(x, x, x).sum().backward()
        return memory.most

    assert 4 * 512**2 < most(512) / 3
    assert most(512) / most(256) == pytest.approx(4, rel=0.05)


def test_slow_memory_is_a_copy_that_starts_unwritten():
    memory, x = Memory(), torch.ones(2, 3)
    slow = memory.put(x)
    x.zero_()
    assert slow.x.sum() == 6
    assert slow.read(slice(1), slice(2)).shape == (1, 2)
    slow.read().zero_()
    assert slow.x.sum() == 6
    new = memory.new(4, 2, slow)
    assert new.x.isnan().all() and new.x.dtype == torch.float32
    assert (memory.read, memory.written, memory.held) == (8, 0, 0)


def test_bad_input_is_named(unchecked):
    memory = Memory()
    with pytest.raises(ValueError, match="got 0"):
        Memory(0)
    for x in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match="takes matrices of numbers, got"):
            memory.put(x)
    slow = memory.put(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"a tile \(1, 2\) for \(2, 2\)"):
        slow.write(torch.zeros(1, 2), slice(2))
    wide, longer = memory.put(torch.zeros(4, 3)), memory.put(torch.zeros(5, 2))
    for triple in ((slow, wide, wide), (slow, slow, longer)):
        for function in (traffic.dense, traffic.tiled):
            with pytest.raises(ValueError, match=r"keys and values \(S, D\), got \[\(4, 2\)"):
                function(*triple, 2, 2)
    for blocks in ((0, 2), (2, -1)):
        with pytest.raises(ValueError, match="must be positive, got 4 in tiles of"):
            traffic.tiled(slow, slow, slow, *blocks)
    with pytest.raises(ValueError, match="must be positive, got 0 in tiles of 2"):
        traffic.tiled_moves(0, 4, 2, 2, 2)
