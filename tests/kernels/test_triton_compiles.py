"""Every Triton kernel compiles to a GPU's machine code; ahead of time, so no GPU is needed."""

import importlib.util
import os
import subprocess
import sys

import pytest

SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mep_lightning.kernels.attention_tangents import triton as tangents
from mep_lightning.kernels.int8_conv2d import triton as conv
from mep_lightning.kernels.int8_linear import triton as linear
from mep_lightning.kernels.perturbed_lora_linear import triton as lora
from mep_lightning.kernels.philox import triton as philox
from mep_lightning.kernels.quantize_rows import triton as rows
from mep_lightning.kernels.subspace_project import triton as subspace
from mep_lightning.kernels.zo_step import triton as zo_step

FP32 = "a b h amounts scale bias row_scale weights exp_avg exp_avg_sq pace basis grad".split()
FP32 = dict.fromkeys(FP32, "*fp32")
FLOATS = dict.fromkeys(["gain1", "gain2", "eps", "weight_decay", "scaling"], "fp32")
TILE = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP=8, WIDE=False, HAS_BIAS=True)
TAPS = dict(KH=3, KW=3, STRIDE_H=1, STRIDE_W=2, PAD_H=1, PAD_W=0)
CASES = [
    (philox._normal_kernel, {"out": "*fp32", "seed": "i64", "numel": "i64"}, {"BLOCKS": 256}),
    (philox._normal_kernel, {"out": "*fp32"}, {"BLOCKS": 256}),
    (subspace._project_kernel, {"grad": "*bf16"}, {"D": 1024, "ROWS": 8}),
    (zo_step._zo_step_kernel, {"theta": "*fp32", "step": "*i64"}, dict(PROJECT=True, KEEP=True, D=1024, ROWS=8)),
    (zo_step._zo_step_kernel, {"theta": "*bf16", "step": "*i64"}, dict(PROJECT=False, KEEP=False, D=2048, ROWS=4)),
]
RANK = {"RANK": 16}
LORA = {"directions": "*i64", "seed": "i64"}
for dtype in ("fp32", "bf16", "fp16"):
    CASES += [
        (lora._down_kernel, LORA | {"x": f"*{dtype}"}, RANK | dict(ROWS=64, DEPTH=64, ALIGNED=True)),
        (lora._up_kernel.fn, LORA | {"x": f"*{dtype}", "q": "*i8", "y": f"*{dtype}"}, TILE | RANK | {"ALIGNED": False}),
        (
            tangents._attention_tangents_kernel,
            {"q": f"*{dtype}", "k": f"*{dtype}", "v": f"*{dtype}", "out": f"*{dtype}", "root": "fp32"},
            dict(WIDTH=128, BLOCK_S=32, BLOCK_T=32, WIDE=False),
        ),
        (rows._quantize_rows_kernel, {"x": f"*{dtype}", "q": "*i8"}, {"BLOCK": 1024}),
        (linear._linear_kernel.fn, {"x": f"*{dtype}", "q": "*i8", "y": f"*{dtype}"}, TILE),
        (linear._linear_kernel.fn, {"x": "*i8", "q": "*i8", "y": f"*{dtype}"}, TILE),
        (conv._conv_kernel.fn, {"x": f"*{dtype}", "q": "*i8", "y": f"*{dtype}"}, TILE | TAPS),
    ]
for capability in (80, 90):
    for kernel, types, constants in CASES:
        known = FP32 | FLOATS | types | dict.fromkeys(constants, "constexpr")
        signature = {name: known.get(name, "i32") for name in kernel.arg_names}
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", capability, 32)
        )
        assert len(compiled.asm["cubin"]) > 0
print("compiled", len(CASES))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_compiles(tmp_path):
    script = tmp_path / "compile_all.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "compiled 26", done.stderr[-2000:]
