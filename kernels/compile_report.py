"""Compile every kernel at the shapes of llama-1b, without a GPU, and print what it needs.

    python -m kernels.compile_report [--sm 80,90,100] [--out FILE]

For each kernel and compute capability: registers and shared memory, from the cubin; bytes spilled
because they do not fit into registers, from ptxas; the matrix instruction, from the disassembly. A
stack without spills is the slow path of a library's sine and cosine.

A kernel is compiled as its launch would compile it: an integer that is a multiple of 16 is known to
be one, and 1 and None are constants.

Exit code 1 if a kernel spills or does not compile.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.errors import TritonError

from . import attention, cross_entropy, rows, sampling, vae
from .cache import MAX_STEP_COLUMNS
from .common import next_power_of_2

# Triton's wheel brings NVIDIA's tools: cuobjdump and nvdisasm, which read a cubin.
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# llama-1b with the three tokens that latent reasoning adds
N_HEAD = 32
N_KV_HEAD = 8
HEAD_DIM = 64
D = 2048
INNER = 8192  # of the MLP
V = 128259

# A batch of rollouts: 16 questions × 8
B = 128
GROUP = 8
# Not multiples of 16, as most lengths are not, so the compiler can assume nothing of them.
PREFIX_COLUMNS = 139  # of a question, in the KV cache
OWN_COLUMNS = 37  # of a rollout


class Case(NamedTuple):
    """A kernel at one shape."""

    name: str
    kernel: object
    arguments: (
        dict  # name -> number, constexpr, None, or a pointer's dtype: "bf16", "fp32", "i32", "i64"
    )


# ---- cases: the arguments of a launch ------------------------------------------------------------
# One dict serves a forward and a backward kernel: `build` takes from it what a kernel's signature
# names. Of a number that is not a constexpr, only its type and whether it is 1 or a multiple of 16
# matter, because a launch tells the compiler nothing else.


def cases():
    """Return a Case of every kernel, with the arguments that its launcher would pass."""
    return [
        *vae_cases(),
        *attention_cases(),
        *row_cases(),
        *cross_entropy_cases(),
        *sampling_cases(),
    ]


def vae_cases():
    """Return the VAE's kernels, forward and backward, in each of their four modes."""
    # Mode given, when the loss uses z. The other modes are changes to it.
    arguments = {
        **pointers("bf16", "mu logvar dmu dlogvar"),
        **pointers("fp32", "dz z kl logp dkl dlogp"),
        "mu_row_stride": 2 * D,  # one projection gives both
        "logvar_row_stride": 2 * D,
        "source_row_stride": D,
        "dz_row_stride": D,
        "D": D,
        "BLOCK": vae.BLOCK,
        "HAS_DZ": True,
        "source_ptr": "fp32",
        "dsource_ptr": None,
    }

    # draw reads a seed and an offset per row. score and mean make no z; score alone has a gradient
    # for its source, which is z.
    no_new_z = {"z_ptr": None, "dz_ptr": None, "HAS_DZ": False}
    modes = {
        "draw": {"source_ptr": "i64", "source_row_stride": 2},
        "given": {},
        "score": {"dsource_ptr": "fp32", **no_new_z},
        "mean": {"source_ptr": None, **no_new_z},
    }

    kernels = {
        "forward": vae.reparameterise_forward_kernel,
        "backward": vae.reparameterise_backward_kernel,
    }
    return [
        Case(f"vae {direction}, {mode}", kernel, {**arguments, "MODE": mode, **changes})
        for direction, kernel in kernels.items()
        for mode, changes in modes.items()
    ]


