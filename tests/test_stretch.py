"""heed.stretch against transformers, against the base it stands for, and against angles counted."""

import math
from fractions import Fraction

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from heed import positions, stretch

SHAPES = [(128, 10000.0, 4096), (64, 500000.0, 8192), (16, 10000.0, 48), (24, 1000000.0, 32768)]
SHAPES += [(64, 10000.0, 131072)]  # every pair finishes: YaRN's ramp ends behind the last


def theirs(kind, d_head, base, trained, factor, *, length=None, **more):
    """Frequencies and attention factor by transformers, in float32."""
    config = LlamaConfig(
        hidden_size=2 * d_head,
        num_attention_heads=2,
        head_dim=d_head,
        max_position_embeddings=trained,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": base,
            "factor": factor,
            "original_max_position_embeddings": trained,
            **more,
        },
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


def same(ours, them, tol=1e-6):
    """Within 1e-6 of the frequency itself: the slow ones are small, and they are what matters."""
    torch.testing.assert_close(ours / them.double(), torch.ones_like(ours), atol=tol, rtol=0)


# The same frequencies as transformers


@pytest.mark.parametrize("factor", [2.0, 8.0, 31.0])
@pytest.mark.parametrize("d_head, base, trained", SHAPES)
def test_interpolation_is_what_transformers_calls_linear(d_head, base, trained, factor):
    ours = stretch.interpolated(positions.frequencies(d_head, base), factor)
    same(ours, theirs("linear", d_head, base, trained, factor)[0])


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("times", [0.5, 1.0, 1.3, 8.0])
@pytest.mark.parametrize("d_head, base, trained", SHAPES)
def test_dynamic_is_transformers_for_every_length(d_head, base, trained, times, factor):
    length = int(trained * times)
    ours = stretch.dynamic(positions.frequencies(d_head, base), length, trained, factor=factor)
    same(ours, theirs("dynamic", d_head, base, trained, factor, length=length)[0])


@pytest.mark.parametrize("slow, fast", [(1.0, 4.0), (2.0, 32.0), (0.5, 1.5)])
@pytest.mark.parametrize("d_head, base, trained", SHAPES)
def test_by_parts_is_what_transformers_calls_llama3(d_head, base, trained, slow, fast):
    more = {"low_freq_factor": slow, "high_freq_factor": fast}
    them, gain = theirs("llama3", d_head, base, trained, 8.0, **more)
    ours = stretch.by_parts(positions.frequencies(d_head, base), 8.0, trained, slow=slow, fast=fast)
    same(ours, them, 4e-6)  # a steep ramp, which they climb in float32
    assert gain == 1


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("factor, slow, fast", [(4.0, 1.0, 32.0), (16.0, 1.0, 4.0), (40.0, 2, 30)])
@pytest.mark.parametrize("d_head, base, trained", SHAPES)
def test_yarn_is_transformers_ramp_and_factor(d_head, base, trained, factor, slow, fast, whole):
    more = {"beta_fast": fast, "beta_slow": slow, "truncate": whole}
    them, gain = theirs("yarn", d_head, base, trained, factor, **more)
    ours = stretch.yarn(
        positions.frequencies(d_head, base), factor, trained, slow=slow, fast=fast, whole=whole
    )
    same(ours, them)
    assert stretch.attention_factor(factor) == pytest.approx(gain, abs=1e-12)


# What each of them promises


