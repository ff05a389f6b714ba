"""What a cache stores of a teacher's logits gives back its label, or its distribution."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from deitfast.distill.cache_files import is_present
from deitfast.distill.cache_manifest import TargetSpec
from deitfast.distill.encoding import decode, encode, from_records, to_records


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("k", "tau", "at"), [(10, 3.0, 3.0), (10, 3.0, 1.0), (10, 1.0, 3.0), (3, 2.0, 5.0), (1, 3.0, 3.0)]
)
def test_kept_logits_give_back_the_distribution(dtype: str, k: int, tau: int, at: int) -> None:
    """The kept classes' and the rest's probability are exact at the cache's tau and at 1; the rest shares evenly."""
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)) * 3
    spec = TargetSpec("soft", k, dtype, tau)
    targets = encode(logits, spec)
    records = to_records([targets], spec)
    restored = decode(from_records(records, torch.device("cpu")), spec, 100, at)
    true, found = F.softmax(logits.double() / at, -1), F.softmax(restored.double() / at, -1)
    kept = torch.zeros_like(true, dtype=torch.bool).scatter(1, targets.label, True)
    if at in (1.0, tau):
        assert torch.allclose(true[kept], found[kept], atol=8e-3 if dtype == "float16" else 1e-5)
    rest = found[~kept].view(64, -1)
    assert torch.allclose(rest, rest[:, :1].expand_as(rest), rtol=1e-4)
    even = F.kl_div(found.log(), true, reduction="batchmean")
    cut = F.kl_div((torch.where(kept, true, 0) / torch.where(kept, true, 0).sum(-1, keepdim=True)).clamp(1e-9).log(),
                   true, reduction="batchmean")  # fmt: skip
    assert even < cut  # knowing the rest's share beats dropping it


def test_all_logits_kept_in_float32_are_the_teachers_own() -> None:
    logits = torch.randn(16, 10) * 5
    spec = TargetSpec("soft", 10, "float32", 3.0)
    restored = from_records(to_records([encode(logits, spec)], spec), torch.device("cpu"))
    assert torch.equal(decode(restored, spec, 10, 1.7), logits)


def test_hard_answers_are_the_argmax() -> None:
    logits = torch.randn(16, 1000)
    spec = TargetSpec("hard")
    restored = from_records(to_records([encode(logits, spec)], spec), torch.device("cpu"))
    assert torch.equal(decode(restored, spec, 1000, 3.0), logits.argmax(-1))


def test_cached_answers_are_present_only_where_they_were_given() -> None:
    assert is_present(np.array([0, 65535, 65534], "<u2")).tolist() == [True, False, True]
