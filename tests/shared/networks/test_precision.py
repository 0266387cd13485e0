from pathlib import Path

import pytest
import torch
from torch import nn

from shared.errors import ConfigurationError
from shared.networks import precision
from shared.networks.precision import autocast, has_bfloat16, resolve_device

CPU = torch.device("cpu")
CONVOLUTION = nn.Sequential(nn.Conv2d(1, 1, 1))
LINEAR = nn.Sequential(nn.Linear(1, 1))


def product_dtype(context: torch.autocast) -> torch.dtype:
    with context:
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize(
    ("wanted", "network", "has_instructions", "expected"),
    [
        ("auto", CONVOLUTION, True, torch.bfloat16),
        ("auto", CONVOLUTION, False, torch.float32),
        ("auto", LINEAR, True, torch.float32),
        ("bfloat16", LINEAR, False, torch.bfloat16),
        ("float32", CONVOLUTION, True, torch.float32),
    ],
)
def test_auto_is_bfloat16_for_convolutions_where_the_hardware_has_it(
    wanted: precision.Precision,
    network: nn.Module,
    has_instructions: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: has_instructions)
    context = autocast(wanted, CPU, network)
    assert product_dtype(context) == expected
    assert product_dtype(context) == expected  # it can be entered again


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("model name\t: bf16 machine\nflags\t\t: fpu avx512f not_bf16\n", False),
        (None, False),
    ],
)
def test_a_cpus_instructions_are_read_from_its_flags(
    text: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(precision, "_CPU_INFO", path)
    precision._cpu_has_bfloat16.cache_clear()
    try:
        assert has_bfloat16(CPU) is expected
    finally:
        precision._cpu_has_bfloat16.cache_clear()


def test_a_device_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("cpu") == resolve_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "cpu:1", "mps", ""])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="is none of auto, cpu, cuda, cuda:N"):
        resolve_device(name)


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_device_that_is_not_there_is_refused(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigurationError, match=f"device {name}: there are {count} CUDA devices"):
        resolve_device(name)
