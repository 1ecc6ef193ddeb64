"""Statistics against brute force, closed forms and simulated studies whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from analysis.curves import area_under_curve, at_costs, common_grid, cost_to_target
from analysis.resampling import (
    TwoLevelBootstrap,
    seed_stretch,
    sign_flip_test,
    spread,
    swap_tests,
)
from analysis.statistics import (
    avg_at_n,
    detectable_shift,
    family_weights,
    holm,
    improvement_estimate,
    iqm,
    iqm_estimate,
    pass_at_k,
    probability_of_improvement,
)

Floats = NDArray[np.float64]
FAMILIES = ["sums"] * 20 + ["products"] * 20 + ["words"] * 20


def study(
    rng: np.random.Generator, seeds: int, *, between_seeds: float, between_items: float, effect: float = 0.0
) -> Floats:
    """(S, I) paired differences with known components; the rest has a standard deviation of 0.12."""
    rows = between_seeds * rng.standard_normal((seeds, 1))
    columns = between_items * rng.standard_normal(len(FAMILIES))
    return effect + rows + columns + 0.12 * rng.standard_normal((seeds, len(FAMILIES)))


# -- pass@k


def chance_by_enumeration(n: int, c: int, k: int) -> float:
    """Share of the k-subsets of n samples, c of them correct, that hold a correct one."""
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def test_pass_at_k_is_the_share_of_subsets_with_a_success() -> None:
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                assert float(pass_at_k(n, c, k)) == pytest.approx(chance_by_enumeration(n, c, k), abs=1e-14)


@given(st.data())
def test_pass_at_k_is_the_closed_form_with_exact_integers(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 400))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert float(pass_at_k(n, c, k)) == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_is_unbiased_and_sampling_with_replacement_is_not() -> None:
    n, k, p = 32, 32, 0.1
    c = np.arange(n + 1)
    chance = stats.binom.pmf(c, n, p)
    true = 1 - (1 - p) ** k
    assert float(chance @ pass_at_k(n, c, k)) == pytest.approx(true, abs=1e-12)
    plug_in = float(chance @ (1 - (1 - c / n) ** k))
    assert plug_in == pytest.approx(0.881, abs=1e-3)
    assert true == pytest.approx(0.966, abs=1e-3)


def test_pass_at_k_broadcasts_and_pass_at_one_is_the_mean() -> None:
    n, c = np.array([4, 8, 64]), np.array([1, 8, 0])
    table = pass_at_k(n, c, np.array([[1], [2], [4]]))
    assert table.shape == (3, 3)
    np.testing.assert_allclose(table[0], c / n)
    np.testing.assert_allclose(avg_at_n(n, c), c / n)
    assert table[2].tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0), (4.5, 1, 1), ([4, 4], [1, 9], 1), ([4, 2], 1, 3)]
)
def test_pass_at_k_refuses_impossible_counts(n: object, c: object, k: object) -> None:
    with pytest.raises(ValueError, match=r"pass@k|samples|whole numbers"):
        pass_at_k(n, c, k)  # type: ignore[arg-type]


# -- intervals


@pytest.mark.parametrize("seeds", [3, 5, 16])
@pytest.mark.parametrize(("between_seeds", "between_items"), [(0.0, 0.05), (0.02, 0.05), (0.01, 0.15)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, between_seeds: float, between_items: float) -> None:
    rng = np.random.default_rng(seeds)
    bootstrap = TwoLevelBootstrap(seeds, FAMILIES, resamples=2000)
    held = 0
    for _ in range(300):
        values = study(rng, seeds, between_seeds=between_seeds, between_items=between_items, effect=0.03)
        estimate = bootstrap.estimate(values)
        held += bool(estimate.low <= 0.03 <= estimate.high)
    # 95 % of 300 with a standard error of 1.3 %; a little too wide is allowed, too narrow is not.
    assert 0.915 <= held / 300 <= 0.995


def test_stretching_the_seed_part_gives_the_t_interval() -> None:
    # Without problems the bootstrap variance of a mean is (S-1)/S of the unbiased one.
    values = np.random.default_rng(0).standard_normal((16, 1))
    estimate = TwoLevelBootstrap(16, ["all"], resamples=100_000).estimate(values)
    half = stats.t.ppf(0.975, 15) * values.std(ddof=1) / 4
    assert float(estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.05)
    assert seed_stretch(10_000) == pytest.approx(1, abs=1e-3)


def test_one_seed_leaves_the_textbook_interval_over_problems() -> None:
    values = np.random.default_rng(1).standard_normal((1, 400))
    estimate = TwoLevelBootstrap(1, ["all"] * 400).estimate(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert float(estimate.mean) == pytest.approx(values.mean())
    assert float(estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.06)


def test_pairing_removes_what_arms_share() -> None:
    rng = np.random.default_rng(2)
    shared = rng.uniform(0, 1, 60) + 0.05 * rng.standard_normal((5, 1))
    arm, reference = (shared + 0.01 * rng.standard_normal((5, 60)) for _ in range(2))
    bootstrap = TwoLevelBootstrap(5, FAMILIES)

    def width(values: Floats) -> float:
        estimate = bootstrap.estimate(values)
        return float(estimate.high - estimate.low)

    assert width(arm - reference) < 0.1 * width(arm)


def test_families_weigh_the_same_whatever_their_size() -> None:
    families = ["big"] * 9 + ["small"]
    values = np.array([[1.0] * 9 + [0.0]] * 3)
    np.testing.assert_allclose(values @ family_weights(families), 0.5)
    estimate = TwoLevelBootstrap(3, families).estimate(values)
    assert float(estimate.mean) == 0.5
    # Problems are drawn within their family, so no resample changes the share of a family.
    assert [float(estimate.low), float(estimate.high)] == pytest.approx([0.5, 0.5])


def test_quantities_resampled_together_equal_those_resampled_alone() -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((4, 60, 3))
    bootstrap = TwoLevelBootstrap(4, FAMILIES, resamples=500)
    together = bootstrap.estimate(values)
    for place in range(3):
        alone = bootstrap.estimate(values[:, :, place])
        np.testing.assert_allclose(together.low[place], alone.low)
        np.testing.assert_allclose(together.high[place], alone.high)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("value", [0.01, 0.1, 1 / 3])
def test_equal_differences_have_no_spread_whatever_rounding_says(seeds: int, value: float) -> None:
    for items in range(2, 40):
        found = spread(np.full((seeds, items), value), ["sums"] * items)
        assert 0 <= found.error < 1e-8
        assert 0 <= found.item_error < 1e-8


def test_spread_finds_the_components_that_were_put_in() -> None:
    rng = np.random.default_rng(4)
    found = [spread(study(rng, 8, between_seeds=0.02, between_items=0.1), FAMILIES) for _ in range(400)]
    seed_variance = 0.02**2 + 0.12**2 / 60
    assert np.mean([s.seed_sd**2 for s in found]) == pytest.approx(seed_variance, rel=0.1)
    assert np.mean([s.item_error**2 for s in found]) == pytest.approx(0.1**2 / 60, rel=0.1)
    assert np.mean([s.error**2 for s in found]) == pytest.approx(seed_variance / 8 + 0.1**2 / 60, rel=0.1)


# -- tests


def test_label_swaps_equal_an_enumeration_of_all_swaps() -> None:
    rng = np.random.default_rng(5)
    values = rng.standard_normal((3, 4)) + 0.6
    families = ["all"] * 4

    def statistic(matrix: Floats) -> float:
        return abs(float(matrix.mean())) / spread(matrix, families).error

    signs = itertools.product([-1.0, 1.0], repeat=12)
    swapped = [statistic(values * np.reshape(sign, (3, 4))) for sign in signs]
    exact = np.mean([value >= statistic(values) * (1 - 1e-9) for value in swapped])
    sampled = swap_tests(values[None], families, resamples=20_000)
    assert sampled[0, 0] == sampled[0, 1]  # one family is its own average
    assert sampled[0, 0] == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))


@pytest.mark.parametrize(("seeds", "between_seeds"), [(5, 0.0), (5, 0.03), (10, 0.03)])
def test_swaps_hold_their_level_although_runs_differ_by_luck(seeds: int, between_seeds: float) -> None:
    rng = np.random.default_rng(seeds)
    values = np.stack([study(rng, seeds, between_seeds=between_seeds, between_items=0.0) for _ in range(400)])
    found = swap_tests(values, FAMILIES, resamples=400)[:, 0] <= 0.05
    assert 0.02 <= found.mean() <= 0.085
    if between_seeds:
        # Swapping without dividing by the error that seeds cause calls luck a finding, several times too
        # often.
        signs = rng.choice([-1.0, 1.0], size=(400, *values.shape[1:]))
        naive = [np.mean(np.abs((signs * v).mean((1, 2))) >= abs(v.mean())) <= 0.05 for v in values[:100]]
        assert np.mean(naive) > 0.25


def test_swaps_find_an_effect_and_can_go_below_what_five_seeds_allow() -> None:
    values = study(np.random.default_rng(6), 5, between_seeds=0.005, between_items=0.02, effect=0.1)
    assert swap_tests(values[None], FAMILIES)[0, 0] < 0.005
    assert sign_flip_test(values.mean(axis=1)) == 2 / 2**5


def test_swaps_of_equal_arms_find_nothing_and_of_certain_ones_everything() -> None:
    nothing, certain = np.zeros((5, 60)), np.full((5, 60), 0.1)
    p = swap_tests(np.stack([nothing, certain]), FAMILIES, resamples=1000)
    assert (p[0] == 1).all()
    assert (p[1] == 1 / 1000).all()


def test_sign_flips_equal_the_exact_test_of_scipy() -> None:
    for differences in ([0.1, 0.2, -0.05, 0.3], [0.3, 0.1, 0.2, 0.4, 0.1], [1.0, -1.0, 0.5]):
        exact = stats.permutation_test(
            (np.array(differences), np.zeros(len(differences))),
            lambda x, y: np.mean(x - y),
            permutation_type="samples",
            n_resamples=np.inf,
        ).pvalue
        assert sign_flip_test(np.array(differences)) == pytest.approx(exact)


def test_holm_by_hand() -> None:
    # Holm 1979: sorted p times (m, m-1, ...), never falling, at most 1.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.02, math.nan, 0.03]), [0.04, math.nan, 0.04])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p: list[float]) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= np.minimum(len(p) * np.array(p), 1) + 1e-15).all()
    assert (np.argsort(adjusted[np.argsort(p)], kind="stable") == np.arange(len(p))).all()


# -- effects and aggregates


@pytest.mark.parametrize("seeds", [2, 3, 5, 16])
def test_a_detectable_effect_is_found_in_four_of_five_studies(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    shift = detectable_shift(seeds)
    # The shift is in standard errors of the mean, 1 / sqrt(S) here.
    samples = shift / math.sqrt(seeds) + rng.standard_normal((20_000, seeds))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.015)


def test_detectable_effects_shrink_with_seeds_and_grow_with_corrections() -> None:
    shifts = [detectable_shift(seeds) for seeds in (2, 3, 5, 10, 100_000)]
    assert shifts == sorted(shifts, reverse=True)
    assert shifts[-1] == pytest.approx(1.96 + 0.8416, abs=1e-3)  # the normal limit
    assert detectable_shift(5, alpha=0.05 / 13) > detectable_shift(5)
    assert math.isnan(detectable_shift(1))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_iqm_is_the_trimmed_mean_of_scipy(values: list[float]) -> None:
    assert float(iqm(np.array(values))) == pytest.approx(stats.trim_mean(values, 0.25), abs=1e-12)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=50)
def test_probability_of_improvement_is_mann_whitney(s: int, t: int, families: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 4, (s, families)) / 4, rng.integers(0, 4, (t, families)) / 4
    each = [stats.mannwhitneyu(x[:, f], y[:, f]).statistic / (s * t) for f in range(families)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(each))


def test_aggregate_intervals_hold_their_estimates() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.random((6, 3)), rng.random((6, 3))
    middle, better = iqm_estimate(x), improvement_estimate(x, y)
    assert middle.low <= middle.mean == iqm(x.ravel()) <= middle.high
    assert better.low <= better.mean <= better.high
    assert float(better.mean) == pytest.approx(probability_of_improvement(x, y))
    assert float(improvement_estimate(x, x).mean) == pytest.approx(0.5)


# -- curves


def test_curves_are_read_between_their_points_and_not_beyond() -> None:
    cost, values = np.array([0.0, 10.0, 20.0]), np.array([[0.0, 5.0], [1.0, 4.0], [3.0, 4.0]])
    np.testing.assert_allclose(at_costs(cost, values, np.array([5.0, 15.0])), [[0.5, 4.5], [2.0, 4.0]])
    with pytest.raises(ValueError, match="not within"):
        at_costs(cost, values, np.array([21.0]))
    with pytest.raises(ValueError, match="must not fall"):
        at_costs(cost[::-1], values, np.array([5.0]))


def test_the_mean_of_interpolated_curves_is_exact_on_the_common_grid() -> None:
    costs = [np.array([0.0, 4.0, 10.0]), np.array([0.0, 6.0, 9.0])]
    grid = common_grid(costs)
    np.testing.assert_allclose(grid, [0, 4, 6, 9])
    dense = np.linspace(0, 9, 91)
    values = [np.array([0.0, 1.0, 2.0]), np.array([0.0, 3.0, 3.5])]
    mean = np.mean([at_costs(c, v, grid) for c, v in zip(costs, values, strict=True)], axis=0)
    fine = np.mean([at_costs(c, v, dense) for c, v in zip(costs, values, strict=True)], axis=0)
    np.testing.assert_allclose(np.interp(dense, grid, mean), fine)
    np.testing.assert_allclose(common_grid(costs, limit=5.0), [0, 4, 5])


def test_area_under_a_line_is_its_middle() -> None:
    grid = np.array([0.0, 1.0, 4.0])
    assert float(area_under_curve(grid, 0.2 + 0.1 * grid)) == pytest.approx(0.4)
    np.testing.assert_allclose(area_under_curve(grid, np.ones((2, 3))), [1, 1])


def test_cost_to_target_is_the_first_crossing_or_never() -> None:
    grid = np.array([0.0, 10.0, 20.0, 30.0])
    curves = np.array([[0.0, 0.4, 0.2, 0.8], [0.5, 0.6, 0.7, 0.8], [0.0, 0.1, 0.2, 0.25]])
    np.testing.assert_allclose(cost_to_target(grid, curves, 0.3), [7.5, 0.0, math.inf])
    np.testing.assert_allclose(cost_to_target(grid, curves, np.array([0.4, 0.8, 0.25])), [10, 30, 30])
