"""A GPU that is not there: what minatp launches on one, counted on a machine without one.

Everything runs on PyTorch's meta device, whose tensors have shapes and no numbers. minatp is made
to take it for a GPU, with bf16 autocast, Triton kernels and CUDA graphs:

operations   each counts as one launch, with its FLOPs and the bytes that it reads and writes
kernels      are specialised for an H100 (sm_90) and counted; they are neither compiled nor run
graphs       what is recorded is counted once, and again at each replay
waits        an operation for which the host waits for the device; and the waits for an event that
             the device has long passed, which cost next to nothing
faults       what a CUDA graph cannot hold: while recording, a wait, anything with a CPU tensor, or
             a kernel that was never launched before; a wait in a region where none is allowed;
             and a batch of products that all read the same matrix
time         by the model of `Clock`

Counts are by region: a part of the computation such as "prompt, forward". What is recorded within
a region has one of its own, with the suffix ", graph".

This replaces parts of torch, Triton and kernels/ for the whole process, and does not undo it, so it
needs a process of its own. It needs Triton, which need not find a GPU. What runs on it: fake.py.
"""

import math
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config as symbolic_shapes
import torch.nn.functional as F
from torch.optim import optimizer as torch_optimizer
from torch.utils import _foreach_utils as foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels import graph, ops

from ..tools import count

META = torch.device("meta")

# Compute capability 9.0, 32 threads in a warp
SM_90 = GPUTarget("cuda", 90, 32)
aten = torch.ops.aten

# Operations that launch nothing
FREE = count.FREE | {aten.detach, aten._unsafe_view, aten.lift_fresh_copy}

# Operations that can move data from one device to another
COPIES = {aten._to_copy, aten.copy_}

# Operations that read or write some rows of their first argument, and not all of it
READ_ROWS = {aten.embedding, aten.index, aten.index_select, aten.gather}
WRITE_ROWS = {aten.index_copy_, aten.index_put_, aten.index_add_, aten.scatter_}

# Operations that write their first argument without reading it
OVERWRITE = {aten.copy_, aten.fill_, aten.zero_}

# Operations that take a shape or a dtype from their first argument, and nothing else
CREATE = {
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
}


# ---- the model of time ---------------------------------------------------------------------------

# An H200, in µs. It is a model and not a measurement, and it is fixed: no constant is changed to
# make a figure look better. The first three were given: what a large copy and a large product
# reach, and the time between two kernels. The other four were chosen once, at commit cf08be8, so
# that eight earlier estimates of its steps come out within 10 %; fake.py has them beside the
# model's.
#
# RAMP is there because of the replayed steps, which have no eager launch, no recording and no wait:
# with GAP alone they would take 0.7, 2.0 and 1.3 ms where 1.24, 3.6 and 2.05 were estimated.
BYTES_PER_US = 4.3e6  # 4.3 TB/s
FLOPS_PER_US = 650e6  # 650 TFLOP/s
GAP = 1.0
RAMP = 2.2  # of a kernel: until its first bytes arrive, and after its last are asked for
EAGER = 8.0  # of the host, to launch one kernel or one graph
RECORD = 50.0  # of the host, to record one launch: 16 ms for a graph of 326
WAIT = 20.0  # of the host, until it has a number that the device has computed


class Clock:
    """The time of host and device, in µs. The host runs ahead until it waits or records."""

    def __init__(self):
        self.host = self.device = 0.0

    @property
    def now(self):
        """When both are done."""
        return max(self.host, self.device)

    def launch(self, duration):
        """A kernel or a graph starts when it has been launched and the one before it has ended."""
        self.host += EAGER
        self.device = max(self.device, self.host) + duration

    def record(self):
        """Recording one launch keeps the host busy, and the device idle once it has caught up."""
        self.host += RECORD

    def wait(self, until):
        """The host waits for the device to reach the time `until`."""
        self.host = max(self.host, until) + WAIT


def duration(n_byte, flops):
    """µs of one kernel on the device."""
    return max(n_byte / BYTES_PER_US, flops / FLOPS_PER_US) + RAMP + GAP


