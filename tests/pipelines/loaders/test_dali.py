"""What only the dali loader does; the contract that it shares is in test_loaders.py and test_bad_input.py."""

import logging
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment.chain import augment
from pipelines.errors import DeitfastError
from pipelines.loaders import batch_plan, factory
from pipelines.loaders.batch_plan import BatchPlan
from pipelines.loaders.factory import choose, open_loader
from pipelines.loaders.prefetch import QUEUED
from pipelines.rng.sampler import SamplerSpec, TrainSampler
from pipelines.spec import LoaderSpec
from pipelines.storage.reader import Reader
from tests.helpers.loader_contract import BATCH, CPU, PADDED, REASONS, RESIZED, damaged, open_eval, open_train, within
from tests.helpers.stored_images import jpeg, photo, write_split

if REASONS["dali"]:
    pytest.skip(REASONS["dali"], allow_module_level=True)

from pipelines.loaders.dali import graph, setup
from pipelines.loaders.dali.decode_once import UNUSED_CROP, decode_once
from pipelines.loaders.dali.loader import BatchAssembler, DaliLoader, _as_int64

pytestmark = pytest.mark.usefixtures("nothing_leaks")
SPEC = graph.GraphSpec(8, 3, 32, framed=True, threads=1, depth=2, device=CPU, typical=3000)


@pytest.fixture
def cut_short(tmp_path: Path) -> Reader:
    """30 JPEGs with whole headers and right CRC32s, of which sample 20 stops inside its scan."""
    rng = np.random.default_rng(2)
    images: list[tuple[Image.Image, bytes | None]] = [(image, jpeg(image)) for image in (photo(rng, 64, 64),) * 30]
    images[20] = (images[20][0], jpeg(images[20][0])[:-400])
    return write_split(tmp_path / "short.beton", images)


def failing(graph: graph.Graph) -> list[torch.Tensor]:
    raise RuntimeError("Critical error in pipeline:\nError in GPU operator `resize`: launch failure")


def test_an_image_that_only_dali_meets_as_broken_is_named(cut_short: Reader) -> None:
    with pytest.raises(DeitfastError, match=r"sample 20 of .*short.beton cannot be decoded"):
        list(open_eval("dali", cut_short, RESIZED).epoch(0))


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_an_image_that_only_dali_meets_as_broken_is_skipped(cut_short: Reader, prefetch: int) -> None:
    loader = open_eval("dali", cut_short, RESIZED, skip_bad=True, prefetch=prefetch)
    for _ in range(2):
        batches = list(loader.epoch(0))
        assert [batch.skipped for batch in batches] == [0, 1, 0]
        seen = np.concatenate([batch.params.sample[batch.valid.numpy()] for batch in batches])
        assert sorted(seen) == [number for number in range(30) if number != 20]
        assert not batches[1].images[20 - BATCH].any()
        assert batches[1].images[19 - BATCH].any()


