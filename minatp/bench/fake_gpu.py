"""What minatp launches on a GPU, counted on a machine without one.

    python -m minatp.bench.fake_gpu --stage 11 --layers 16    an SFT micro-batch of llama-1b
    python -m minatp.bench.fake_gpu --rl                      a batch of its rollouts

Everything runs on PyTorch's meta device, whose tensors have shapes and no numbers. minatp is made
to take it for a GPU, with bf16 autocast, Triton kernels and CUDA graphs:

operations   each counts as one launch, with the bytes that it reads and writes
kernels      are specialised for an H100 (sm_90) and counted; they are neither compiled nor run
graphs       what is recorded is counted once, and how often it is replayed
waits        an operation for which the host waits for the device
faults       what a CUDA graph cannot hold: while recording, a wait, or anything with a CPU tensor.
             They are printed, and the exit code is 1

Counts are by region: a part of the computation such as "prompt, forward". What is recorded within
a region has one of its own, with the suffix ", graph".

This replaces parts of torch, Triton and kernels/ for the whole process, and does not undo it, so it
needs a process of its own. It needs Triton, which need not find a GPU.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: real kernels, not interpreted

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps

import torch
import torch.fx.experimental._config as symbolic_shapes
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels import graph, ops, replayed_chain

from .. import data, rollout, sft
from ..latent import ATP
from ..llama import Llama
from ..run.build import llama_config
from ..run.errors import UserError, run_command
from ..run.options import PRESETS, Config, Parser
from ..run.terminal import print0
from ..tools import count
from .cases import BETA, MAX_NEW, SIZES, paper_row

META = torch.device("meta")

# Compute capability 9.0, 32 threads in a warp
SM_90 = GPUTarget("cuda", 90, 32)
aten = torch.ops.aten

# Operations that launch nothing
FREE = count.FREE | {aten.detach, aten._unsafe_view, aten.lift_fresh_copy}

# Operations that can move data from one device to another
COPIES = {aten._to_copy, aten.copy_}

# Products whose FLOPs are counted: their factors are the last two tensors among the arguments
PRODUCTS = {aten.mm, aten.bmm, aten.addmm}


def main(argv=None):
    parser = Parser(__doc__, "minatp.bench.fake_gpu")
    add = parser.add_argument
    add("--rl", action="store_true", help="a batch of rollouts, not an SFT micro-batch")
    add("--stage", type=int, default=11, help="stage of the curriculum, 0 … 11 [%(default)s]")
    add("--layers", type=int, default=16, help="of the policy and of the decoder [%(default)s]")
    args = parser.parse_args(argv)
    if args.layers < 1:
        raise UserError(f"command line: --layers must be positive, not {args.layers}")
    model = build_llama_1b(args.layers)
    if not 0 <= args.stage <= model.K + 1:
        raise UserError(f"command line: --stage must be 0 … {model.K + 1}, not {args.stage}")

    # From here on, parts of torch, Triton and kernels/ are replaced
    gpu = FakeGPU()
    install(gpu)
    torch.manual_seed(0)
    model.stage = args.stage

    # A micro-batch or a batch of rollouts, as shapes without numbers
    if args.rl:
        run_rollouts(gpu, model)
    else:
        run_sft(gpu, model)

    # The counts, then what a CUDA graph could not hold
    print_regions(gpu)
    print_kernels(gpu)
    print_operations(gpu)
    for fault in gpu.faults:
        print0(f"FAULT: {fault}")
    return int(bool(gpu.faults))


# ---- the device ----------------------------------------------------------------------------------


@dataclass
class Region:
    """What one part of the computation launches."""

    launches: Counter = field(default_factory=Counter)  # by name: "aten.mm", "triton:rotate_kernel"
    bytes: Counter = field(default_factory=Counter)  # read and written, by name
    flops: int = 0  # of matrix products
    n_replay: int = 0  # of a recorded region

    def add(self, name, tensors):
        self.launches[name] += 1
        self.bytes[name] += sum(map(count.stored, tensors))


class FakeGPU(TorchDispatchMode):
    """Counts every operation inside `with gpu`, and stands in for Triton, autocast and graphs."""

    def __init__(self):
        super().__init__()
        self.regions = {}  # name -> Region
        self.path = ["elsewhere"]  # names of the regions that we are in, the innermost last
        self.waits = Counter()  # (region, operation)
        self.faults = []
        self.specialisations = {}  # of each kernel: the set of its specialisations
        self.is_recording = False
        self.autocasts = False
        self.cast_weights = {}  # id of a weight -> (the weight, its copy in bf16)

    @property
    def here(self):
        """The region that we are in."""
        return self.regions.setdefault(self.path[-1], Region())

    @contextmanager
    def region(self, name):
        """Inside, launches count for the region `name`."""
        self.path.append(name)
        try:
            yield
        finally:
            self.path.pop()

    # ---- PyTorch's operations ----

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Run it on the meta device, which only works out the shapes
        kwargs = kwargs or {}
        self.check_wait(func, args)
        inputs = tensors_in((args, kwargs))
        result = func(*args, **kwargs)
        tensors = inputs + tensors_in(result)
        self.check_devices(func, inputs, tensors)

        # Count what touches the device, and what makes a tensor from nothing
        on_device = [x for x in tensors if x.device == META]
        if launches(func) and (on_device or not inputs):
            self.here.add(str(func.overloadpacket), on_device)
            if func.overloadpacket in PRODUCTS:
                a, b = tensors_in(args)[-2:]
                self.here.flops += 2 * a.numel() * b.shape[-1]
        return result

    def check_wait(self, func, args):
        """Note an operation that asks the device for a number, or for a shape."""
        operation = func.overloadpacket
        waits = operation in count.WAITS
        if operation in count.INDEXED:  # a mask of booleans as an index
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        if waits:
            self.waits[self.path[-1], str(func)] += 1
            if self.is_recording:
                self.fault(f"{func} waits for the device")

    def check_devices(self, func, inputs, tensors):
        """While recording, note a CPU tensor among the inputs, and a copy between devices."""
        if not self.is_recording:
            return
        on_cpu = [x for x in inputs if x.device.type == "cpu"]

        # An operation of CPU tensors alone launches nothing, so only a mixture is a fault
        if on_cpu and len(on_cpu) < len(inputs):
            shapes = [tuple(x.shape) for x in on_cpu]
            self.fault(f"{func} reads CPU tensors of shape {shapes}")
        if func.overloadpacket in COPIES and len({x.device for x in tensors}) > 1:
            self.fault(f"{func} copies between devices")

    def fault(self, what):
        self.faults.append(f"{what} in {' > '.join(self.path)}")

    # ---- Triton's kernels ----

    def launch(self, kernel, *args, **kwargs):
        """Specialise a kernel for its arguments and count it, without compiling or running it."""
        # What JITFunction.run does before it looks for a compiled kernel
        kwargs["debug"] = False
        kwargs["instrumentation_mode"] = knobs.compilation.instrumentation_mode
        *_, bind = kernel.device_caches[0]
        arguments, signature, options = bind(*args, **kwargs)
        constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}

        # Each different specialisation would be compiled once
        name = kernel.__name__
        specialisation = str((signature, constants, options))
        self.specialisations.setdefault(name, set()).add(specialisation)
        self.here.add(f"triton:{name}", tensors_in(arguments))

    # ---- CUDA graphs ----

    def record(self, work, device):
        """Stands in for kernels.graph.record: (graph, result) of work()."""
        # The work runs once, as a capture does; then FakeGraph counts its replays
        name = f"{self.path[-1]}, graph"
        self.is_recording = True
        try:
            with self.region(name):
                result = work()
        finally:
            self.is_recording = False
        return FakeGraph(self.regions[name]), result

    # ---- autocast ----

    def cast(self, x):
        """x as autocast gives it to a product: a weight is cast once, anything else every time."""
        if x.dtype != torch.float32:
            return x

        # autocast keeps copies of leaves that require a gradient, and of nothing else
        if not (x.requires_grad and x.is_leaf):
            return x.to(torch.bfloat16)
        if id(x) not in self.cast_weights:
            with self.region("casts of weights"):
                # the weight is kept as well, so that no other tensor can get its id
                self.cast_weights[id(x)] = x, x.to(torch.bfloat16)
        _, copy = self.cast_weights[id(x)]
        return copy


class FakeGraph:
    """A recorded CUDA graph."""

    def __init__(self, region):
        self.region = region

    def replay(self):
        self.region.n_replay += 1


class FakeDriver:
    """What Triton asks a GPU's driver when it specialises a kernel."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return SM_90

    def is_active(self):
        return True