def attention_cases():
    """Return attention's kernels for one new position, and for as many as one step takes."""
    # As split_prefix does it, 139 columns are two splits of 96 and 43.
    arguments = {
        **pointers("bf16", "q k v k_cache v_cache o do dq dk dv"),
        **pointers("fp32", "cos sin part_o part_lse lse part_dq k_grad v_grad"),
        **pointers("i32", "start members member_offsets n_own slot"),
        "scale": HEAD_DIM**-0.5,
        "B": B,
        "h": N_HEAD,
        "P": PREFIX_COLUMNS,
        "C": OWN_COLUMNS,
        "n_splits": 2,
        "split_width": 96,
        "BT": 16,
    }

    # q, k, v and do lie in memory as the projections leave them, (B, T, heads, d), here for T = 1.
    for tensor, heads in {"q": N_HEAD, "k": N_KV_HEAD, "v": N_KV_HEAD, "do": N_HEAD}.items():
        arguments[f"stride_{tensor}b"] = heads * HEAD_DIM
        arguments[f"stride_{tensor}h"] = HEAD_DIM
        arguments[f"stride_{tensor}t"] = heads * HEAD_DIM

    result = []
    # One new position is a step of the rollouts, in groups. Several are an answer in SFT.
    for T, group in ((1, GROUP), (MAX_STEP_COLUMNS, 1)):
        # The tile sizes of run_forward and run_backward in attention.py.
        queries_per_row = T * N_HEAD // N_KV_HEAD
        group_tile = attention.query_tile(group, queries_per_row)
        row_tile = attention.query_tile(1, queries_per_row)
        kernels = {
            "forward, prefix": (attention.prefix_forward_kernel, {"BM": group_tile, "BN": 32}),
            "forward, own": (attention.own_forward_kernel, {"BM": row_tile, "BN": 32}),
            "backward, prefix": (attention.prefix_backward_kernel, {"BM": group_tile, "BN": 16}),
            "backward, own": (attention.own_backward_kernel, {"BM": 16, "BN": 16}),
        }

        constants = attention.head_constants(N_HEAD, N_KV_HEAD, HEAD_DIM, T)
        for name, (kernel, tile) in kernels.items():
            sizes = {**constants, **tile}
            result.append(Case(f"attention {name}, {T} new", kernel, {**arguments, **sizes}))
    return result


def row_cases():
    """Return the kernels of a layer's rows: RMSNorm, RoPE, SwiGLU."""
    n_rows = B * PREFIX_COLUMNS

    # The residual stream is float32, and what the products read or write is bf16. There is a branch
    # to add, and g, a gradient of the sum from its other uses.
    norm = {
        **pointers("fp32", "x weight sum g ds rstd partial_dw"),
        **pointers("bf16", "branch y dy"),
        **dict.fromkeys(["x_row_stride", "branch_row_stride", "g_row_stride"], D),
        **dict.fromkeys(["dy_row_stride", "sum_row_stride", "n_cols"], D),
        "n_rows": n_rows,
        "eps": 1e-5,
        "HAS_BRANCH": True,
        "HAS_G": True,
        **rows.whole_row_blocks(D),
    }

    # q of a long pass: a view (B, heads, T, d) of what the projection writes, (B, T, heads, d).
    rope = {
        **pointers("bf16", "x y"),
        **pointers("fp32", "cos sin"),
        "x_batch_stride": PREFIX_COLUMNS * N_HEAD * HEAD_DIM,
        "x_head_stride": HEAD_DIM,
        "x_time_stride": N_HEAD * HEAD_DIM,
        "T": PREFIX_COLUMNS,
        "n_head": N_HEAD,
        "n_rows": 16 * PREFIX_COLUMNS * N_HEAD,
        "sign": 1.0,
        "H": HEAD_DIM // 2,
        "BLOCK_H": HEAD_DIM // 2,
        "BLOCK_ROWS": 32,
    }

    # gate and up are two products of their own, so a row is INNER wide.
    swiglu = {
        **pointers("bf16", "gate up y dy dgate dup"),
        **dict.fromkeys(["gate_row_stride", "up_row_stride", "dy_row_stride", "n_cols"], INNER),
        "n_rows": n_rows,
        **rows.elementwise_blocks(INNER),
    }
    return [
        Case("add + RMSNorm forward", rows.add_rms_norm_forward_kernel, norm),
        Case("add + RMSNorm backward", rows.add_rms_norm_backward_kernel, norm),
        Case("RoPE", rows.rotate_kernel, rope),
        Case("SwiGLU forward", rows.swiglu_forward_kernel, swiglu),
        Case("SwiGLU backward", rows.swiglu_backward_kernel, swiglu),
    ]


def cross_entropy_cases():
    """Return linear cross-entropy's kernels."""
    # As LinearNLL launches them: a share is a sixteenth of the vocabulary in whole tiles, 63 of 128
    # tokens, and a chunk is whole tiles, too. Here it is the last one, whose V is odd as well.
    R = 6400
    tile = cross_entropy.HALF_PRECISION_BLOCKS["BLOCK_V"]
    arguments = {
        **pointers("bf16", "h W dl"),
        **pointers("fp32", "max sum target_logit lse g"),
        "target_ptr": "i64",
        "R": R,
        "V": V,
        "D": D,
        "h_row_stride": D,
        "W_row_stride": D,
        "dl_row_stride": cross_entropy.chunk_width(R, V, tile),
        "chunk_start": 0,
        "inverse_temperature": 1.0,
        "share_size": 8064,
        **cross_entropy.HALF_PRECISION_BLOCKS,
    }
    forward = cross_entropy.linear_nll_forward_kernel
    backward = cross_entropy.linear_nll_backward_kernel
    return [
        Case("linear cross-entropy forward", forward, arguments),
        Case("linear cross-entropy backward", backward, arguments),
    ]