def test_what_was_skipped_before_is_not_blamed_again(cut_short: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = open_eval("dali", cut_short, RESIZED, skip_bad=True)
    list(loader.epoch(0))
    monkeypatch.setattr(graph.Graph, "take", failing)
    error = within(20, lambda: list(loader.epoch(0)))
    assert isinstance(error, DeitfastError)
    assert "DALI failed on" in str(error)


def test_dalis_own_trouble_is_told_as_such(small: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = open_train("dali", small, PADDED)
    list(loader.epoch(0))
    monkeypatch.setattr(graph.Graph, "take", failing)
    with pytest.raises(DeitfastError, match=r"DALI failed on .*\n.*launch failure\n.*--loader cpu"):
        list(loader.epoch(0))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Critical error\nCUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"),
        RuntimeError("Critical error\nError in MIXED operator `decoders.image`\nCan't allocate 8 bytes on device 0."),
        MemoryError("CUDA allocation failed"),
    ],
)
def test_running_out_of_memory_names_the_buffer(
    small: Reader, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(graph: graph.Graph) -> list[torch.Tensor]:
        raise error

    loader = open_train("dali", small, PADDED)
    list(loader.epoch(0))
    monkeypatch.setattr(graph.Graph, "take", full)
    with pytest.raises(
        DeitfastError, match=r"out of GPU memory for the images that the dali loader decodes(.|\n)*prefetch"
    ):
        list(loader.epoch(0))


def test_memory_that_torch_caches_is_given_back_before_dali_gives_up(
    photos: Reader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first out-of-memory of a step empties torch's cache and tries again: the batches are the same."""
    loader = open_train("dali", photos, RESIZED)
    undisturbed = [batch.images for batch in loader.epoch(0)]
    take, calls, failed, emptied = graph.Graph.take, [], [], []

    def full_at_times(graph: graph.Graph) -> list[torch.Tensor]:
        calls.append(None)
        if len(calls) in (1, 5):
            failed.append(None)
            raise RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory")
        return take(graph)

    monkeypatch.setattr(graph.Graph, "take", full_at_times)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    with caplog.at_level(logging.INFO):
        batches = [batch.images for batch in loader.epoch(0)] + [batch.images for batch in loader.epoch(0)]
    assert all(map(torch.equal, batches, undisturbed * 2))
    assert len(batches) == 2 * len(undisturbed)
    assert len(emptied) == len(failed) == sum("tried again" in record.message for record in caplog.records) == 2


def test_tensors_in_the_hosts_order_have_no_stream_to_wait_for() -> None:
    assert graph.writing_streams([SimpleNamespace(stream=stream) for stream in (7, None, 7)]) == {7}


def test_ranks_share_the_cores_and_a_gpu_gets_few_threads(photos: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_plan, "usable_cores", lambda: 128)
    loader = open_train("dali", photos, RESIZED, workers=0)
    assert isinstance(loader, DaliLoader)
    on_gpu = replace(loader.plan, device=torch.device("cuda", 0), spec=LoaderSpec(workers=0, hw_decoder_load=0.5))
    assert loader.plan.workers == 128
    assert setup.graph_spec(on_gpu, loader._source).threads == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert loader.plan.workers == 4
    assert setup.graph_spec(on_gpu, loader._source).threads == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert loader.plan.workers == 1


def test_a_header_of_another_size_is_named(tmp_path: Path) -> None:
    image, other = (photo(np.random.default_rng(3), side, side) for side in (40, 64))
    reader = write_split(tmp_path / "sizes.beton", [(image, jpeg(image)), (image, jpeg(other))])
    with pytest.raises(DeitfastError, match=r"sample 1 of (.|\n)*one of 64 x 64"):
        list(open_eval("dali", reader, RESIZED).epoch(0))


def test_an_image_that_is_skipped_is_one_black_pixel_to_dali(tmp_path: Path, small: Reader) -> None:
    loader = open_train("dali", damaged(small, tmp_path, 17), PADDED, skip_bad=True)
    steps = range(loader.steps_per_epoch)
    epochs = [decode_once(lambda step, at=at: loader.plan.draw(at, step), steps, PADDED.repeats) for at in range(2)]
    work = next(work for works in epochs for work in works if 17 in work.samples)
    with ThreadPoolExecutor(1) as pool:
        encoded, geometry, lost = loader._source.fetch(pool, work)
    (line,) = np.flatnonzero(lost)
    assert work.samples[line] == 17
    assert encoded[line] is graph.PIXEL
    assert (geometry[:, line] == UNUSED_CROP).all()
    np.testing.assert_array_equal(geometry[:, ~lost], work.geometry[:, ~lost])


def test_batches_before_a_damaged_one_still_come(tmp_path: Path, small: Reader) -> None:
    batches = open_eval("dali", damaged(small, tmp_path, BATCH), PADDED).epoch(0)
    assert next(batches).valid.all()
    with pytest.raises(DeitfastError, match=f"sample {BATCH} is damaged"):
        next(batches)


def test_two_iterations_at_once_do_not_mix(photos: Reader) -> None:
    loader = open_train("dali", photos, RESIZED)
    alone = [batch.images for batch in loader.epoch(0)]
    for one, other in zip(loader.epoch(0), loader.epoch(0), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.images, alone.pop(0))


@pytest.mark.parametrize("batch", [4, 8])
def test_steps_whose_crops_were_all_cut_before_run_nothing(photos: Reader, batch: int) -> None:
    """A group of 4 images fills such a step, and its other views the next: one run serves all three."""
    loaders = []
    for name in ("dali", "reference"):
        sampler = TrainSampler(
            SamplerSpec(
                samples=photos.num_samples,
                batch=batch,
                seed=RESIZED.seed,
                repeats=RESIZED.repeats,
                group=RESIZED.mix_group,
            )
        )
        loaders.append(open_loader(photos, RESIZED, LoaderSpec(name=name), sampler, train=True, device=CPU))
    for one, other in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        np.testing.assert_array_equal(one.params.table, other.params.table)
        assert (one.images.int() - other.images.int()).abs().float().mean() < 0.3


def test_a_graph_serves_one_epoch_after_the_other(photos: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    define = graph.define
    monkeypatch.setattr(graph, "define", lambda spec: built.append(spec) or define(spec))
    loader = open_train("dali", photos, RESIZED)
    for epoch in range(3):
        list(loader.epoch(epoch))
    assert len(built) == 1


def test_dali_hears_of_the_readers_of_its_memory_before_it_has_it_back(
    photos: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA it would otherwise write into crops that are still to be read."""
    take, release = graph.Graph.take, graph.Graph.release
    lent: list[weakref.ref[torch.Tensor]] = []
    heard = []

    def taking(graph: graph.Graph) -> list[torch.Tensor]:
        assert not any(crop() is not None for crop in lent)
        crops = take(graph)
        lent[:] = map(weakref.ref, crops)
        return crops

    def releasing(graph: graph.Graph) -> None:
        heard.append(all(crop() is not None for crop in lent))
        release(graph)

    loader = open_train("dali", photos, RESIZED)
    list(loader.epoch(0))  # the graph is built
    monkeypatch.setattr(graph.Graph, "take", taking)
    monkeypatch.setattr(graph.Graph, "release", releasing)
    list(loader.epoch(0))
    assert heard
    assert all(heard)


def test_jpegs_that_no_hardware_decoder_takes_are_counted(photos: Reader, caplog: pytest.LogCaptureFixture) -> None:
    loader = open_eval("dali", photos, RESIZED)
    with caplog.at_level(logging.INFO):
        list(loader.epoch(0))
        list(loader.epoch(0))
    told = [record.getMessage() for record in caplog.records if "progressive" in record.message]
    assert len(told) == 1
    assert "6 of 27 JPEGs" in told[0]


def test_the_graph_for_a_gpu_is_one_that_dali_accepts() -> None:
    """Only its definition: arguments, backends and devices; building it takes a GPU."""
    for framed in (False, True):
        defined = graph.define(replace(SPEC, framed=framed, device=torch.device("cuda")))
        text = defined.serialize()
        assert text.count(b"mixed") == 1
        assert (text.count(b"Slice") > 0) == framed
        assert b"hw_decoder_load" in text


def test_memory_is_bounded_by_what_a_run_can_hold(photos: Reader) -> None:
    loader = open_train("dali", photos, RESIZED)
    assert isinstance(loader, DaliLoader)
    list(loader.epoch(0))
    plan = loader.plan
    spec = setup.graph_spec(plan, loader._source)
    assert spec.images == BATCH // RESIZED.repeats  # groups of 4 images x 3 views: a step of 12 holds 4
    sizes = sorted(plan.reader.heights.astype(int) * plan.reader.widths * 3)
    bound = setup.memory(plan, spec, largest=True)
    assert bound["decoded images"] == spec.depth * sum(sizes[-4:])
    assert setup.memory(plan, spec, largest=False)["decoded images"] < bound["decoded images"]
    assert bound["crops"] == 3 * 12 * 32 * 32 * 3
    assert bound["batches"] == 4 * 12 * 32 * 32 * 3
    assert bound["augmented"] == 2 * 12 * 32 * 32 * 3 * 4  # float32
    on_gpu = setup.memory(plan, replace(spec, device=torch.device("cuda", 0)), largest=True)
    assert on_gpu["augmented"] == (1 + QUEUED) * 12 * 32 * 32 * 3 * 2


def test_the_rate_of_a_graph_can_be_measured(photos: Reader) -> None:
    loader = open_train("dali", photos, RESIZED)
    assert isinstance(loader, DaliLoader)
    spec = setup.graph_spec(loader.plan, loader._source)
    assert setup.rate(loader.plan, loader._source, spec, 0.5) > 0


def test_planes_that_a_gpu_gets_are_the_same_crops_mirrored(photos: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = open_train("dali", photos, RESIZED)
    with closing(loader):
        plain = list(loader.epoch(0))
        monkeypatch.setattr("pipelines.loaders.dali.loader.BatchAssembler.__init__", planar_assembler)
        placed = list(loader.epoch(0))
    for one, other in zip(plain, placed, strict=True):
        assert (one.flipped, other.flipped) == (False, True)
        assert other.images.permute(0, 3, 1, 2).is_contiguous()
        assert torch.equal(one.images, other.crops())
        ours, theirs = (augment(batch, RESIZED, dtype=torch.float32, train=True).pixels for batch in (one, other))
        assert torch.equal(ours, theirs)


def planar_assembler(self: BatchAssembler, plan: BatchPlan) -> None:
    """Assembles on the CPU as on a GPU."""
    self._plan, self._partial, self.planar = plan, deque(), True


def test_placing_asks_the_device_nothing(photos: Reader) -> None:
    """On the meta device there are no values: whatever would wait for one fails."""
    loader = open_train("dali", photos, RESIZED)
    plan = replace(loader.plan, device=torch.device("meta"))
    (work, *_) = decode_once(lambda step: plan.draw(0, step), range(loader.steps_per_epoch), RESIZED.repeats)
    shape = (len(work.samples), RESIZED.size, RESIZED.size, 3)
    crops = [torch.empty(shape, dtype=torch.uint8, device="meta") for _ in range(RESIZED.repeats)]
    images, skipped = BatchAssembler(plan).place(work, np.zeros(len(work.samples), np.bool_), crops)
    assert images.shape == (BATCH, *shape[1:])
    assert skipped == []


@pytest.mark.parametrize("side", [3, 6, 8])
def test_crops_of_any_side_are_moved_whole(side: int) -> None:
    crops = torch.arange(5 * side * side * 3, dtype=torch.int32).to(torch.uint8).view(5, side, side, 3)
    batch = torch.zeros_like(crops)
    _as_int64(batch).index_copy_(0, torch.tensor([4, 1]), _as_int64(crops).index_select(0, torch.tensor([0, 3])))
    assert torch.equal(batch, torch.stack([batch[0] * 0, crops[3], batch[0] * 0, batch[0] * 0, crops[0]]))


def test_auto_is_dali_on_cuda_where_it_is_installed(photos: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(photos, torch.device("cuda")) == "dali"
    assert choose(photos, CPU) != "dali"
    monkeypatch.setitem(factory.NEEDS, "dali", ("no_such_package", ""))
    assert choose(photos, torch.device("cuda")) != "dali"
