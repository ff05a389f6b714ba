"""What a batch costs, counted and not timed: decodings and their pixels, CRC32s, buffers, batches made ahead."""

import zlib
from contextlib import closing
from dataclasses import replace
from threading import Condition
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.batch import Batch
from pipelines.loaders.batch_plan import BatchPlan
from pipelines.loaders.codecs import turbo
from pipelines.loaders.codecs.pillow import PillowCodec
from pipelines.storage.reader import RAW, Reader
from tests.helpers.loader_contract import PADDED, RESIZED, open_train

SPEC = replace(RESIZED, repeats=3, mix_group=4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """What was done, in lists: decoded (h, w), checked (bytes), buffers (rows), rendered (image tables)."""
    done: dict[str, list] = {"decoded": [], "checked": [], "buffers": [], "rendered": []}
    decode, allocate, render = PillowCodec.decode, BatchPlan.allocate, turbo.TurboCodec.render

    def counted_decode(self, data, top, left, height, width):
        done["decoded"].append(height * width)
        return decode(self, data, top, left, height, width)

    def counted_allocate(self, rows, **options):
        done["buffers"].append(rows)
        return allocate(self, rows, **options)

    def counted_render(self, images, crops, out, *, check):
        done["rendered"].append((images.copy(), check))
        return render(self, images, crops, out, check=check)

    def crc32(data, *start):
        done["checked"].append(len(data))
        return zlib.crc32(data, *start)

    monkeypatch.setattr(PillowCodec, "decode", counted_decode)
    monkeypatch.setattr(BatchPlan, "allocate", counted_allocate)
    monkeypatch.setattr(turbo.TurboCodec, "render", counted_render)
    monkeypatch.setattr("pipelines.storage.reader.zlib", SimpleNamespace(crc32=crc32))
    return done


def windows(batch: Batch) -> dict[int, int]:
    """Pixels of the smallest window of each image that holds all of its views in a batch."""
    found: dict[int, list[np.ndarray]] = {}
    for sample, box in zip(batch.params.sample.tolist(), batch.params.crop_box, strict=True):
        found.setdefault(sample, []).append(box)
    edges = {sample: np.array(boxes) for sample, boxes in found.items()}
    ends = {sample: (boxes[:, :2] + boxes[:, 2:]).max(0) - boxes[:, :2].min(0) for sample, boxes in edges.items()}
    return {sample: int(end.prod()) for sample, end in ends.items()}


def test_of_an_images_views_one_window_is_read_checked_and_decoded_once(photos: Reader, counted) -> None:
    with closing(open_train("reference", photos, SPEC)) as loader:
        batches = list(loader.epoch(0))
    wanted = [windows(batch) for batch in batches]
    assert sum(map(len, wanted)) < sum(len(batch.labels) for batch in batches), "no image has two views in a batch"
    jpegs = [{sample: area for sample, area in each.items() if photos.modes[sample] != RAW} for each in wanted]
    assert sorted(counted["decoded"]) == sorted(area for each in jpegs for area in each.values())
    assert len(counted["checked"]) == sum(map(len, wanted))
    assert sum(counted["checked"]) == sum(int(photos.sizes[sample]) for each in wanted for sample in each)
    assert len(counted["buffers"]) == len(batches)


@pytest.mark.skipif(bool(turbo.unavailable()), reason="no compiler")
def test_the_compiled_codec_is_given_every_image_once_with_its_window(photos: Reader, counted) -> None:
    with closing(open_train("cpu", photos, SPEC)) as loader:
        batches = list(loader.epoch(0))
    wanted = [area for batch in batches for area in windows(batch).values()]
    images = np.concatenate([each for each, _ in counted["rendered"]])
    assert sorted((images[:, 9] * images[:, 10]).tolist()) == sorted(wanted)
    assert all(check for _, check in counted["rendered"])
    assert not counted["checked"], "checked in compiled code, and again in Python"
    assert len(counted["buffers"]) == len(batches)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_next_batches_are_made_while_one_is_in_use(photos: Reader, name: str, monkeypatch) -> None:
    """Without anybody asking for them."""
    made, more = [], Condition()
    batch = BatchPlan.batch

    def watched(self, *arguments, **options):
        with more:
            made.append(None)
            more.notify_all()
        return batch(self, *arguments, **options)

    monkeypatch.setattr(BatchPlan, "batch", watched)
    with closing(open_train(name, photos, PADDED, prefetch=3)) as loader, closing(loader.epoch(0)) as batches:
        next(batches)
        with more:
            ahead = min(4, loader.steps_per_epoch)
            assert more.wait_for(lambda: len(made) >= ahead > 1, timeout=60)
