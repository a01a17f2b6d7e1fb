"""Compiles every kernel at the shapes of llama-1b, with no GPU, and prints what the compiler made of it.

    python -m kernels.compile_report [--sm 80,90,100] [--out FILE]

Registers and shared memory are read from the cubin, spills from ptxas, the matrix instruction from the disassembly. The kernels are given
the hints that a launch would derive: an integer that is a multiple of 16 is known to be one, 1 and None are constants. A stack
without spills is the slow path of sin and cos. Exit code 1 where a kernel spills or does not compile.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.errors import TritonError

from . import attention, cross_entropy, rows, vae
from .cache import FEW

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
H, H_KV, HD, D, INNER, V = 32, 8, 64, 2048, 8192, 128259  # llama-1b and the three added tokens
B, G, P, C = 128, 8, 139, 37                              # 16 questions × 8 rollouts; prompt columns, own columns
POINTERS = {"bf16": "*bf16", "fp32": "*fp32", "i32": "*i32", "i64": "*i64"}


def cases():
    """[(name, kernel, {argument: value or pointer type}, options)]: a launch of each, as the launchers of these files would do it."""
    heads = dict(cos="fp32", sin="fp32", scale=HD**-0.5, B=B, h=H, P=P, C=C, splits=2, width=96, start="i32", members="i32", first="i32",
                 n_own="i32", slot="i32", part_o="fp32", part_lse="fp32", lse="fp32", part_dq="fp32", gK="fp32", gV="fp32",
                 **{f"s_{x}{axis}": n for x, n in (("q", H), ("k", H_KV), ("v", H_KV), ("o", H))
                    for axis, n in (("b", n * HD), ("h", HD), ("t", n * HD))},
                 **dict.fromkeys(("q", "k", "v", "K", "V", "o", "do", "dq", "dk", "dv"), "bf16"))
    step = lambda T, rows, columns, **more: {**heads, **attention.blocks(H, H_KV, HD, T, rows, columns), "BT": 16, **more}
    row = dict(mu="bf16", logvar="bf16", dz="fp32", z="fp32", kl="fp32", logp="fp32", dkl="fp32", dlogp="fp32", dmu="bf16", dlogvar="bf16",
               s_mu=2 * D, s_logvar=2 * D, s_given=D, s_dz=D, D=D, BLOCK=vae.BLOCK, HAS_DZ=True)
    modes = {"draw": dict(given="i64", s_given=2, dgiven=None, MODE=vae.DRAW),
             "given": dict(given="fp32", dgiven=None, MODE=vae.GIVEN),
             "score": dict(given="fp32", dgiven="fp32", MODE=vae.SCORE, z=None, dz=None, HAS_DZ=False),
             "mean": dict(given=None, dgiven=None, MODE=vae.MEAN, z=None, dz=None, HAS_DZ=False)}
    norm = dict(x="fp32", a="bf16", weight="fp32", s="fp32", y="bf16", dy="bf16", g="fp32", ds="fp32", rstd="fp32", part_dw="fp32",
                s_x=D, s_a=D, s_g=D, s_dy=D, s_s=D, rows=B * P, D=D, eps=1e-5, HAS_A=True, HAS_G=True, **rows.norm_blocks(D))
    rope = dict(x="bf16", y="bf16", cos="fp32", sin="fp32", s_xb=P * H * HD, s_xh=HD, s_xt=H * HD, T=P, h=H, n=16 * P * H, sign=1.0,
                H=HD // 2, BH=HD // 2, BM=32)
    glu = dict(gate="bf16", up="bf16", y="bf16", dy="bf16", dgate="bf16", dup="bf16", s_g=INNER, s_u=INNER, s_dy=INNER, rows=B * P,
               D=INNER, **rows.tiles(INNER))
    head = dict(h="bf16", W="bf16", target="i64", top="fp32", total="fp32", at_target="fp32", lse="fp32", g="fp32", dl="bf16", R=6400,
                V=V, D=D, s_h=D, s_W=D, s_dl=-(-V // 16) * 16, inverse=1.0, width=8064, **cross_entropy.HALF)
    return [*((f"vae forward, {m}", vae.forward_kernel, {**row, **a}) for m, a in modes.items()),
            *((f"vae backward, {m}", vae.backward_kernel, {**row, **a}) for m, a in modes.items()),
            *((f"attention {way}, {T} new", kernel, step(T, *tile, **more))
              for T, group in ((1, G), (FEW, 1))  # a tick of the rollouts; the answers of SFT
              for way, kernel, tile, more in (
                  ("forward, prefix", attention.prefix_forward, (group, 32), {}), ("forward, own", attention.own_forward, (1, 32), {}),
                  ("backward, prefix", attention.prefix_backward, (group, 16), {}), ("backward, own", attention.own_backward, (1, 16), {"BM": 16}))),
            ("add + RMSNorm forward", rows.norm_forward, norm), ("add + RMSNorm backward", rows.norm_backward, norm),
            ("RoPE", rows.rotate_kernel, rope),
            ("SwiGLU forward", rows.swiglu_forward_kernel, glu), ("SwiGLU backward", rows.swiglu_backward_kernel, glu),
            ("linear cross-entropy forward", cross_entropy.forward_kernel, head),
            ("linear cross-entropy backward", cross_entropy.backward_kernel, head)]


def build(kernel, values, sm):
    """Compile as a launch with these arguments would. Returns triton's compiled kernel."""
    signature, constants, hints = {}, {}, {}
    for i, p in enumerate(kernel.params):
        x = values[p.name]
        if p.is_constexpr or x is None or (isinstance(x, int) and x == 1):
            signature[p.name], constants[(i,)] = "constexpr", x
        else:
            signature[p.name] = POINTERS[x] if isinstance(x, str) else "fp32" if isinstance(x, float) else "i32"
            if isinstance(x, str) or (isinstance(x, int) and x % 16 == 0):
                hints[(i,)] = [["tt.divisibility", 16]]
    options = {name: values[name] for name in ("num_warps", "num_stages") if name in values}
    return triton.compile(ASTSource(kernel, signature, constants, hints), target=GPUTarget("cuda", sm, 32), options=options)