def sampling_cases():
    """Return the kernels that choose a word: one drawn, and the likeliest."""
    n_blocks = -(-V // sampling.BLOCK)
    arguments = {
        "logits_ptr": "bf16",
        **pointers("fp32", "max sum u logp"),
        "word_ptr": "i64",
        "logits_row_stride": V,
        "V": V,
        "n_blocks": n_blocks,
        "inverse_temperature": 1.0,
        "BLOCK": sampling.BLOCK,
        "BLOCKS": next_power_of_2(n_blocks),
    }
    return [
        Case("sampling, blocks", sampling.block_sums_kernel, arguments),
        Case("sampling, drawn", sampling.choose_word_kernel, arguments),
        Case("sampling, likeliest", sampling.choose_word_kernel, {**arguments, "u_ptr": None}),
    ]


def pointers(dtype, names):
    """Return arguments that point at tensors: "x y" -> {"x_ptr": dtype, "y_ptr": dtype}."""
    return {f"{name}_ptr": dtype for name in names.split()}


# ---- compile and measure -------------------------------------------------------------------------


def build(kernel, arguments, sm):
    """Return triton's compiled kernel for compute capability sm, as a launch would compile it."""
    # What a launch finds out from its arguments: types, constants, and what is known of the rest.
    signature = {}
    constants = {}
    hints = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        value = arguments[name]
        is_pointer = isinstance(value, str)
        is_int = isinstance(value, int)

        # A launch makes constants of None and 1, too.
        if parameter.is_constexpr or value is None or (is_int and value == 1):
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue

        # All others have a type. PyTorch allocates at multiples of 16 bytes; where strides are
        # multiples of 16, too, the compiler can load several elements at once.
        if is_pointer:
            signature[name] = "*" + value
        elif is_int:
            signature[name] = "i32"
        else:
            signature[name] = "fp32"
        if is_pointer or (is_int and value % 16 == 0):
            hints[(i,)] = [["tt.divisibility", 16]]

    # A case without num_warps or num_stages gets Triton's defaults, as its launch does.
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def measure(compiled, sm):
    """Return {column of the table: value} of a compiled kernel."""
    # The tools read files.
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        ptx = Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = output_of(BIN / "cuobjdump", "-res-usage", cubin)
        disassembly = output_of(BIN / "nvdisasm", cubin)

        # Only ptxas says what is spilled, and only while it compiles.
        arch = f"--gpu-name={sm_arch_from_capability(sm)}"
        log = output_of(get_ptxas(sm).path, "-v", arch, ptx, "-o", Path(folder, "again.cubin"))

    # A matrix instruction shows that tl.dot runs on tensor cores: HMMA, or what sm_90 (HGMMA) and
    # sm_100 (UTC…MMA) have brought.
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
    """Run a command and return what it prints. Raises CalledProcessError if it fails."""
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return process.stdout + process.stderr


def report(sms):
    """Return a Markdown table, and a list of the kernels that spill or do not compile."""
    heads = (
        "kernel | sm | registers | spilled, B | stack, B | shared, B | warps | matrix instruction"
    )
    lines = [f"| {heads} |", "|---|" + "---|" * 7]
    failures = []
    for case in cases():
        for sm in sms:
            # A kernel that does not compile is listed, and the others are measured all the same.
            try:
                measured = measure(build(case.kernel, case.arguments, sm), sm)
            except (TritonError, RuntimeError, subprocess.CalledProcessError) as error:
                message = " ".join(str(error).split())[-300:]
                failures.append(f"{case.name}, sm_{sm}: does not compile: {message}")
                continue

            values = " | ".join(str(value) for value in measured.values())
            lines.append(f"| {case.name} | {sm} | {values} |")
            if measured["spilled"]:
                failures.append(f"{case.name}, sm_{sm}: spills {measured['spilled']} bytes")
    return "\n".join(lines), failures


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sm", default="80,90,100", help="compute capabilities, separated by commas [%(default)s]"
    )
    parser.add_argument("--out", help="also write the table to this file")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile; unset it")

    # The table goes to stdout, and to the file; what failed goes to stderr.
    table, failures = report([int(sm) for sm in args.sm.split(",")])
    text = f"Triton {triton.__version__}, shapes of llama-1b in bf16\n\n{table}\n"
    sys.stdout.write(text)
    if args.out:
        Path(args.out).write_text(text)
    for failure in failures:
        sys.stderr.write(failure + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
