"""Verify kernels on this machine's GPU, time them beside their peers, and write a page of it.

    python -m kernels.bench [--rounds 20] [--peers all] [--out out/kernels.md]

Verify, then time: a kernel is timed only if its bf16 error against float64 is at most 1.5 ×
PyTorch's own, in every result and gradient of its Case; NaN is a failure. The cases are the VAE
drawing its noise, attention at T = 1, add + RMSNorm without the gradient of its weight, SwiGLU, and
linear cross-entropy. RoPE by itself, the VAE's other modes and attention at T > 1 are verified by
tests/kernels alone.

A contender's calls are captured as one CUDA graph, over as many copies of the inputs as it takes to
exceed the L2 cache. The contenders take turns, round by round, and ratios are medians over rounds.
A peer that does not run is named, and is not counted as a win. Each speed is also given as a share
of its ceiling: the speed of a copy, or of a bf16 product, measured in the same run.

The operations of linear cross-entropy, forward and backward, are counted as 3 × its forward
product. The backward pass computes the logits again, so the kernels really do 4 ×.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from . import attention, cross_entropy, graph, ops, rows, vae
from .cache import AttendStep, Columns, StoreColumns
from .common import triton

LIMIT = 1.5  # of a kernel's bf16 error over PyTorch's own
PEERS = ("eager", "torch.compile", "SDPA", "FlexAttention")


@dataclass
class Case:
    """One kernel at one shape. Its functions take the tensors of `inputs`, all with a gradient."""

    name: str
    inputs: Callable  # () -> list of tensors
    kernel: Callable  # (*tensors) -> tensor or tuple of tensors
    reference: Callable  # the same in PyTorch, in any dtype
    forward_bytes: float  # that the forward pass must move
    backward_bytes: float  # and the backward pass
    product: float = 0  # operations of its matrix product, forward; 0 if it is memory-bound
    peers: dict = field(default_factory=dict)  # more functions to time, by name


# ---- cases: attention ----------------------------------------------------------------------------


@dataclass
class AttentionShape:
    """A latent step: n_prompt questions of n_prefix columns, and `group` rollouts of each question.

    Each rollout already has n_own columns of its own, and adds one.
    """

    n_prompt: int
    group: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_prefix: int
    n_own: int


def attention_case(device, dtype, shape):
    # The names of attention.py: N prefixes of P columns; B rows with room for C own columns.
    N, P = shape.n_prompt, shape.n_prefix
    B = N * shape.group
    C = shape.n_own + 1
    layout = attention_layout(device, shape)

    # RoPE's angles are made once for all layers, so they are not among the inputs.
    angle = torch.rand(B, 1, 1, shape.head_dim // 2, device=device) * 100
    cos = angle.cos()
    sin = angle.sin()

    def inputs():
        def random(*size):
            return torch.randn(size, device=device).to(dtype)

        # q, k, v of one new position, as the projections leave them, and the cached columns
        heads = (shape.n_head, shape.n_kv_head, shape.n_kv_head)
        new = [random(B, 1, n, shape.head_dim).transpose(1, 2) for n in heads]
        prefix = [random(N, shape.n_kv_head, P, shape.head_dim) for _ in range(2)]
        own = [random(B, shape.n_kv_head, C, shape.head_dim) for _ in range(2)]
        return [*new, *prefix, *own]

    def kernel(q, k, v, prefix_k, prefix_v, own_k, own_v):
        # In its backward pass StoreColumns returns what was added to gradient buffers, so it serves
        # for the own columns, too. The joint order token makes both nodes wait for AttendStep.
        prefix = Columns(prefix_k.detach(), prefix_v.detach())
        own = Columns(own_k.detach(), own_v.detach())
        prefix_token = StoreColumns.apply(prefix, None, prefix_k, prefix_v)
        own_token = StoreColumns.apply(own, None, own_k, own_v)
        order_token = prefix_token + own_token
        o, _ = AttendStep.apply(prefix, own, layout, order_token, q, k, v, cos, sin)
        return o

    # Angles in the dtype of q: verify() also runs the reference in float64.
    def reference(q, k, v, *columns):
        rope = (cos.to(q.dtype), sin.to(q.dtype))
        return attention.step_reference(q, k, v, *rope, *columns, layout)

    def rotated_and_joined(q, k, v, prefix_k, prefix_v, own_k, own_v):
        """Return the rotated q, and each row's keys and values of all P + C + 1 columns."""
        rope = (cos.to(dtype), sin.to(dtype))
        all_k = torch.cat((prefix_k[layout.owner], own_k, rows.rotate(k, *rope)), 2)
        all_v = torch.cat((prefix_v[layout.owner], own_v, v), 2)
        return rows.rotate(q, *rope), all_k, all_v

    # PyTorch's own attention takes one tensor of all columns, and a mask. It hides the padding, and
    # the last own column, which is the room for the new one.
    mask = attention.visible_mask(layout, P, C)[:, None]

    # With enable_gqa and a mask it has no fused kernel, and to repeat the keys would be to copy all
    # columns. So the query heads of a key head are its rows, which one new position allows.
    def sdpa(*tensors):
        q, k, v = rotated_and_joined(*tensors)
        grouped = q.reshape(B, shape.n_kv_head, -1, shape.head_dim)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view(q.shape)

    # Elements of a key or value tensor that a step reads. Left padding costs nothing.
    columns = N * P - layout.start.sum() + B * C
    elements = float(columns * shape.n_kv_head * shape.head_dim)
    peers = {"SDPA": sdpa}
    if device.type == "cuda":  # FlexAttention has no backward pass on a CPU
        peers["FlexAttention"] = flex_attention_peer(rotated_and_joined, mask[:, 0])

    # Forward reads a key and a value in bf16, 2 + 2 bytes. Backward reads them again, and reads and
    # writes their float32 gradients, 2 × (4 + 4).
    return Case(
        name=f"latent attention, {N} × {shape.group} rows, {P} + {shape.n_own} columns",
        inputs=inputs,
        kernel=kernel,
        reference=reference,
        forward_bytes=4 * elements,
        backward_bytes=(4 + 16) * elements,
        peers=peers,
    )