# ---- the device ----------------------------------------------------------------------------------


@dataclass
class Region:
    """What one part of the computation launches."""

    launches: Counter = field(default_factory=Counter)  # by name: "aten.mm", "triton:rotate_kernel"
    bytes: Counter = field(default_factory=Counter)  # read and written, by name
    flops: int = 0  # of products
    us: float = 0.0  # of the device
    n_replay: int = 0  # of a recorded region

    @property
    def times(self):
        """How often it ran: a recorded region runs at each replay, and not while it is recorded."""
        return self.n_replay or 1

    def add(self, name, n_byte, flops):
        self.launches[name] += 1
        self.bytes[name] += n_byte
        self.flops += flops
        self.us += duration(n_byte, flops)


class Specialisation(NamedTuple):
    """One of the variants in which Triton compiles a kernel."""

    kernel: Any  # a JITFunction
    signature: dict  # parameter -> its type, or "constexpr"
    constants: dict  # (index of the parameter,) -> its value
    hints: dict  # (index of the parameter,) -> what is known of it
    options: dict  # num_warps, num_stages, where a launch gives them


class FakeGPU(TorchDispatchMode):
    """Counts every operation inside `with gpu`, and stands in for Triton, autocast and graphs."""

    def __init__(self, no_waits=()):
        """no_waits: the regions in which a wait is a fault."""
        super().__init__()
        self.no_waits = no_waits
        self.faults = []
        self.specialisations = {}  # key -> Specialisation, of all works
        self.path = ["elsewhere"]  # names of the regions that we are in, the innermost last
        self.is_recording = False
        self.autocasts = False
        self.cast_weights = {}  # id of a weight -> (the weight, its copy in bf16)
        self.begin()

    def begin(self):
        """Forget all counts, and start the clock."""
        self.clock = Clock()
        self.regions = {}  # name -> Region
        self.waits = Counter()  # (region, operation)
        self.late_waits = 0  # for what the device did before its last step
        self.n_recording = 0

    def begin_process(self):
        """Forget which kernels were launched and which graphs were kept before, as another process
        would.
        """
        self.launched = set()  # keys of specialisations
        graph.kept.clear()

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

    def count(self, name, n_byte, flops=0):
        """One launch."""
        self.here.add(name, n_byte, flops)
        if self.is_recording:
            self.clock.record()
        else:
            self.clock.launch(duration(n_byte, flops))

    def fault(self, what):
        self.faults.append(f"{what} in {' > '.join(self.path)}")

    # ---- PyTorch's operations ----

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Run it on the meta device, which only works out the shapes
        kwargs = kwargs or {}
        self.check_wait(func, args)
        self.check_product(func, args)
        # (what is given as `out` is only written, and it is the result)
        inputs = tensors_in((args, {**kwargs, "out": None}))
        result = self.run(func, args, kwargs)
        outputs = tensors_in(result)
        self.check_devices(func, inputs, inputs + outputs)

        # Count what touches the device; what works on the CPU alone launches nothing
        on_device = [x for x in inputs + outputs if x.device == META]
        if launches(func) and on_device:
            n_byte = moved(func.overloadpacket, inputs, outputs or written(func, args, kwargs))
            self.count(str(func.overloadpacket), n_byte, flops_of(func, args, kwargs, result))
        return result

    def run(self, func, args, kwargs):
        """The operation's result. The host reads zeros."""
        # PyTorch 2.11 cannot tell the shape of this one, which is written over its first argument
        out = kwargs.get("out")
        if func.overloadpacket == aten.addmm and out is not None and out.device == META:
            return out
        to_host = func.overloadpacket == aten._to_copy and str(kwargs.get("device")) == "cpu"
        if not (to_host and args[0].device == META):
            return func(*args, **kwargs)
        if not kwargs.get("non_blocking"):
            self.wait("a copy to the host")
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)

    def check_wait(self, func, args):
        """Note an operation that asks the device for a number, or for a shape."""
        operation = func.overloadpacket
        waits = operation in count.WAITS
        if operation in count.INDEXED:  # a mask of booleans as an index
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        if waits and any(x.device == META for x in tensors_in(args)):
            self.wait(str(func))

    def check_product(self, func, args):
        """Note a batched product that reads one matrix again for each row of the batch."""
        if func.overloadpacket == aten.bmm:
            for x in args[:2]:
                if len(x) > 1 and x.stride(0) == 0:
                    shape = tuple(x.shape[1:])
                    self.fault(f"a batched product reads a matrix {shape} {len(x)} times")

    def wait(self, operation):
        """The host waits until the device has done all that it was given."""
        self.clock.wait(self.clock.device)
        self.waits[self.path[-1], operation] += 1
        if self.is_recording:
            self.fault(f"{operation} waits for the device while recording")
        elif any(name.startswith(self.no_waits) for name in self.path):
            self.fault(f"{operation} waits for the device")

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

    # ---- Triton's kernels ----

    def launch(self, kernel, *args, **kwargs):
        """Specialise a kernel for its arguments and count it, without compiling or running it."""
        # What JITFunction.run does before it looks for a compiled kernel
        options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
        kwargs["debug"] = False
        kwargs["instrumentation_mode"] = knobs.compilation.instrumentation_mode
        *_, backend, bind = kernel.device_caches[0]
        arguments, specialisation, rest = bind(*args, **kwargs)

        # Each different specialisation is compiled at its first launch, which must not be recorded
        name = kernel.__name__
        key = name, str(specialisation), str(rest)
        if self.is_recording and key not in self.launched:
            self.fault(f"{name} is first specialised while recording")
        self.launched.add(key)
        if key not in self.specialisations:
            packed = kernel._pack_args(backend, dict(kwargs), arguments, specialisation, rest)
            _, signature, constants, hints = packed
            variant = Specialisation(kernel, signature, constants, hints, options)
            self.specialisations[key] = variant

        # The last kernel of a choice reads one block of each row of logits
        tensors = dict(arguments)
        if name == "choose_word_kernel":
            del tensors["logits_ptr"]
        n_byte = sum(map(count.stored, tensors_in(tensors)))

        # The kernels of the cross-entropy multiply (R, D) by (D, V)
        flops = 0
        if name.startswith("linear_nll"):
            flops = 2 * arguments["R"] * arguments["V"] * arguments["D"]
        self.count(f"triton:{name}", n_byte, flops)

    # ---- CUDA graphs ----

    def record(self, work, device):
        """Stands in for kernels.graph.record: (graph, result) of work()."""
        # The work runs once, as a capture does, and is counted apart; FakeGraph counts its replays
        self.n_recording += 1
        outside, self.regions = self.regions, {}
        self.is_recording = True
        try:
            with self.region(f"{self.path[-1]}, graph"):
                result = work()
        finally:
            self.is_recording = False
            recorded, self.regions = self.regions, outside
        return FakeGraph(self, recorded), result

    def of_graph(self, name, region):
        """Where the replays of a recorded region count. Two graphs of one name are kept apart."""
        label, n = name, 1
        while label in self.regions and self.regions[label].launches is not region.launches:
            n += 1
            label = f"{name} {n}"
        return self.regions.setdefault(label, replace(region, n_replay=0))

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

    def __init__(self, gpu, regions):
        self.gpu = gpu
        self.regions = regions
        self.us = sum(region.us for region in regions.values())

    def replay(self):
        self.gpu.clock.launch(self.us)
        for name, region in self.regions.items():
            self.gpu.of_graph(name, region).n_replay += 1


