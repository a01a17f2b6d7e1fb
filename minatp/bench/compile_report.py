"""Compile every kernel as minatp launches it at the size of llama-1b, without a GPU.

    python -m kernels.compile_report [--sm 80,90,100] [--batches 20] [--out FILE]

The variants are those that the fake GPU meets (fake.py), each of them a specialisation of a kernel:
an integer that is a multiple of 16 is known to be one, and 1 and None are constants. For each and
for each compute capability a line tells: registers and shared memory, from the cubin; bytes spilled
because they do not fit into registers, from ptxas; the matrix instruction, from the disassembly. A
stack without spills is the slow path of a library's sine and cosine.

Exit code 1 if a kernel spills or does not compile.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.errors import TritonError

from ..run.errors import UserError, run_command
from ..run.options import Parser
from ..run.saved import replace_file
from ..run.terminal import print0

# Triton's wheel brings NVIDIA's tools: cuobjdump and nvdisasm, which read a cubin
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# A specialisation depends on the width of the model and on the batch, and not on the depth
N_LAYER = 2


def main(argv=None):
    parser = Parser(__doc__, "kernels.compile_report")
    add = parser.add_argument
    add("--sm", default="80,90,100", help="compute capabilities, separated by commas [%(default)s]")
    add("--out", default="", help="also write the table to this file")
    add(
        "--batches",
        type=int,
        default=20,
        help="SFT batches of random lengths, whose variants are compiled, too [%(default)s]",
    )
    args = parser.parse_args(argv)
    if not re.fullmatch(r"\d+(,\d+)*", args.sm):
        raise UserError(f"command line: --sm must be numbers such as 80,90, not {args.sm!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("command line: TRITON_INTERPRET=1 leaves nothing to compile; unset it")

    from .fake import specialisations  # here, because it replaces parts of torch

    # The table goes to stdout, and to the file; what failed goes to stderr
    variants = specialisations(N_LAYER, args.batches)
    table, failures = report(variants, [int(sm) for sm in args.sm.split(",")])
    text = f"Triton {triton.__version__}, shapes of llama-1b in bf16\n\n{table}"
    print0(text)
    if args.out:
        replace_file(args.out, text + "\n")
    for failure in failures:
        sys.stderr.write(failure + "\n")
    return int(bool(failures))


def build(variant, sm):
    """triton's compiled kernel of a Specialisation, for compute capability sm."""
    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.hints)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=variant.options)


def title(variant):
    """The kernel's name, and the constants that its author declared: own_forward_kernel T=1 …"""
    constants = []
    for (i, *_), value in variant.constants.items():
        parameter = variant.kernel.params[i]
        if parameter.is_constexpr:
            constants.append(f"{parameter.name}={value}")
    return " ".join([variant.kernel.__name__, *constants])


def measure(compiled, sm):
    """{column of the table: value} of a compiled kernel."""
    # The tools read files
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        ptx = Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = output_of(BIN / "cuobjdump", "-res-usage", cubin)
        disassembly = output_of(BIN / "nvdisasm", cubin)

        # Only ptxas says what is spilled, and only while it compiles
        arch = f"--gpu-name={sm_arch_from_capability(sm)}"
        log = output_of(get_ptxas(sm).path, "-v", arch, ptx, "-o", Path(folder, "again.cubin"))

    # A matrix instruction shows that tl.dot runs on tensor cores: HMMA, or what sm_90 (HGMMA) and
    # sm_100 (UTC…MMA) have brought
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    matrix_instructions = set(re.findall(r"\b(HGMMA|UTC\w*MMA|HMMA)\b", disassembly))
    return {
        "registers": int(re.search(r"\bREG:(\d+)", usage)[1]),
        "spilled": int(spills[1]) + int(spills[2]),
        "stack": int(re.search(r"\bSTACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "matrix": "+".join(sorted(matrix_instructions)) or "–",
    }


def output_of(*command):
    """What a command prints. Raises CalledProcessError if it fails."""
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return process.stdout + process.stderr


def report(variants, sms):
    """A Markdown table, and a list of the kernels that spill or do not compile."""
    heads = (
        "kernel | sm | registers | spilled, B | stack, B | shared, B | warps | matrix instruction"
    )
    lines = [f"| {heads} |", "|---|" + "---|" * 7]
    failures = []
    names = Counter()
    for variant in sorted(variants, key=title):
        # Variants of one title differ in types, or in what is a multiple of 16
        name = title(variant)
        names[name] += 1
        if names[name] > 1:
            name = f"{name} ({names[name]})"

        for sm in sms:
            # A kernel that does not compile is listed, and the others are measured all the same
            try:
                measured = measure(build(variant, sm), sm)
            except (TritonError, RuntimeError, subprocess.CalledProcessError) as error:
                message = " ".join(str(error).split())[-300:]
                failures.append(f"{name}, sm_{sm}: does not compile: {message}")
                continue

            values = " | ".join(str(value) for value in measured.values())
            lines.append(f"| {name} | {sm} | {values} |")
            if measured["spilled"]:
                failures.append(f"{name}, sm_{sm}: spills {measured['spilled']} bytes")
    return "\n".join(lines), failures


if __name__ == "__main__":
    run_command(main)
