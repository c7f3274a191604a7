"""Compile the row kernel for an H100, which needs no GPU; a process of its own, since it must not be the interpreter's.

    python -m tests.losses.compile_triton_kernels

For a row in one block and a longer one: are the logits read and the gradient written 128 bits at a time?
"""

import os
import re

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget

from hf_dkd.losses import triton_kernels


def compiled(dtype: str, per_lane: int, C: int) -> str:
    """The kernel's PTX."""
    lanes, warps = triton_kernels._lanes_and_warps(C, per_lane)
    rows = ("student", "teacher", "gradient")
    types = dict.fromkeys(rows, f"*{dtype}")
    types |= {"labels": "*i64", "terms": "*fp32", "flags": "*u8", "scale": "*fp32"}
    types |= dict.fromkeys(["N", "student_stride", "teacher_stride", "gradient_stride", "ignore_index"], "i32")
    types |= dict.fromkeys(["alpha", "beta", "T", "ce_weight"], "fp32")
    flags = {"CLASSICAL": False, "WITH_CE": True, "T_IS_1": False, "SCALE_ON_DEVICE": True}
    constants = {"C": C, "LANES": lanes, "PER_LANE": per_lane, "ALIGNED": 8, **flags}
    kernel = triton_kernels._row_kernel
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in rows},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def main() -> None:
    for dtype, per_lane, C in (("fp32", 4, 1000), ("bf16", 8, 32_000)):
        ptx = compiled(dtype, per_lane, C)
        wide = (re.search(rf"{way}[.:\w]*\.v4\.b32", ptx) for way in (r"ld\.global", r"st\.global"))
        print("128 bits at a time:", all(wide))


if __name__ == "__main__":
    main()