@pytest.mark.parametrize("d_head, base, trained", SHAPES)
def test_ntk_is_a_larger_base_that_keeps_the_first_pair_and_interpolates_the_last(
    d_head, base, trained
):
    before = positions.frequencies(d_head, base)
    after = stretch.ntk(before, 8.0)
    raised = positions.frequencies(d_head, base * 8.0 ** (d_head / (d_head - 2)))
    torch.testing.assert_close(after, raised, atol=0, rtol=1e-12)
    assert after[0] == before[0] and after[-1].item() == pytest.approx(before[-1].item() / 8)
    inside = 8 * trained * after <= trained * before * (1 + 1e-12)
    assert inside.tolist() == [False] * (d_head // 2 - 1) + [True]  # only the last sees old angles


def test_a_factor_of_one_changes_nothing():
    before = positions.frequencies(32)
    for after in (
        stretch.interpolated(before, 1.0),
        stretch.ntk(before, 1.0),
        stretch.dynamic(before, 40, 48, factor=4.0),
        stretch.dynamic(before, 48, 48, factor=4.0),
        stretch.by_parts(before, 1.0, 48),
        stretch.yarn(before, 1.0, 48),
    ):
        torch.testing.assert_close(after, before, atol=0, rtol=1e-15)
    assert stretch.attention_factor(1.0) == 1


def test_by_parts_leaves_finished_pairs_and_interpolates_unfinished_ones():
    before = positions.frequencies(128)
    after, made = stretch.by_parts(before, 8.0, 4096), stretch.turns(before, 4096)
    assert torch.equal(after[made >= 4], before[made >= 4])
    torch.testing.assert_close(after[made <= 1], before[made <= 1] / 8, atol=0, rtol=1e-15)
    between = (made > 1) & (made < 4)
    assert between.any() and (after[between] < before[between]).all()
    assert (after[between] > before[between] / 8).all()


def test_yarn_is_a_ramp_in_the_index_and_by_parts_a_ramp_in_turns():
    before = positions.frequencies(128)
    kept = {
        name: (f(before, 2.0, 4096, slow=1.0, fast=32.0) / before - 0.5) * 2
        for name, f in {"index": stretch.yarn, "turns": stretch.by_parts}.items()
    }
    inside = slice(21, 45)  # between the ends of both ramps
    assert kept["index"][inside].diff().std() < 1e-12  # a straight line
    share = kept["turns"][inside] - (stretch.turns(before, 4096)[inside] - 1) / 31
    assert share.abs().max() < 1e-12
    assert (kept["index"] - kept["turns"])[inside].max() > 0.3  # and far from one another


def test_turns_are_counted_as_exactly_as_fractions_count_them():
    rates = [Fraction(1, 4), Fraction(1, 12), Fraction(1, 36), Fraction(1, 108)]  # of a turn
    angles = torch.tensor([float(2 * r) * math.pi for r in rates], dtype=torch.float64)
    want = torch.tensor([float(48 * r) for r in rates], dtype=torch.float64)
    torch.testing.assert_close(stretch.turns(angles, 48), want, atol=1e-13, rtol=0)


@pytest.mark.parametrize(
    "base, trained, unfinished", [(10000.0, 2048, 23), (10000.0, 4096, 18), (500000.0, 8192, 29)]
)
def test_pairs_that_never_finish_a_turn_in_published_models(base, trained, unfinished):
    made = stretch.turns(positions.frequencies(128, base), trained)
    by_logarithm = 64 - math.ceil(64 * math.log(trained / (2 * math.pi)) / math.log(base))
    assert (made < 1).sum() == unfinished == by_logarithm


def test_dynamic_forgets_a_long_text_when_a_short_one_follows():
    before = positions.frequencies(16)
    stretch.dynamic(before, 4000, 48)
    assert torch.equal(stretch.dynamic(before, 20, 48), before)


# The rotation


def test_the_rotation_is_that_of_positions_for_its_own_frequencies():
    x, places = torch.randn(2, 3, 7, 16, dtype=torch.float64), torch.arange(7) + 100
    ours = stretch.rotation(positions.frequencies(16))(x, places)
    torch.testing.assert_close(ours, positions.rotate(x, places), atol=1e-12, rtol=0)


def test_interpolation_is_the_old_rotation_at_positions_divided():
    x, places = torch.randn(1, 1, 5, 8, dtype=torch.float64), torch.arange(5)
    slowed = stretch.rotation(stretch.interpolated(positions.frequencies(8), 3.0))
    torch.testing.assert_close(
        slowed(x, 3 * places), positions.rotate(x, places), atol=1e-12, rtol=0
    )


def test_the_gain_squares_in_the_scores_and_the_angle_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    at = lambda m, n, gain: (  # noqa: E731
        stretch.rotation(positions.frequencies(16), gain)(q, torch.tensor([m]))
        @ stretch.rotation(positions.frequencies(16), gain)(k, torch.tensor([n])).mT
    ).item()
    assert at(9, 4, 1.5) == pytest.approx(2.25 * at(9, 4, 1.0), abs=1e-12)
    assert at(1009, 1004, 1.0) == pytest.approx(at(9, 4, 1.0), abs=1e-10)


def test_half_precision_is_turned_by_float32_angles():
    x = torch.randn(1, 1, 1, 16)
    place = torch.tensor([100_001])
    exact = stretch.rotation(positions.frequencies(16))(x.bfloat16().double(), place)
    near = stretch.rotation(positions.frequencies(16))(x.bfloat16(), place)
    assert near.dtype == torch.bfloat16 and (near.double() - exact).abs().max() < 0.05


# Bad input

GOOD = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)


