"""Which views, in which order: every image once, groups that do not depend on ranks or batches, and any start."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.rng.sampler import EvalSampler, SamplerSpec, TrainSampler, group_size, stratified_subset
from pipelines.spec import AugmentSpec


@st.composite
def samplers(draw, worlds=(1, 2, 3)) -> dict:
    """Draw arguments of TrainSampler that fit each other."""
    group, world, repeats = draw(st.sampled_from([1, 2, 4, 6])), draw(st.sampled_from(worlds)), draw(st.integers(1, 4))
    batch = group * world * draw(st.integers(1, 3))
    samples = draw(st.integers(batch, 200))
    assume(samples // group // repeats * repeats * group >= batch)
    return {
        "samples": samples,
        "batch": batch,
        "seed": draw(st.integers(0, 2**63 - 1)),
        "repeats": repeats,
        "group": group,
        "world": world,
    }


def whole_epoch(sampler, epoch) -> dict[str, np.ndarray]:
    """Return an epoch's rows, step after step."""
    rows = [vars(sampler.rows(epoch, step)) for step in range(sampler.steps_per_epoch)]
    return {name: np.concatenate([one[name] for one in rows]) for name in rows[0]}


@given(samplers(worlds=(1,)))
def test_a_pass_shows_every_image_once_for_each_view_but_for_the_tail(arguments):
    sampler = TrainSampler(SamplerSpec(**arguments))
    repeats, group = arguments["repeats"], arguments["group"]
    for number in range(2):
        epochs = [whole_epoch(sampler, number * repeats + part) for part in range(repeats)]
        pairs = [pair for epoch in epochs for pair in zip(epoch["samples"], epoch["views"], strict=True)]
        assert len(set(pairs)) == len(pairs)
        assert {view // repeats for _, view in pairs} == {number}
        visited = [set(epoch["samples"].tolist()) for epoch in epochs]
        assert sum(map(len, visited)) == len(set().union(*visited))  # an image belongs to one epoch of its pass
        used = arguments["batch"] * sampler.steps_per_epoch
        assert all(len(epoch["samples"]) == used for epoch in epochs)
        for epoch in epochs:
            counts = Counter(epoch["samples"].tolist())
            full = used // (repeats * group) * group  # images whose block the epoch went through to its end
            assert sum(count == repeats for count in counts.values()) >= full


@given(samplers(worlds=(1,)))
def test_nothing_is_left_out_but_the_tail(arguments):
    arguments |= {"batch": arguments["group"], "repeats": 1}
    epoch = whole_epoch(TrainSampler(SamplerSpec(**arguments)), 5)
    kept = arguments["samples"] // arguments["group"] * arguments["group"]
    assert len(set(epoch["samples"].tolist())) == kept == len(epoch["samples"])


@given(samplers(), st.integers(0, 7))
def test_a_view_is_unique_over_a_run_and_disjoint_between_ranks(arguments, first):
    seen: set[tuple[int, int]] = set()
    ranks = [TrainSampler(SamplerSpec(**arguments, rank=rank)) for rank in range(arguments["world"])]
    for epoch in range(first, first + 5):
        for sampler in ranks:
            rows = whole_epoch(sampler, epoch)
            pairs = set(zip(rows["samples"].tolist(), rows["views"].tolist(), strict=True))
            assert len(pairs) == len(rows["samples"])
            assert not pairs & seen
            seen |= pairs


@given(samplers(), st.integers(0, 9))
def test_ranks_are_slices_of_one_sequence(arguments, epoch):
    alone = TrainSampler(SamplerSpec(**arguments | {"world": 1}))
    ranks = [TrainSampler(SamplerSpec(**arguments, rank=rank)) for rank in range(arguments["world"])]
    for step in range(alone.steps_per_epoch):
        whole, parts = alone.rows(epoch, step), [sampler.rows(epoch, step) for sampler in ranks]
        for name in ("samples", "views", "groups", "passes"):
            assert (getattr(whole, name) == np.concatenate([getattr(part, name) for part in parts])).all()


@given(samplers(), st.sampled_from([1, 2]), st.integers(0, 9))
def test_groups_are_the_same_whatever_the_batch_and_ranks(arguments, factor, epoch):
    def groups(sampler) -> dict[tuple[int, int], list[tuple[int, int]]]:
        rows, found = whole_epoch(sampler, epoch), {}
        for sample, view, group, number in zip(
            *(rows[n] for n in ("samples", "views", "groups", "passes")), strict=True
        ):
            found.setdefault((number, group), []).append((sample, view))
        return found

    smaller = arguments | {"batch": arguments["group"] * factor, "world": 1}
    assume(arguments["samples"] // arguments["group"] // arguments["repeats"] * arguments["repeats"] >= factor)
    assume(arguments["samples"] >= smaller["batch"])
    ours, theirs = groups(TrainSampler(SamplerSpec(**arguments))), groups(TrainSampler(SamplerSpec(**smaller)))
    shared = ours.keys() & theirs.keys()
    assert len(shared) == min(len(ours), len(theirs))  # the shorter epoch is the longer one's beginning
    assert all(ours[key] == theirs[key] for key in shared)
    assert all(len(members) == arguments["group"] for members in ours.values())


@given(samplers(), st.integers(0, 9), st.data())
def test_any_step_can_be_started_at(arguments, epoch, data):
    used = TrainSampler(SamplerSpec(**arguments))
    whole = [used.rows(epoch, step) for step in range(used.steps_per_epoch)]
    used.rows(epoch + 1, 0)  # another epoch in between changes nothing
    start = data.draw(st.integers(0, used.steps_per_epoch - 1))
    for sampler in (used, TrainSampler(SamplerSpec(**arguments))):
        again = sampler.rows(epoch, start)
        assert all((values == getattr(whole[start], name)).all() for name, values in vars(again).items())


@given(samplers())
def test_partners_are_mirror_images_in_their_group_and_never_the_same_image(arguments):
    rows = TrainSampler(SamplerSpec(**arguments)).rows(2, 0)
    own = np.arange(len(rows.samples))
    assert (rows.partners[rows.partners] == own).all()
    assert (rows.groups[rows.partners] == rows.groups).all()
    assert (rows.partners + own == 2 * (own // arguments["group"] * arguments["group"]) + arguments["group"] - 1).all()
    if arguments["group"] > 1:
        assert (rows.samples[rows.partners] != rows.samples).all()
    assert rows.valid.all()


def test_an_image_meets_another_partner_in_each_of_its_views():
    rows = TrainSampler(SamplerSpec(samples=64, batch=48, seed=1, repeats=3, group=16)).rows(0, 0)
    met = {}
    for sample, partner in zip(rows.samples, rows.samples[rows.partners], strict=True):
        met.setdefault(int(sample), set()).add(int(partner))
    assert len(met) == 16
    assert all(len(partners) == 3 for partners in met.values())


def test_a_block_stays_together_so_that_its_images_are_decoded_once():
    rows = TrainSampler(SamplerSpec(samples=1000, batch=48, seed=1, repeats=3, group=16)).rows(4, 3)
    assert len(np.unique(rows.samples)) == 16
    assert sorted(np.unique(rows.views)) == [3, 4, 5]


def test_imagenet_has_the_steps_of_the_reference():
    ranks = [
        TrainSampler(SamplerSpec(samples=1_281_167, batch=1024, seed=0, repeats=3, group=64, rank=rank, world=8))
        for rank in (0, 7)
    ]
    assert ranks[0].steps_per_epoch == 1251
    images = {part: set() for part in range(3)}
    whole = TrainSampler(SamplerSpec(samples=1_281_167, batch=1024, seed=0, repeats=3, group=64))
    for part, seen in images.items():
        for step in range(1251):
            seen.update(whole.rows(part, step).samples.tolist())
    assert [len(seen) for seen in images.values()] == [427_008] * 3
    assert not images[0] & images[1]
    assert not images[1] & images[2]
    assert (ranks[1].rows(2, 1250).samples == whole.rows(2, 1250).samples[-128:]).all()


def test_views_can_be_reused_in_a_new_order():
    arguments = {"samples": 96, "batch": 8, "seed": 3, "repeats": 2, "group": 4}
    endless, reusing = TrainSampler(SamplerSpec(**arguments)), TrainSampler(SamplerSpec(**arguments, views=4))
    for epoch in range(4):
        ours, theirs = whole_epoch(reusing, epoch), whole_epoch(endless, epoch)
        assert all((ours[name] == theirs[name]).all() for name in ours)
    first, again = whole_epoch(reusing, 1), whole_epoch(reusing, 5)

    def keyed(rows):
        names = ("passes", "groups", "samples", "views")
        return sorted(zip(*(rows[name].tolist() for name in names), strict=True))

    assert keyed(first) == keyed(again)
    assert (first["groups"] != again["groups"]).any()
    assert again["views"].max() < 4


def test_orders_differ_between_seeds_passes_and_epochs():
    def order(seed, epoch):
        return tuple(
            whole_epoch(TrainSampler(SamplerSpec(samples=64, batch=8, seed=seed, repeats=1, group=2)), epoch)["samples"]
        )

    assert len({order(0, 0), order(1, 0), order(2**40, 0), order(0, 1), order(0, 2)}) == 5


@pytest.mark.parametrize(
    ("epoch", "samples"),
    [
        (0, [[23, 21, 0, 20, 21, 0, 20, 23], [12, 8, 15, 1, 8, 15, 1, 12], [18, 6, 3, 5, 6, 3, 5, 18]]),
        (1, [[7, 17, 10, 11, 17, 10, 11, 7], [14, 19, 2, 4, 19, 2, 4, 14], [16, 22, 9, 13, 22, 9, 13, 16]]),
        (2, [[12, 11, 13, 17, 11, 13, 17, 12], [3, 5, 7, 14, 5, 7, 14, 3], [22, 8, 4, 23, 8, 4, 23, 22]]),
    ],
)
def test_the_orders_of_a_seed_never_change(epoch: int, samples: list[list[int]]) -> None:
    """A run that an older version began goes on with the images that are left of its epoch."""
    sampler = TrainSampler(SamplerSpec(samples=24, batch=8, seed=11, repeats=2, group=4))
    assert [sampler.rows(epoch, step).samples.tolist() for step in range(3)] == samples


def test_a_permutation_has_no_memory_of_the_order_it_came_from():
    first = [
        TrainSampler(SamplerSpec(samples=8, batch=8, seed=seed, repeats=1, group=1)).rows(0, 0).samples[0]
        for seed in range(4000)
    ]
    counts = np.bincount(first, minlength=8)
    assert np.abs(counts - 500).max() < 100


@given(st.sets(st.integers(0, 99), min_size=8))
def test_a_subset_is_all_that_is_trained_on(subset):
    sampler = TrainSampler(
        SamplerSpec(samples=100, batch=8, seed=1, repeats=1, group=2, subset=np.array(sorted(subset)))
    )
    rows = whole_epoch(sampler, 0)
    assert set(rows["samples"].tolist()) <= subset
    assert len(set(rows["samples"].tolist())) == len(rows["samples"]) == len(subset) // 8 * 8


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 12}, "set augment.mix_group to 6, or set train.batch to a multiple of 8"),
        ({"batch": 8, "world": 3, "group": 2}, "set train.batch to a multiple of 6"),
        ({"batch": 104}, "lower train.batch"),
        ({"samples": 100, "batch": 96, "repeats": 16}, "lower train.batch, augment.mix_group or augment.repeats"),
        ({"views": 5, "repeats": 3}, "multiple of 3 views"),
        ({"rank": 1}, "rank 1 is not one of 1"),
        ({"samples": 0}, "0 images"),
        ({"batch": 0}, "empty"),
        ({"subset": np.array([1, 1, 2])}, "each once"),
        ({"subset": np.array([100])}, "0..99"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_a_remedy(change, message):
    arguments = {"samples": 100, "batch": 8, "seed": 0, "repeats": 1, "group": 8} | change
    with pytest.raises(UserError, match=message):
        TrainSampler(SamplerSpec(**arguments))


def test_a_step_outside_the_epoch_is_an_error():
    for sampler in (TrainSampler(SamplerSpec(samples=10, batch=4, seed=0, repeats=1, group=2)), EvalSampler(10, 4)):
        with pytest.raises(ValueError, match="step"):
            sampler.rows(0, sampler.steps_per_epoch)


def test_groups_matter_only_where_something_is_mixed():
    assert group_size(AugmentSpec(mix_group=16), 64) == 16
    assert group_size(AugmentSpec(mixup=0, cutmix=0), 7) == 1
    with pytest.raises(UserError, match=r"augment\.mix_group to 50"):
        group_size(AugmentSpec(), 100)
    assert TrainSampler(SamplerSpec(samples=50, batch=7, seed=0, repeats=2, group=1)).steps_per_epoch == 7


# --- evaluation and subsets ------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=50)
def test_evaluation_sees_every_sample_once(samples, batch, world):
    ranks = [EvalSampler(samples, batch, rank, world) for rank in range(world)]
    assert len({sampler.steps_per_epoch for sampler in ranks}) == 1
    seen = []
    for sampler in ranks:
        rows = whole_epoch(sampler, 0)
        assert len(rows["samples"]) == sampler.steps_per_epoch * batch
        assert rows["samples"].max() < samples
        assert not rows["views"].any()
        seen += rows["samples"][rows["valid"]].tolist()
        assert (sampler.rows(3, 0).partners == np.arange(batch)).all()
    assert sorted(seen) == list(range(samples))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=300), st.floats(0.01, 1.0), st.integers(0, 2**63 - 1))
@settings(max_examples=50)
def test_a_subset_takes_the_same_share_of_every_class(labels, fraction, seed):
    labels = np.array(labels)
    subset = stratified_subset(labels, fraction, seed)
    assert (np.diff(subset) > 0).all()
    for label, count in Counter(labels.tolist()).items():
        taken = int((labels[subset] == label).sum())
        assert taken >= 1
        assert abs(taken - count * fraction) <= 0.5 or taken == 1
    assert set(stratified_subset(labels, fraction / 2, seed)) <= set(subset)


def test_subsets_depend_on_the_seed_and_on_nothing_else():
    labels = np.arange(1000) % 10
    assert (stratified_subset(labels, 0.1, 1) == stratified_subset(labels, 0.1, 1)).all()
    assert set(stratified_subset(labels, 0.1, 1)) != set(stratified_subset(labels, 0.1, 2))
    assert len(stratified_subset(labels, 1.0, 1)) == 1000


@given(samples=st.integers(1, 60), batch=st.integers(1, 20), world=st.integers(1, 3), seed=st.integers(0, 99))
def test_evaluation_of_a_subset_shows_each_of_it_once(samples: int, batch: int, world: int, seed: int) -> None:
    subset = np.sort(np.random.default_rng(seed).permutation(samples)[: max(1, samples // 2)])
    seen = []
    for rank in range(world):
        sampler = EvalSampler(samples, batch, rank, world, subset)
        for step in range(sampler.steps_per_epoch):
            rows = sampler.rows(0, step)
            seen += rows.samples[rows.valid].tolist()
    assert sorted(seen) == subset.tolist()


@given(samplers(), st.integers(0, 5))
def test_a_whole_epoch_has_every_group_once_and_begins_as_any_other(arguments, epoch: int) -> None:
    """What a teacher is asked: all that batches of any size will show, in their order, and the rest."""
    repeats, group, world = arguments["repeats"], arguments["group"], arguments["world"]
    every = []
    for part in range(repeats):
        for rank in range(world):
            sampler = TrainSampler(SamplerSpec(**arguments, rank=rank, include_partial=True))
            for step in range(sampler.steps_per_epoch):
                rows = sampler.rows(epoch * repeats + part, step)
                every += list(zip(rows.views[rows.valid].tolist(), rows.samples[rows.valid].tolist(), strict=True))
    images = arguments["samples"] // group * group
    assert len(every) == len(set(every)) == images * repeats
    plain, whole = TrainSampler(SamplerSpec(**arguments)), TrainSampler(SamplerSpec(**arguments, include_partial=True))
    for step in range(plain.steps_per_epoch):
        one, other = plain.rows(epoch, step), whole.rows(epoch, step)
        assert other.valid.all()
        assert all((getattr(one, name) == getattr(other, name)).all() for name in vars(one))
