"""The numbers that members must agree on are the same bytes under every instruction set and on CUDA."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from strategies.registry import CODECS, decode_payload

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# In the order in which CPUs acquired them; "default" runs everywhere.
CAPABILITIES = ["default", "avx2", "avx512"]


@cache
def run_golden(
    capability: str, device: str = "cpu", backend: str = "torch", cpu_name: str | None = None
) -> dict[str, Any]:
    environment = {
        **os.environ,
        **({"NUMBA_CPU_NAME": cpu_name, "NUMBA_CPU_FEATURES": ""} if cpu_name else {}),
        "ATEN_CPU_CAPABILITY": capability,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "golden_bits.py"), "--device", device, "--backend", backend],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50 if backend == "torch" else 200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def require(capability: str) -> None:
    """Skip if this CPU lacks the capability: forcing it would end the process with an illegal instruction."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    available = CAPABILITIES[: CAPABILITIES.index(best) + 1] if best in CAPABILITIES else CAPABILITIES[:1]
    if capability not in available:
        pytest.skip(f"this machine's best capability is {best}: {capability} cannot be checked here")


def golden() -> dict[str, str]:
    return dict(json.loads((HERE / "strategies.json").read_text(encoding="utf-8")))


def golden_payloads() -> dict[str, dict[str, str]]:
    return dict(json.loads((HERE / "payloads.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_same_bits_under_every_cpu_capability(capability: str) -> None:
    require(capability)
    result = run_golden(capability)
    assert result["capability"].lower() == capability, "the capability was not used, so nothing was checked"
    assert result["digests"] == golden()
    assert result["payloads"] == golden_payloads()


@pytest.mark.slow  # where numba's cache is empty, all kernels are compiled, for each kind of processor
@pytest.mark.timeout(240)
@pytest.mark.parametrize("cpu_name", [None, "x86-64"], ids=["this-cpu", "any-x86-64"])
def test_the_compiled_form_has_the_same_bits(cpu_name: str | None) -> None:
    if cpu_name and platform.machine() != "x86_64":
        pytest.skip(f"the kernels cannot be compiled for {cpu_name} on {platform.machine()}")
    result = run_golden("default", backend="numba", cpu_name=cpu_name)
    assert result["digests"] == golden()
    assert result["payloads"] == golden_payloads()


def test_every_codec_has_golden_bytes() -> None:
    assert set(golden_payloads()) == {"input", *CODECS}
    encoded = {name.rpartition("-")[0].partition("/")[2] for name in golden() if name.startswith("encode/")}
    assert encoded == set(CODECS)


def test_golden_bytes_name_the_decoder_that_reads_them() -> None:
    payloads = golden_payloads()
    num = len(payloads.pop("input")["values"]) // 8
    for name, stored in payloads.items():
        payload = torch.frombuffer(bytearray.fromhex(stored["payload"]), dtype=torch.uint8)
        decoded = decode_payload(payload, num_values=num)
        assert decoded.view(torch.uint8).numpy().tobytes().hex() == stored["decoded"], name


def test_the_input_tells_one_rounding_from_two() -> None:
    require("avx2")
    assert run_golden("default")["control"] != run_golden("avx2")["control"], (
        "`alpha=` gives the same bits with and without AVX2 here, so the test above could not see a fused operation"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_same_bits_on_cuda(backend: str) -> None:
    assert run_golden("default", "cuda", backend)["digests"] == golden()
