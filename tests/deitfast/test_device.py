"""The probe at the start: a GPU that is there and cannot be used is named, with what it would need."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from deitfast.config.recipe import TrainSpec
from deitfast.runtime import choose_amp, choose_compile, choose_device, device, start
from pipelines.errors import UserError
from pipelines.loaders.streams import side_stream
from tests.helpers.command_line import call

VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15 \nGCC version: 12.2.0\n"


@pytest.fixture
def old_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose driver is too old: PyTorch says that there is none."""
    (tmp_path / "version").write_text(VERSION)
    monkeypatch.setattr(device, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_driver_that_is_too_old_stops_the_run(old_driver: None, name: str) -> None:
    with pytest.raises(UserError, match=r"(?s)driver from 580 on.*found: driver 570\.86\.15.*--device cpu"):
        choose_device(name, 0)


def test_the_cpu_is_taken_where_it_is_asked_for(old_driver: None) -> None:
    assert choose_device("cpu", 0).type == "cpu"


@pytest.mark.parametrize("value", ["", "-1"])
def test_a_gpu_that_is_hidden_on_purpose_stops_nothing(old_driver: None, monkeypatch, value: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert choose_device("auto", 0).type == "cpu"


def test_a_machine_without_a_gpu_trains_on_its_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DRIVER_FILE", tmp_path / "none")
    monkeypatch.setattr(device, "DEVICE_FILE", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0).type == "cpu"
    with pytest.raises(UserError, match="sees no CUDA device"):
        choose_device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 0), False), ((7, 5), True), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 1), True)],
)
def test_a_gpu_that_pytorch_has_no_kernels_for_is_named(monkeypatch, capability: tuple[int, int], runs: bool) -> None:
    built = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    if runs:
        device.require_kernels_for(torch.device("cuda", 0))
    else:
        with pytest.raises(UserError, match=r"(?s)no kernels for Tesla V100.*sm_75.*found: sm_70"):
            device.require_kernels_for(torch.device("cuda", 0))


def test_every_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(device, "require_kernels_for", lambda chosen: None)
    for name, rank, index in (("auto", 3, 3), ("cuda", 2, 2), ("cuda:1", 3, 1)):
        assert choose_device(name, rank) == torch.device("cuda", index)
    with pytest.raises(UserError, match="there is no cuda:4"):
        choose_device("auto", 4)


@pytest.mark.parametrize(("instructions", "amp"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_trains_in_the_half_precision_that_it_has(monkeypatch, instructions: bool, amp: torch.dtype) -> None:
    def supported(including_emulation: bool = True) -> bool:  # a V100 emulates bf16, at a fraction of fp16's rate
        return instructions or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    gpu = torch.device("cuda", 0)
    assert [choose_amp(name, gpu) for name in ("auto", "bf16", "off")] == [amp, torch.bfloat16, None]


@pytest.mark.parametrize("named", ["bf16", "fp16"])
def test_half_precision_without_its_instructions_is_told(monkeypatch, caplog, named: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with start(TrainSpec(amp=named), "cpu"):
        assert "this CPU computes it slower than float32" in caplog.text
    caplog.clear()
    with start(TrainSpec(amp="auto"), "cpu") as runtime:
        assert (runtime.amp, caplog.text) == (None, "")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_fp16": True})
    with start(TrainSpec(amp=named), "cpu"):
        assert caplog.text == ""


def test_ptx_runs_on_later_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device._runs("compute_90", 12, 0)
    assert not device._runs("sm_90a", 12, 0)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(device, "kernels_missing", lambda device: "no C compiler: install gcc")
    assert not choose_compile("auto", torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"(?s)train\.compile is on.*install gcc"):
        choose_compile("on", torch.device("cuda", 0))
    assert choose_compile("on", torch.device("cpu"))


def test_doctor_says_so_too(old_driver: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = call(capsys, "doctor")
    assert code == 0
    assert "a GPU that PyTorch cannot use: needs a driver from 580 on" in re.sub(r"[│\s]+", " ", shown)


def test_a_run_works_on_a_stream_that_goes_before_the_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, made = [], []

    class Stream:
        def __init__(self, device: torch.device, priority: int = 0) -> None:
            made.append((device, priority))

    @contextmanager
    def entering(stream: Stream) -> Iterator[None]:
        entered.append(stream)
        yield
        entered.pop()

    gpu = torch.device("cuda", 0)
    for name in ("choose_device", "choose_amp", "choose_compile"):
        monkeypatch.setattr(f"deitfast.runtime.process.{name}", lambda *arguments: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entering)
    with start(TrainSpec(), "cuda"):
        assert made == [(gpu, -1)]
        assert len(entered) == 1
        assert isinstance(side_stream.__wrapped__(torch.device("cuda", 1)), Stream)  # not what is cached
    assert made[1:] == [(torch.device("cuda", 1), 0)]
    assert not entered