def attention_layout(device, shape):
    """Return where the columns lie. Prompts differ in length; all rows have n_own own columns."""

    def arange(*bounds):
        return torch.arange(*bounds, device=device, dtype=torch.int32)

    N, group = shape.n_prompt, shape.group
    B = N * group
    n_own = torch.full((B,), shape.n_own, device=device, dtype=torch.int32)

    # Left padding of 0, 7, 14, … columns, but less than half of the prefix.
    return attention.Layout(
        start=arange(N) * 7 % (shape.n_prefix // 2),
        owner=arange(B) // group,
        members=arange(B),
        member_offsets=arange(0, B + 1, group),
        mean_group=group,
        n_own=n_own,
        slot=n_own[:, None],
    )


def flex_attention_peer(rotated_and_joined, mask):
    """Return FlexAttention as a peer. mask (B, T, columns)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    block_masks = []  # one, after the first call

    def visible(b, head, q_index, kv_index):
        return mask[b, q_index, kv_index]

    def peer(*tensors):
        # Made in the first call, so that a failure is reported as this peer's.
        if not block_masks:
            B, _, columns = mask.shape
            block_masks.append(create_block_mask(visible, B, None, 1, columns, device=mask.device))
        q, k, v = rotated_and_joined(*tensors)
        return compiled(q, k, v, block_mask=block_masks[0], enable_gqa=True)

    return peer


# ---- cases: the others ---------------------------------------------------------------------------


def vae_case(device, dtype, R, D):
    # A seed and an offset for each row, and the ε that the kernel draws from them.
    keys = ops.noise_keys(5, R).to(device)
    eps = vae.draw_noise(keys, D)

    def inputs():
        return [torch.randn(R, D, device=device).to(dtype) for _ in range(2)]

    def kernel(mu, logvar):
        return vae.fused_reparameterise(mu, logvar, keys)

    def reference(mu, logvar):
        return vae.reparameterise(mu, logvar, eps.to(mu.dtype))

    # The kernel draws its noise, the reference reads it. These peers draw it, too.
    def with_randn(mu, logvar):
        noise = torch.randn_like(mu, dtype=torch.float32)
        return vae.reparameterise(mu, logvar, noise)

    def compiled_with_randn(mu, logvar):
        return torch.compile(with_randn)(mu, logvar)

    # Bytes as in the table of vae.py, mode draw.
    return Case(
        name=f"reparameterisation, {R} × {D}",
        inputs=inputs,
        kernel=kernel,
        reference=reference,
        forward_bytes=8 * R * D,
        backward_bytes=12 * R * D,
        peers={
            "eager with randn": with_randn,
            "torch.compile with randn": compiled_with_randn,
        },
    )


def norm_case(device, dtype, R, D):
    # Not among the inputs: the kernel computes the weight's gradient, but it is not verified here.
    weight = torch.randn(D, device=device).to(dtype)

    def inputs():
        return [torch.randn(R, D, device=device).to(dtype) for _ in range(2)]

    def kernel(x, branch):
        return tuple(rows.AddRMSNorm.apply(x, branch, weight, 1e-5, dtype))

    def reference(x, branch):
        return rows.add_rms_norm(x, branch, weight.to(x.dtype), 1e-5)

    # Four tensors in bf16 each way: x, branch, s and y; then the gradients of s and y, s, and ds.
    return Case(
        name=f"add + RMSNorm, {R} × {D}",
        inputs=inputs,
        kernel=kernel,
        reference=reference,
        forward_bytes=8 * R * D,
        backward_bytes=8 * R * D,
    )


def swiglu_case(device, dtype, R, inner):
    def inputs():
        return [torch.randn(R, inner, device=device).to(dtype) for _ in range(2)]

    # Three tensors in bf16 forward: gate, up, y. Five backward: dy, gate, up, dgate, dup.
    return Case(
        name=f"SwiGLU, {R} × {inner}",
        inputs=inputs,
        kernel=rows.SwiGLU.apply,
        reference=rows.swiglu,
        forward_bytes=6 * R * inner,
        backward_bytes=10 * R * inner,
    )


def cross_entropy_case(device, dtype, R, D, V):
    target = torch.randint(0, V, (R,), device=device)

    def inputs():
        # W is scaled so that the logits have a variance of about 1.
        h = torch.randn(R, D, device=device).to(dtype)
        W = torch.randn(V, D, device=device).to(dtype)
        return [h, W * D**-0.5]

    def kernel(h, W):
        return cross_entropy.fused_linear_nll(h, W, target)

    def reference(h, W):
        return cross_entropy.linear_nll(h, W, target)

    # With a product its speed is given in operations, and the bytes are not used.
    return Case(
        name=f"linear cross-entropy, {R} × {V}",
        inputs=inputs,
        kernel=kernel,
        reference=reference,
        forward_bytes=2 * (R + V) * D,
        backward_bytes=4 * (R + V) * D,
        product=2 * R * V * D,
    )


def cases(device, dtype):
    """Return what is timed: the shapes of llama-1b."""
    llama = {"n_head": 32, "n_kv_head": 8, "head_dim": 64}
    R, D, inner, V = 6400, 2048, 8192, 128259

    # A batch of rollouts in RL; a batch of SFT; two long prompts, where splits fill the GPU.
    attention_shapes = [
        AttentionShape(n_prompt=16, group=8, n_prefix=200, n_own=20, **llama),
        AttentionShape(n_prompt=32, group=1, n_prefix=140, n_own=10, **llama),
        AttentionShape(n_prompt=2, group=1, n_prefix=8192, n_own=20, **llama),
    ]
    return [
        # Enough latents to saturate the memory, and one latent of each row of an SFT batch.
        vae_case(device, dtype, 65536, D),
        vae_case(device, dtype, 32, D),
        *[attention_case(device, dtype, shape) for shape in attention_shapes],
        norm_case(device, dtype, R, D),
        swiglu_case(device, dtype, R, inner),
        cross_entropy_case(device, dtype, R, D, V),
    ]


def small_cases(device, dtype):
    """Return the same cases at shapes that a CPU computes in seconds, for a test."""
    shape = AttentionShape(
        n_prompt=2, group=2, n_head=4, n_kv_head=1, head_dim=8, n_prefix=19, n_own=3
    )
    R, D, inner, V = 5, 24, 40, 67
    return [
        vae_case(device, dtype, 3, 40),
        attention_case(device, dtype, shape),
        norm_case(device, dtype, R, D),
        swiglu_case(device, dtype, R, inner),
        cross_entropy_case(device, dtype, R, D, V),
    ]


# ---- verify --------------------------------------------------------------------------------------


def results(function, inputs, upstream=None):
    """Return the results and gradients of a function, and the upstream gradients.

    Upstream gradients differ from element to element. They are drawn unless they are given.
    """
    # Detached, so that the same inputs serve several functions.
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = as_list(function(*leaves))

    # One draw for all functions, rounded to the dtype of each one's results.
    if upstream is None:
        upstream = [torch.randn_like(y, dtype=torch.float32) for y in outputs]
    cast_upstream = [g.to(y.dtype) for g, y in zip(upstream, outputs)]
    gradients = torch.autograd.grad(outputs, leaves, cast_upstream)
    return [x.detach() for x in (*outputs, *gradients)], upstream


def as_list(outputs):
    """Return a list of tensors, of a function that returns one tensor or several."""
    return [outputs] if torch.is_tensor(outputs) else list(outputs)


def verify(case):
    """Return the largest ratio of the kernel's error to PyTorch's error in the same dtype.

    Errors are relative, in L2, against float64. PyTorch's error counts as at least the rounding of
    a result: where PyTorch is exact by luck, a kernel need not be. NaN if any ratio is.
    """
    torch.manual_seed(0)
    inputs = case.inputs()
    double_inputs = [x.double() for x in inputs]

    # Three runs on the same numbers: the kernel, and PyTorch in the kernel's dtype and in float64.
    from_kernel, upstream = results(case.kernel, inputs)
    from_pytorch, _ = results(case.reference, inputs, upstream)
    exact, _ = results(case.reference, double_inputs, upstream)

    def error(x, x_exact):
        return float((x.double() - x_exact).norm() / x_exact.norm())

    # A rounded number is off by eps/2 of its size at most, and by about half of that on average.
    rounding = torch.finfo(inputs[0].dtype).eps / 4
    ratios = [
        error(ours, truth) / max(error(theirs, truth), rounding)
        for ours, theirs, truth in zip(from_kernel, from_pytorch, exact)
    ]
    return float(torch.tensor(ratios, dtype=torch.float64).max())  # unlike max(), it keeps a NaN


# ---- time ----------------------------------------------------------------------------------------


def capture(function, copies, backward):
    """Capture calls on every copy of the inputs as one CUDA graph, and return its replay."""

    def run_forward(inputs):
        with torch.no_grad():
            function(*inputs)

    def run_forward_and_backward(inputs):
        # grad(), because backward() would also add to each input's .grad.
        outputs = as_list(function(*inputs))
        upstream = [torch.ones_like(y) for y in outputs]
        torch.autograd.grad(outputs, inputs, upstream)

    def run_all():
        for inputs in copies:
            if backward:
                run_forward_and_backward(inputs)
            else:
                run_forward(inputs)

    # Warm up on another stream, which waits until the inputs have been written.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run_all()
    torch.cuda.synchronize()

    # One graph, so that what is timed is the GPU's work and not Python's.
    cuda_graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(cuda_graph):
            run_all()
    except Exception as error:
        raise graph.CaptureFailed(f"{type(error).__name__} while recording: {error}") from error
    return cuda_graph.replay


def microseconds(work):
    """Return how long the GPU takes for work()."""
    # The GPU notes the time when it reaches an event.
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)  # from milliseconds


def ceilings(device):
    """Return bytes read and written per µs by a copy, and operations per µs of a bf16 product."""
    # 1 GiB each, far more than an L2 cache holds.
    source, destination = (
        torch.empty(2**29, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))

    def copy():
        destination.copy_(source)

    def product():
        torch.matmul(a, b)

    # The fastest of 20, because a ceiling is what the GPU can do. A copy reads and writes; an n × n
    # product is n³ multiplications and n³ additions.
    copy_time = min(microseconds(copy) for _ in range(20))
    product_time = min(microseconds(product) for _ in range(20))
    return 2 * source.nbytes / copy_time, 2 * 8192**3 / product_time


@dataclass
class Race:
    """How the contenders are timed, and the ceilings that their speeds are compared with."""

    rounds: int
    peers: str  # "all", or names separated by commas
    copy_speed: float  # bytes per µs
    product_speed: float  # operations per µs


def copies_beyond(l2_cache, size):
    """Return how many copies of inputs of `size` bytes the L2 cache cannot hold, twice over.

    So every call reads its inputs from memory.
    """
    return 2 * l2_cache // size + 1


def race(case, backward, settings):
    """Time the kernel and its peers. Return one Markdown row for each."""
    size = sum(x.nbytes for x in case.inputs())
    n_copies = copies_beyond(torch.cuda.get_device_properties(0).L2_cache_size, size)
    copies = [[x.requires_grad_() for x in case.inputs()] for _ in range(n_copies)]

    # Capture all before any is timed. A peer that fails is reported; the kernel must not fail, and
    # nothing may fail while it is recorded (graph.CaptureFailed).
    replays = {}
    failed = {}
    for name, function in contenders(case, settings.peers).items():
        try:
            replays[name] = capture(function, copies, backward)
        except Exception as error:  # a peer's compiler may raise anything
            if name == "kernel":
                raise
            failed[name] = " ".join(str(error).split())[:80]

    # Take turns, so that a change of the GPU's clock meets all of them.
    times = {name: [] for name in replays}  # µs of a call
    for _ in range(settings.rounds):
        for name, replay in replays.items():
            times[name].append(microseconds(replay) / n_copies)

    direction = "forward + backward" if backward else "forward"

    # A ratio is taken round by round, where the clock's changes cancel; the median comes after.
    lines = []
    for name, values in times.items():
        time_us = torch.tensor(values)
        median = float(time_us.median())
        ratios = time_us / torch.tensor(times["kernel"])
        p10, p50, p90 = ratios.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        speed = describe_speed(case, backward, median, settings)
        lines.append(
            f"| {case.name} | {direction} | {name} | {median:.1f} | {speed} | "
            f"{p50:.2f} ({p10:.2f}–{p90:.2f}) |"
        )
    for name, error in failed.items():
        lines.append(f"| {case.name} | {direction} | {name}: did not run ({error}) | | | | |")
    return lines


def contenders(case, peers):
    """Return {name: function}: the kernel, eager and compiled PyTorch, and the case's own peers."""
    everyone = {
        "kernel": case.kernel,
        "eager": case.reference,
        "torch.compile": torch.compile(case.reference, dynamic=False),
        **case.peers,
    }
    if peers == "all":
        return everyone

    # "eager" chooses "eager with randn", too.
    chosen = ("kernel", *peers.split(","))
    return {name: f for name, f in everyone.items() if name.split(" with ")[0] in chosen}


def describe_speed(case, backward, time_us, settings):
    """Return two cells of a row: the speed, and its share of the ceiling."""
    # Forward is one product, backward two, dh and dW. 10⁶ operations per µs are 1 TFLOP/s.
    if case.product:
        operations = case.product * (3 if backward else 1)
        speed = operations / time_us
        return f"{speed / 1e6:.0f} TFLOP/s | {speed / settings.product_speed:.0%}"

    # 10³ bytes per µs are 1 GB/s.
    moved = case.forward_bytes + (case.backward_bytes if backward else 0)
    speed = moved / time_us
    return f"{speed / 1e3:.0f} GB/s | {speed / settings.copy_speed:.0%}"


# ---- main ----------------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=20, help="turns of each contender [%(default)s]"
    )
    parser.add_argument(
        "--peers",
        default="all",
        help=f"all, or some of {', '.join(PEERS)}, separated by commas; "
        "those that compile take minutes [%(default)s]",
    )
    parser.add_argument(
        "--out", default="out/kernels.md", help="written after each kernel [%(default)s]"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no GPU; python -m kernels.compile_report and the tests need none")
    if unknown := set(args.peers.split(",")) - {"all", *PEERS}:
        parser.error(f"--peers: there is no {', '.join(unknown)}")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    device = torch.device("cuda")
    settings = Race(args.rounds, args.peers, *ceilings(device))

    checks = []
    lines = []
    failures = []
    for case in cases(device, torch.bfloat16):
        # One kernel that fails leaves the others' figures worth having.
        try:
            # Verify. What is wrong is not timed.
            ratio = verify(case)
            checks.append(f"| {case.name} | {ratio:.2f} |")
            if not ratio <= LIMIT:  # NaN fails, too
                failures.append(
                    f"{case.name}: its bf16 error is {ratio:.2f} × PyTorch's own, "
                    "so it was not timed"
                )
                continue

            # Time, forward alone and then both ways.
            for backward in (False, True):
                timed = race(case, backward, settings)
                lines += timed
                print("\n".join(timed), flush=True)
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            failures.append(f"{case.name}: {type(error).__name__}: {message}")
        finally:  # after each case: an interrupted run keeps its figures
            write_results(args.out, settings, checks, lines, failures)

    for failure in failures:
        sys.stderr.write(failure + "\n")
    return 1 if failures else 0


def write_results(path, settings, checks, lines, failures):
    """Write a page of what has been measured so far."""
    heads = (
        "| | pass | | µs | speed | share of the ceiling | its time over the kernel's (p10–p90) |"
    )

    # What it ran on and that machine's ceilings; the errors; the times; what failed.
    text = [
        "# Kernels, measured",
        "",
        f"`python -m kernels.bench` on {torch.cuda.get_device_name()}, "
        f"PyTorch {torch.__version__}, "
        f"Triton {triton.__version__}, {time.strftime('%Y-%m-%d')}. Ceilings of this run: "
        f"copy {settings.copy_speed / 1e3:.0f} GB/s (read + write), "
        f"bf16 product {settings.product_speed / 1e6:.0f} TFLOP/s.",
        "",
        "| | largest error over PyTorch's own, bf16 against float64 |",
        "|---|---|",
        *checks,
        "",
        heads,
        "|---|" + "---|" * 6,
        *lines,
        "",
        *failures,
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    sys.exit(main())