def tensors_in(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def launches(func):
    """Whether an operation does work: it is no view, and no bare allocation."""
    returns = func._schema.returns

    # A view shares memory with an argument and leaves it as it is. What works in place also shares
    # memory, but writes it
    is_view = bool(returns)
    for value in returns:
        if value.alias_info is None or value.alias_info.is_write:
            is_view = False
    return not is_view and func.overloadpacket not in FREE


# ---- what is replaced ----------------------------------------------------------------------------


def install(gpu):
    """Make minatp take the meta device for a GPU. This replaces global names, for good."""
    # What depends on numbers: a mask is True everywhere, and the longest answer has MAX_NEW words
    symbolic_shapes.meta_nonzero_assume_all_nonzero = True
    real_int = torch.Tensor.__int__

    def most_words(x):
        return MAX_NEW if x.device == META else real_int(x)

    torch.Tensor.__int__ = most_words

    install_kernels(gpu)
    install_graphs(gpu)
    install_autocast(gpu)


def install_kernels(gpu):
    """Triton's kernels run on every device, which means that they are counted."""

    # A launch kernel[grid](…) comes down to this call. The size of the grid is not counted
    def run(kernel, *args, grid, warmup, **kwargs):
        gpu.launch(kernel, *args, **kwargs)

    def use_triton(device, dtype=torch.float32):
        return True

    # The first two let Triton specialise without a GPU; the third makes minatp choose the kernels
    driver.set_active(FakeDriver())
    JITFunction.run = run
    ops.use_triton = use_triton


def install_graphs(gpu):
    """Steps are recorded; no row is ever known to be done."""

    def use_graphs(device):
        return True

    def none_done(self, mask):
        return 0

    # These are looked up in kernels.graph at every call, so replacing them reaches all callers
    graph.use_graphs = use_graphs
    graph.record = gpu.record
    graph.DelayedCount.__call__ = none_done


def install_autocast(gpu):
    """bf16 products over float32 weights. torch.autocast itself knows no meta device."""
    real_linear, real_layer_norm = F.linear, F.layer_norm

    class Autocast:
        """Stands in for torch.autocast. Copies of weights last until the outermost one ends."""

        def __init__(self, device_type=None, dtype=None, enabled=True):
            self.enabled = enabled

        def __enter__(self):
            self.outer = gpu.autocasts
            gpu.autocasts = self.enabled

        def __exit__(self, *_):
            gpu.autocasts = self.outer
            if not self.outer:
                gpu.cast_weights.clear()

    # Outside of autocast these two are torch's own
    def linear(x, weight, bias=None):
        if not gpu.autocasts or x.device != META:
            return real_linear(x, weight, bias)
        bias = None if bias is None else gpu.cast(bias)
        return real_linear(x.to(torch.bfloat16), gpu.cast(weight), bias)

    def layer_norm(x, *args, **kwargs):  # autocast computes it in float32
        return real_layer_norm(x.float() if gpu.autocasts else x, *args, **kwargs)

    # kernels.ops asks these for the dtype of a product
    def is_autocast_enabled(device_type=None):
        return gpu.autocasts

    def get_autocast_dtype(device_type):
        return torch.bfloat16

    torch.autocast = Autocast
    torch.is_autocast_enabled = is_autocast_enabled
    torch.get_autocast_dtype = get_autocast_dtype
    F.linear = linear
    F.layer_norm = layer_norm


def set_region(gpu, owner, name, region=None):
    """Make calls of owner.name count for a region of their own.

    region: its name; by default, that of the region of the call, followed by the function's.
    """
    function = getattr(owner, name)

    @wraps(function)
    def within(*args, **kwargs):
        with gpu.region(region or f"{gpu.path[-1]}: {name}"):
            return function(*args, **kwargs)

    setattr(owner, name, within)


# ---- what runs -----------------------------------------------------------------------------------


def build_llama_1b(n_layer):
    """An ATP of llama-1b's sizes, with so many layers, on the meta device."""
    cfg = Config(**{**PRESETS["llama-1b"], "epochs": "1", "n_layer": n_layer})
    vocab_size = cfg.vocab_size + 3

    # On the meta device its 2.5 billion parameters (at 16 layers) take no memory
    with META:
        model = ATP(llama_config(cfg, vocab_size), **cfg.switches)
    model.end = vocab_size - 1
    return model


def run_sft(gpu, model):
    """The losses and gradients of one micro-batch, at the model's stage of the curriculum."""
    rows = [paper_row(model.end) for _ in range(SIZES["llama-1b"].batch)]
    batch = data.collate(rows, model.stage, model)
    print0(
        f"SFT, stage {model.stage}: {len(rows)} problems, {batch.prompt.shape[1]} tokens of "
        f"question, {batch.text.shape[1]} of text, {batch.L} latents, {batch.n_candidate} "
        f"candidates, {len(batch.step_text)} thoughts to read"
    )

    # All lengths are known. From here on tensors have shapes alone; the noise is keys, as on a GPU
    batch = batch.to(META)
    eps = ops.noise_keys(0, len(rows), model.c * model.K).to(META)

    # The parts that have a region of their own
    set_region(gpu, sft, "read_prompt", "prompt, forward")
    set_region(gpu, sft, "walk", "chain, forward")
    set_region(gpu, sft, "thought_nll", "decoder, forward")
    set_region(gpu, replayed_chain.ReplayedChain, "backward", "chain, backward")

    # One forward and one backward pass, as train.sft_gradients does them
    with gpu:
        with gpu.region("everything else, forward"), torch.autocast("meta"):
            losses = sft.sft_losses(model, batch, eps)
            loss = sft.total_loss(losses, batch.counts, BETA)
        with gpu.region("everything else, backward"):
            loss.backward()


def run_rollouts(gpu, model):
    """One batch of rollouts, whose rows all take the full length."""
    # Questions and noise of a training step
    size = SIZES["llama-1b"]
    rows = [paper_row(model.end) for _ in range(size.questions)]
    prompt, prompt_mask = data.left_pad([row.prompt for row in rows], model.end, META)
    noise = rollout.Noise.draw(model, size.questions * size.G, MAX_NEW, seed=1)
    noise = noise.at(slice(None), META)
    print0(
        f"rollouts, stage {model.stage}: {size.questions} questions × {size.G}, "
        f"{prompt.shape[1]} tokens of question, {MAX_NEW} of answer"
    )

    # The two loops, and the parts of a step in them; the rest of it is bookkeeping
    set_region(gpu, rollout, "read_prompt", "prompt, forward")
    set_region(gpu, rollout, "think", "thinking")
    set_region(gpu, rollout, "write", "writing")
    set_region(gpu, Llama, "step")
    set_region(gpu, Llama, "logits")
    set_region(gpu, ATP, "propose")
    set_region(gpu, ops, "sample")
    with gpu, gpu.region("rollouts"), torch.autocast("meta"):
        rollout.rollout(model, prompt, prompt_mask, MAX_NEW, noise, size.G)


# ---- tables --------------------------------------------------------------------------------------


def print_regions(gpu):
    """A line a region: launches, bytes and FLOPs, waits of the host, and replays of a graph.

    The launches of a graph are those of one replay.
    """
    print0(
        "\nregion                              launches     aten   triton        GB    TFLOP waits"
    )
    for name, region in gpu.regions.items():
        # launches, those of Triton's kernels among them, and how often the host waits
        n_launch = region.launches.total()
        n_triton = sum(n for key, n in region.launches.items() if key.startswith("triton:"))
        n_wait = sum(n for (where, _), n in gpu.waits.items() if where == name)
        replays = f"   {region.n_replay} replays" if region.n_replay else ""
        print0(
            f"{name:34}{n_launch:10,}{n_launch - n_triton:9,}{n_triton:9,}"
            f"{region.bytes.total() / 1e9:10.3f}{region.flops / 1e12:9.3f}{n_wait:6}{replays}"
        )


def print_kernels(gpu):
    """How many specialisations each Triton kernel has: so many are compiled."""
    n = sum(map(len, gpu.specialisations.values()))
    by_kernel = [f"{name} {len(found)}" for name, found in sorted(gpu.specialisations.items())]
    print0(f"\n{n} specialisations of Triton kernels: {', '.join(by_kernel)}")


def print_operations(gpu, n_most=14):
    """A table a region: its operations by bytes. All of a graph's, the first n_most of others."""
    for name, region in gpu.regions.items():
        # what a graph holds is launched again at each replay, so it is shown in full
        shown = region.bytes.most_common(None if ", graph" in name else n_most)
        print0(f"\n{name}")
        for operation, n_byte in shown:
            n_launch = region.launches[operation]
            print0(f"    {operation:34}{n_launch:6,} launches{n_byte / 1e9:10.4f} GB")
    for (name, operation), n in gpu.waits.items():
        print0(f"\nthe host waits {n} × for {operation} in {name}")


if __name__ == "__main__":
    run_command(main)