class FakeEvent:
    """A torch.cuda.Event: where the device will be when it has done what it was given so far."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.time = self.gpu.clock.device

    def synchronize(self):
        """The host waits for that, and not for what the device was given since."""
        self.gpu.clock.wait(self.time)
        self.gpu.late_waits += 1


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
    return not count.is_view(func) and func.overloadpacket not in FREE


def moved(operation, inputs, outputs):
    """Bytes that an operation reads and writes: each of its tensors once, with exceptions."""
    if operation in CREATE:
        tensors = outputs
    elif operation in OVERWRITE:
        tensors = inputs[1:] + outputs
    elif operation in READ_ROWS:  # the rows that it returns, and not the others
        tensors = inputs[1:] + 2 * outputs
    elif operation in WRITE_ROWS:  # the rows that come last, which are read and then written
        tensors = inputs[1:] + inputs[-1:]
    else:
        tensors = inputs + outputs
    return sum(count.stored(x) for x in tensors if x.device == META)


def written(func, args, kwargs):
    """The tensors that an operation without a result writes, by its schema."""
    tensors = []
    for argument, value in zip(func._schema.arguments, args):
        # AdamW writes its gradients only if it scales them
        is_kept = argument.name == "grads" and kwargs.get("grad_scale") is None
        if argument.alias_info is not None and argument.alias_info.is_write and not is_kept:
            tensors += tensors_in(value)
    return tensors


def flops_of(func, args, kwargs, result):
    """FLOPs of a product; 0 of all other operations."""
    formula = flop_registry.get(func.overloadpacket)
    if func.overloadpacket == aten.addmm:
        args = args[:3]  # without the dtype of the result
    return formula(*args, **kwargs, out_val=result) if formula else 0


# ---- what is replaced ----------------------------------------------------------------------------


def install(gpu, most_words):
    """Make minatp take the meta device for a GPU. This replaces global names, for good.

    most_words: what the host reads if it asks for a number: how long the longest answer is.
    """
    install_numbers(gpu, most_words)
    install_kernels(gpu)
    install_attention(gpu)
    install_graphs(gpu)
    install_optimizer()
    install_autocast(gpu)


def install_numbers(gpu, most_words):
    """What depends on numbers, which the meta device does not have."""
    # A mask is True everywhere
    symbolic_shapes.meta_nonzero_assume_all_nonzero = True
    real_int, real_tolist = torch.Tensor.__int__, torch.Tensor.tolist

    # The host waits for these two, which run no operation on the meta device
    def as_int(x):
        if x.device != META:
            return real_int(x)
        gpu.wait("int()")
        return most_words

    def tolist(x):
        if x.device != META:
            return real_tolist(x)
        gpu.wait("tolist()")
        return torch.zeros(x.shape, dtype=x.dtype).tolist()

    torch.Tensor.__int__ = as_int
    torch.Tensor.tolist = tolist

    # minatp asks a tensor whether a GPU has it
    torch.Tensor.is_cuda = property(on_fake_gpu)


def on_fake_gpu(x):
    return x.device == META


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


def install_attention(gpu):
    """PyTorch's SDPA under a mask: one fused kernel each way, as on a GPU.

    On the meta device it would be products and a softmax.
    """

    def sdpa(q, k, v, attn_mask, enable_gqa=False):
        # With fewer key heads it has no fused kernel
        n_group = q.shape[1] // k.shape[1]
        if n_group > 1:
            gpu.fault("SDPA with grouped heads and a mask falls back to products and a softmax")
            k = k.repeat_interleave(n_group, 1)
            v = v.repeat_interleave(n_group, 1)

        # The mask becomes numbers to be added to the scores
        zero, hidden = q.new_zeros(()), q.new_full((), -math.inf)
        bias = torch.where(attn_mask, zero, hidden).expand(*q.shape[:3], k.shape[2])
        keeps_lse = torch.is_grad_enabled()
        fused = aten._scaled_dot_product_efficient_attention
        return fused(q, k, v, bias, keeps_lse)[0]

    F.scaled_dot_product_attention = sdpa


def install_graphs(gpu):
    """Steps are recorded; no row is ever known to be done."""

    def use_graphs(device):
        return os.environ.get("MINATP_GRAPHS") != "0"

    # These are looked up at every call, so replacing them reaches all callers
    graph.use_graphs = use_graphs
    graph.record = gpu.record
    torch.cuda.Event = partial(FakeEvent, gpu)


def install_optimizer():
    """PyTorch's foreach and fused kernels serve the meta device, too."""

    def supported():
        return [META.type]

    # one by one where it is defined, and where the optimizers have imported it
    for module in (foreach_utils, torch_optimizer):
        module._get_foreach_kernels_supported_devices = supported
        module._get_fused_kernels_supported_devices = supported


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