@pytest.mark.parametrize(
    "bad, said",
    [
        (torch.tensor([1, 2]), "floating"),
        (torch.ones(2, 2), r"\(2, 2\)"),
        (torch.ones(0), r"\(0,\)"),
        (torch.tensor([1.0, 0.0]), "positive"),
        (torch.tensor([1.0, -0.1]), "positive"),
        (torch.tensor([math.inf, 1.0]), "finite"),
    ],
)
def test_what_is_no_list_of_frequencies_is_refused(bad, said, unchecked):
    for use in (
        lambda f: stretch.turns(f, 8),
        lambda f: stretch.interpolated(f, 2.0),
        lambda f: stretch.ntk(f, 2.0),
        lambda f: stretch.dynamic(f, 8, 4),
        lambda f: stretch.by_parts(f, 2.0, 8),
        lambda f: stretch.yarn(f, 2.0, 8),
        lambda f: stretch.rotation(f),
    ):
        with pytest.raises(ValueError, match=said):
            use(bad)


@pytest.mark.parametrize("factor", [0.5, 0.0, -2.0, math.inf, math.nan])
def test_a_factor_below_one_is_refused_as_the_wrong_way_round(factor):
    for use in (
        lambda s: stretch.interpolated(GOOD, s),
        lambda s: stretch.ntk(GOOD, s),
        lambda s: stretch.dynamic(GOOD, 8, 4, factor=s),
        lambda s: stretch.by_parts(GOOD, s, 8),
        lambda s: stretch.yarn(GOOD, s, 8),
        stretch.attention_factor,
    ):
        with pytest.raises(ValueError, match="at least 1"):
            use(factor)


def test_other_nonsense_is_named():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        stretch.turns(GOOD, 0)
    with pytest.raises(ValueError, match="trained must be at least 1, got -4"):
        stretch.dynamic(GOOD, 8, -4)
    with pytest.raises(ValueError, match="one pair"):
        stretch.ntk(GOOD[:1], 2.0)
    for order in ([0.1, 1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="fast to slow"):
            stretch.ntk(torch.tensor(order), 2.0)
        with pytest.raises(ValueError, match="each the same share"):
            stretch.yarn(torch.tensor(order), 2.0, 8)
    with pytest.raises(ValueError, match="4.0 to 1.0"):
        stretch.by_parts(GOOD, 2.0, 8, slow=4.0, fast=1.0)
    with pytest.raises(ValueError, match="0.0 to 4.0"):
        stretch.yarn(GOOD, 2.0, 8, slow=0.0, fast=4.0)
    with pytest.raises(ValueError, match="gain"):
        stretch.rotation(GOOD, 0.0)


def test_a_list_stretched_once_is_not_stretched_by_yarn_again():
    once = stretch.yarn(positions.frequencies(64), 4.0, 4096)
    with pytest.raises(ValueError, match="each the same share"):
        stretch.yarn(once, 4.0, 4096)


def test_the_rotation_refuses_another_width(unchecked):
    turn = stretch.rotation(GOOD)
    with pytest.raises(ValueError, match=r"positions, 6\), got \(1, 1, 2, 8\)"):
        turn(torch.zeros(1, 1, 2, 8), torch.arange(2))