def measure(compiled, sm):
    """{column: value} of a compiled kernel."""
    run = lambda *command: (lambda p: p.stdout + p.stderr)(subprocess.run(command, capture_output=True, text=True, check=True))
    with tempfile.TemporaryDirectory() as d:
        cubin, ptx = Path(d, "k.cubin"), Path(d, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage, sass = run(BIN / "cuobjdump", "-res-usage", cubin), run(BIN / "nvdisasm", cubin)
        log = run(get_ptxas(sm).path, "-v", f"--gpu-name={sm_arch_from_capability(sm)}", ptx, "-o", Path(d, "o"))
    spilt = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    matrix = sorted(set(re.findall(r"\b(HGMMA|UTC\w*MMA|HMMA)\b", sass)))
    return {"registers": int(re.search(r"\bREG:(\d+)", usage)[1]), "spilt": int(spilt[1]) + int(spilt[2]),
            "stack": int(re.search(r"\bSTACK:(\d+)", usage)[1]), "shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps,
            "matrix": "+".join(matrix) or "–"}


def report(sms):
    """(markdown table, kernels that failed or spill)."""
    lines = ["| kernel | sm | registers | spilt, B | stack, B | shared, B | warps | matrix instruction |", "|---|" + "---|" * 7]
    bad = []
    for name, kernel, values in cases():
        for sm in sms:
            try:
                m = measure(build(kernel, values, sm), sm)
            except (TritonError, RuntimeError, subprocess.CalledProcessError) as e:
                bad.append(f"{name}, sm_{sm}: does not compile: {' '.join(str(e).split())[-300:]}")
                continue
            lines.append(f"| {name} | {sm} | " + " | ".join(str(x) for x in m.values()) + " |")
            if m["spilt"]:
                bad.append(f"{name}, sm_{sm}: spills {m['spilt']} bytes")
    return "\n".join(lines), bad


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", default="80,90,100", help="compute capabilities, separated by commas [%(default)s]")
    parser.add_argument("--out", help="write the table here, too")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    table, bad = report([int(sm) for sm in args.sm.split(",")])
    text = f"Triton {triton.__version__}, shapes of llama-1b in bf16\n\n{table}\n"
    sys.stdout.write(text)
    if args.out:
        Path(args.out).write_text(text)
    for line in bad:
        sys.stderr.write(line + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
