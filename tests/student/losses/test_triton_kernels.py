"""The Triton kernels of the losses: in Triton's interpreter, through its compiler, and on a GPU where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

CASES_FILE = Path(__file__).with_name("triton_cases.py")
NAMES = (
    "blocks filled", "nothing filled", "several blocks", "int8", "int8, several blocks", "float32",
    "bfloat16 targets", "bfloat16 predictions", "not contiguous",
)  # fmt: skip
LIMITS = {"bfloat16 predictions": 2**-8}
"""What the gradient is rounded to; else 1e-5."""


@pytest.fixture(scope="module")
def interpreted():
    """Deviations from the eager kernels, by case."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(CASES_FILE)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_the_interpreter_agrees_with_eager(interpreted, name):
    assert interpreted.keys() == set(NAMES)
    assert interpreted[name] <= LIMITS.get(name, 1e-5)
    assert interpreted[name] > 0, "the control: it is another computation"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_agrees_with_eager(name):
    import importlib.util

    spec = importlib.util.spec_from_file_location("triton_cases", CASES_FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_cases"] = module
    spec.loader.exec_module(module)
    assert module.CASES[name].deviation("cuda") <= LIMITS.get(name, 1e-5)


@pytest.mark.parametrize(("values", "rows", "capability"), [("fp16", 16, 80), ("i8", 32, 90)])
def test_they_compile_for_gpus(values, rows, capability):
    """To machine code, which needs no GPU, within the shared memory that a block has without asking for more."""
    from olavlm.student.losses import triton_kernels

    floats = ("smooth_l1", "dots", "p_square", "t_square", "along_error", "along_targets", "along_itself")
    types = dict.fromkeys(floats, "*fp32") | {
        "prediction": "*fp32", "gradient": "*fp32", "values": f"*{values}",
        "scales": "*fp32" if values == "i8" else f"*{values}", "labels": "*i64", "valid_rows": "*i1",
        "valid_targets": "*i1", "b": "i32", "m": "i32", "features": "i32", "dim": "i32", "part_steps": "i32",
    }  # fmt: skip
    constants = {
        "HAS_SCALES": values == "i8",
        "ROWS": rows,
        "TARGETS": triton_kernels.BLOCK_TARGETS,
        "FEATURES": triton_kernels.BLOCK_FEATURES,
    }
    for kernel in (triton_kernels.forward_kernel, triton_kernels.backward_kernel):
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options={"num_warps": triton_kernels.WARPS})
        assert made.asm["cubin"]
        assert made.metadata.shared <= 48 * 1024
