"""Compile every kernel of `s2t2_dist/ot/kernels` for a Hopper GPU, without one.

`python tests/ot/compile_kernels.py` prints a line for each: registers per thread, bytes spilled,
float32 multiply-adds. Not under TRITON_INTERPRET.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s2t2_dist.ot.kernels import common, dual, dykstra, passes, plan

HOPPER = GPUTarget("cuda", 90, 32)
DOUBLES = {"mu", "nu", "row_count", "sums", "count"}
INTEGERS = {"moving", "flags"}
SIZES = {"V", "U", "h", "first"}
ALIGNED = [["tt.divisibility", 16]]


def type_of(name: str) -> str:
    if name in SIZES:
        return "i32"
    if name == "mass":
        return "fp32"
    return "*fp64" if name in DOUBLES else "*i32" if name in INTEGERS else "*fp32"


def compile_one(kernel, constants: dict, num_warps: int = 4) -> str:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else type_of(n) for n in names}
    source = ASTSource(
        kernel,
        signature,
        constexprs={(i,): constants[n] for i, n in enumerate(names) if n in constants},
        attrs={(i,): ALIGNED for i, n in enumerate(names) if signature[n].startswith("*")},
    )
    ptx = triton.compile(source, target=HOPPER, options={"num_warps": num_warps}).asm["ptx"]
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, "-v", "-arch=sm_90a", path, "-o", path.with_suffix(".cubin")]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", told).group(1)
    spilled = re.search(r"(\d+) bytes spill stores", told).group(1)
    contracted = len(re.findall(r"\bfma\.rn\.f32", ptx))
    name = f"{kernel.__name__} {constants} warps {num_warps}"
    return f"{name}: registers {registers}, spill {spilled} bytes, contracted {contracted}"


def main() -> None:
    for U in (64, 512, 4096, 8192, 32768):
        grid = dict(passes.RowGrid(50_304, U).shape)
        warps = grid.pop("num_warps")
        for k in (0, 2):
            print(compile_one(dykstra.search, {"K": k, **grid}, warps))
        print(compile_one(dual.search_rows, grid, warps))
        for known in (1, 3):
            constants = {"N": 3, "KNOWN": known, **grid}
            print(compile_one(dykstra.back_rows, constants, warps))
    tall = dict(passes.ColumnGrid(50_304, 512).shape)
    warps = tall.pop("num_warps")
    for k in (0, 2):
        for total in (False, True):
            constants = {"K": k, "TOTAL": total, **tall}
            print(compile_one(dykstra.column_sums, constants, warps))
    for known in range(4):
        print(compile_one(dykstra.back_columns, {"N": 3, "KNOWN": known, **tall}, warps))
    print(compile_one(dykstra.plan, {"N": 3, "R": tall["R"], "BLOCK": tall["BLOCK"]}))
    print(compile_one(dual.column_sums, {"TOP": True, **tall}, warps))
    print(compile_one(plan.plan_sums, tall))
    print(compile_one(plan.plan_logs, tall))
    for top in (False, True):
        print(compile_one(common.column_newton, {"TOP": top, "BLOCK": passes.LANES}))


if __name__ == "__main__":
    main()
