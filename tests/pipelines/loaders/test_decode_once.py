"""Which run of a decoder cuts which crop: all of them, each once, of as few images as can be."""

import numpy as np
import pytest

from pipelines.loaders.dali.decode_once import GEOMETRY, UNUSED_CROP, DecodeRun, decode_once, plan_run
from pipelines.rng.sampler import EvalSampler, Rows, SamplerSpec, TrainSampler
from pipelines.rng.view_params import draw_eval, draw_train
from pipelines.spec import AugmentSpec

SPEC = AugmentSpec(size=32, repeats=3, mix_group=4, seed=3)
SAMPLES = 101


def works(sampler: TrainSampler | EvalSampler, views: int, start: int = 0, epoch: int = 1) -> list[DecodeRun]:
    draw_views = draw_train if isinstance(sampler, TrainSampler) else draw_eval
    sides = np.full(len(sampler.rows(0, 0).samples), 90)
    asked = []

    def draw(step: int):
        asked.append(step)
        rows = sampler.rows(epoch, step)
        return rows, draw_views(SPEC, rows, sides, sides + 7)

    found = list(decode_once(draw, range(start, sampler.steps_per_epoch), views))
    assert asked == list(range(start, sampler.steps_per_epoch))
    return found


def check(found: list[DecodeRun]) -> None:
    """Every valid row of every step gets its own crop once, from its own image, before its step is due."""
    size, given = len(found[0].rows.samples), np.zeros((len(found), len(found[0].rows.samples)), int)
    for number, work in enumerate(found):
        for view, line in zip(*np.nonzero(work.destination >= 0), strict=True):
            ahead, row = divmod(int(work.destination[view, line]), size)
            target = found[number + ahead]
            given[number + ahead, row] += 1
            assert target.rows.samples[row] == work.samples[line]
            expected = np.concatenate([target.params[name][row] for name in GEOMETRY])
            np.testing.assert_array_equal(work.geometry[view, line], expected)
            assert work.mirror[view, line] == target.params.flip[row]
        assert (work.geometry[work.destination < 0] == UNUSED_CROP).all()
    np.testing.assert_array_equal(given, [work.rows.valid for work in found])


@pytest.mark.parametrize(("batch", "world"), [(12, 1), (16, 1), (4, 1), (20, 1), (24, 2), (16, 4)])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_every_row_gets_its_crop_once(batch: int, world: int, start: int) -> None:
    for rank in range(world):
        sampler = TrainSampler(
            SamplerSpec(
                samples=SAMPLES,
                batch=batch,
                seed=SPEC.seed,
                repeats=SPEC.repeats,
                group=SPEC.mix_group,
                rank=rank,
                world=world,
            )
        )
        check(works(sampler, SPEC.repeats, start))


@pytest.mark.parametrize("batch", [4, 8, 12, 16, 20])
def test_an_image_is_decoded_once_an_epoch_wherever_its_block_falls(batch: int) -> None:
    sampler = TrainSampler(
        SamplerSpec(samples=SAMPLES, batch=batch, seed=SPEC.seed, repeats=SPEC.repeats, group=SPEC.mix_group)
    )
    found = works(sampler, SPEC.repeats)
    decoded = np.concatenate([work.samples for work in found])
    assert len(np.unique(decoded)) == len(decoded)


def test_more_views_than_a_run_cuts_take_another_line() -> None:
    sampler = TrainSampler(
        SamplerSpec(samples=SAMPLES, batch=24, seed=SPEC.seed, repeats=SPEC.repeats, group=SPEC.mix_group)
    )
    found = works(sampler, 2)
    check(found)
    decoded = found[0].samples
    assert len(decoded) > len(np.unique(decoded))


def test_later_crops_take_only_what_room_is_left() -> None:
    """Steps of 8 rows hold two views of each of 4 images: a run that cuts two has no room for the third."""
    check(
        works(
            TrainSampler(
                SamplerSpec(samples=SAMPLES, batch=8, seed=SPEC.seed, repeats=SPEC.repeats, group=SPEC.mix_group)
            ),
            2,
        )
    )


def test_evaluation_leaves_rows_that_only_fill_up_out() -> None:
    found = works(EvalSampler(SAMPLES, 12, rank=1, world=2), 1)
    check(found)
    assert len(found[-1].samples) < 12


def test_the_example_of_the_docstring() -> None:
    def rows(*samples: int) -> Rows:
        zeros = np.zeros(4, np.int64)
        return Rows(np.array(samples), zeros, zeros, zeros, np.arange(4), np.ones(4, np.bool_))

    sides = np.full(4, 90)
    steps = [(step, draw_eval(SPEC, step, sides, sides)) for step in (rows(7, 5, 7, 7), rows(5, 9, 9, 7))]
    done = [np.zeros(4, np.bool_), np.zeros(4, np.bool_)]
    run = plan_run(steps, done, views=2)
    assert run.samples.tolist() == [5, 7, 7]
    assert run.destination.tolist() == [[1, 0, 3], [4, 2, 7]]
    assert [mask.tolist() for mask in done] == [[True] * 4, [True, False, False, True]]
