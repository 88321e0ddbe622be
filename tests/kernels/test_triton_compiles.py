"""Every Triton kernel compiles to a GPU's machine code; ahead of time, so no GPU is needed."""

import importlib.util
import os
import subprocess
import sys

import pytest

SCRIPT = """
import inspect
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mep_lightning.kernels.attention_tangents import triton as tangents
from mep_lightning.kernels.dequantize import triton as dequantizing
from mep_lightning.kernels.geglu import triton as geglu
from mep_lightning.kernels.int8_conv2d import triton as conv
from mep_lightning.kernels.int8_linear import triton as linear
from mep_lightning.kernels.norm_tangents import triton as norms
from mep_lightning.kernels.perturbed_lora_linear import triton as lora
from mep_lightning.kernels.philox import triton as philox
from mep_lightning.kernels.pointwise_tangents import triton as pointwise
from mep_lightning.kernels.quantize_rows import triton as rows
from mep_lightning.kernels.subspace_project import triton as subspace
from mep_lightning.kernels.zo_step import triton as zo_step

FP32 = "a b h amounts scale bias row_scale weights exp_avg exp_avg_sq pace basis grad sums".split()
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
SCALED = {"HAS_WEIGHT": True, "HAS_BIAS": True}
def NORM(dtype):
    return dict.fromkeys(["x", "out", "weight", "bias"], f"*{dtype}")
for dtype in ("fp32", "bf16", "fp16"):
    CASES += [
        (lora._down_kernel, LORA | {"x": f"*{dtype}"}, RANK | dict(ROWS=64, DEPTH=64, ALIGNED=True)),
        (lora._up_kernel.fn, LORA | {"x": f"*{dtype}", "q": "*i8", "y": f"*{dtype}"}, TILE | RANK | {"ALIGNED": False}),
        (rows._quantize_rows_kernel, {"x": f"*{dtype}", "q": "*i8"}, {"BLOCK": 1024}),
        (linear._linear_kernel.fn, {"x": f"*{dtype}", "q": "*i8", "y": f"*{dtype}"}, TILE),
        (linear._linear_kernel.fn, {"x": "*i8", "q": "*i8", "y": f"*{dtype}"}, TILE),
        (dequantizing._dequantize_kernel, {"q": "*i8", "w": f"*{dtype}"}, dict(ROWS=4, BLOCK=1024)),
        (geglu._geglu_kernel, dict.fromkeys("xy", f"*{dtype}"), {"BLOCK": 1024}),
        (norms._sums_kernel, {"x": f"*{dtype}"}, dict(BLOCK=256, WIDTH=16, CARRIES=True)),
        (norms._sums_kernel, {"x": f"*{dtype}"}, dict(BLOCK=256, WIDTH=16, CARRIES=False)),
        (norms._group_kernel, NORM(dtype), dict(BLOCK=256, WIDTH=16, CHUNKS=16, CARRIES=True) | SCALED),
        (norms._group_kernel, NORM(dtype), dict(BLOCK=256, WIDTH=16, CHUNKS=16, CARRIES=False) | SCALED),
        (norms._layer_kernel, NORM(dtype), {"BLOCK": 2048} | SCALED),
        (pointwise._activation_kernel, dict.fromkeys("xy", f"*{dtype}"), {"GELU": True, "BLOCK": 1024}),
        (pointwise._activation_kernel, dict.fromkeys("xy", f"*{dtype}"), {"GELU": False, "BLOCK": 1024}),
        (pointwise._product_kernel, dict.fromkeys("xyz", f"*{dtype}"), {"BLOCK": 1024}),
        (conv._conv_kernel.fn, {"x": f"*{dtype}", "q": "*i8", "y": f"*{dtype}"}, TILE | TAPS),
    ]
ONES = dict(width=1, pixels=1, BLOCK=1, WIDTH=1, CHUNKS=1, CARRIES=True)  # arguments that are 1 become constants
CASES.append((norms._group_kernel, NORM("fp32"), ONES | SCALED))
SHARED = 101376  # of a consumer's GPU
FITTING = [  # the last of each are the arguments that are multiples of 16
    (
        lora._down_kernel,
        LORA | {"x": "*fp16"},
        dict(ROWS=lora.ROWS, RANK=128, DEPTH=lora.DEPTH, ALIGNED=True),
        lora.stages(128),
        4,
        ("x", "a", "h", "directions", "amounts", "K", "R"),
    )
]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    types = {name: f"*{short}" for name in ("q", "k", "v", "out")} | {"root": "fp32"}
    for width in tangents.TILES:
        block_s, block_t, stages, warps = tangents.tile(width, dtype)
        constants = dict(WIDTH=width, BLOCK_S=block_s, BLOCK_T=block_t, WIDE=False)
        kernel = tangents._attention_tangents_kernel
        FITTING.append((kernel, types, constants, stages, warps, kernel.arg_names[:-4]))
for kernel, types, constants, stages, warps, aligned in FITTING:
    known = FP32 | types | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature={name: known.get(name, "i32") for name in kernel.arg_names},
            constexprs=constants,
            attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", 86, 32),
        options=dict(num_stages=stages, num_warps=warps),
    )
    assert compiled.metadata.shared <= SHARED, (kernel, constants, compiled.metadata.shared)
for capability in (80, 90):
    for kernel, types, constants in CASES:
        if capability == 90 and "tl.dot(" not in inspect.getsource(kernel.fn):  # little else differs between the two
            continue
        known = FP32 | FLOATS | types | dict.fromkeys(constants, "constexpr")
        signature = {name: known.get(name, "i32") for name in kernel.arg_names}
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", capability, 32)
        )
        assert len(compiled.asm["cubin"]) > 0
assert 0 < len(lora._up_kernel.configs) < len(linear._linear_kernel.configs)  # large tiles take minutes to compile
print("compiled", len(CASES) + len(FITTING))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_compiles(tmp_path):
    script = tmp_path / "compile_all.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "compiled 70", done.stderr[-2000:]
