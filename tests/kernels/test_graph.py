"""CUDA graphs. On a CPU a stand-in records and replays; TRITON_INTERPRET=0 runs the same tests with
the real thing, on the GPU.
"""

import gc
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kernels import graph, linear, replayed_chain
from kernels.cache import StepCache
from minatp import data
from minatp.chain import Plan, read_prompt, walk
from minatp.decoder import read_thoughts
from minatp.latent import ATP
from minatp.llama import LlamaConfig
from minatp.rl import log_probs
from minatp.rollout import Noise, Rollout, rollout
from minatp.sft import sft_losses
from minatp.tools.count import WAITS

from floats import DEVICE, FP32, close, normal

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.usefixtures("poison"),
    # numpy's warnings, from Triton's interpreter: exp of −∞, NaN that a mask drops
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

EOS = 1
END_OF_THINKING = 3


def tiny_config(vocab_size):
    return LlamaConfig(
        vocab_size=vocab_size,
        n_layer=1,
        n_head=2,
        n_kv_head=1,
        n_embd=16,
        n_inner=24,
        head_dim=8,
        bos=0,
        eos=(EOS,),
    )


# ---- a CUDA graph on a CPU -----------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: calls of PyTorch and Triton are recorded and undone, and
    come again on the same memory with the same numbers.
    """

    recording = False

    def __init__(self):
        super().__init__()
        self.calls = []  # (function without arguments, its result)
        self.before = {}  # storage address -> (tensor, copy of memory older than the recording)
        self.made = {}  # storage address -> tensor in memory that the recording allocated
        self.replays = 0

    def launch(self, run, *args, **kwargs):
        """A launch of a Triton kernel."""
        with _disable_current_modes():  # the interpreter's own calls are not part of the graph
            self.save_before((args, kwargs))
            self.call(lambda: run(*args, **kwargs))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """A call of PyTorch."""
        assert func.overloadpacket not in WAITS, func  # the host must not ask for a number
        self.save_before((args, kwargs))
        return self.call(lambda: func(*args, **kwargs or {}))

    def save_before(self, args):
        """Copy the memory of the tensors in args, unless the recording allocated it."""
        for x in tree_leaves(args):
            if not isinstance(x, torch.Tensor) or not x.data_ptr():
                continue
            storage = x.untyped_storage()
            address = storage.data_ptr()
            if address not in self.made:
                self.before.setdefault(address, (x, storage.clone()))

    def call(self, work):
        result = work()
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                address = x.untyped_storage().data_ptr()
                if address not in self.before:
                    self.made[address] = x
        self.calls.append((work, result))
        return result

    def stop(self):
        """Undo the recording: a graph is recorded without being run."""
        for x, old in self.before.values():
            x.untyped_storage().copy_(old)
        for x in self.made.values():
            x.untyped_storage().fill_(255)  # NaN

    def replay(self):
        self.replays += 1
        for work, result in self.calls:
            for x, new in zip(tree_leaves(result), tree_leaves(work())):
                if not isinstance(x, torch.Tensor):
                    continue
                # (`data`, because autograd does not see what a CUDA graph writes)
                if x.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    x.data.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Steps are recorded: on a GPU as CUDA graphs, elsewhere on a Tape. The list of recordings."""
    real_record = graph.record
    recordings = []

    def record(work, place):
        if DEVICE == "cuda":
            recordings.append(real_record(work, place))
        else:
            recordings.append(record_on_a_tape(work))
        return recordings[-1]

    def record_on_a_tape(work):
        from triton.runtime.interpreter import InterpretedFunction

        tape = Tape()
        run = InterpretedFunction.run

        def launch(*args, **kwargs):
            return tape.launch(run, *args, **kwargs)

        with monkeypatch.context() as patch, tape:
            patch.setattr(Tape, "recording", True)
            patch.setattr(InterpretedFunction, "run", launch)
            result = work()
        tape.stop()
        return tape, result

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "use_graphs", lambda device: True)
    return recordings


def test_a_tape_replays_on_the_same_memory(tapes):
    counter = torch.zeros(1, device=DEVICE)
    x = torch.tensor([3.0], device=DEVICE)

    def work(x):
        counter.add_(1)
        return x * counter

    step = graph.ReplayedStep()
    results = [float(step(work, x * i)) for i in range(1, 6)]
    assert results == [3.0 * i * i for i in range(1, 6)]
    assert len(tapes) == 1
    assert float(counter) == 5

    if DEVICE == "cpu":
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            graph.record(lambda: x * float(x), graph.Place())


# ---- recording -----------------------------------------------------------------------------------


def test_graphs_can_be_switched_off(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert graph.use_graphs(cuda)
    assert not graph.use_graphs(cpu)
    monkeypatch.setenv("MINATP_GRAPHS", "0")
    assert not graph.use_graphs(cuda)


PYTORCH_ERROR = torch.OutOfMemoryError()
DRIVER_ERROR = RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("error", [PYTORCH_ERROR, DRIVER_ERROR])
@pytest.mark.parametrize("n_failures", [1, 2])
def test_a_recording_that_runs_out_of_memory_is_retried_once(monkeypatch, n_failures, error):
    events = []

    def capture(work, place):
        events.append(work)
        if events.count(work) <= n_failures:
            raise error
        return "graph", "result"

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "kept", {"sizes": "a kept chain"})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    if n_failures == 1:
        assert graph.record("work", None) == ("graph", "result")
    else:
        with pytest.raises(type(error)):
            graph.record("work", None)
    assert events == ["work", "emptied", "work"]
    assert not graph.kept


def test_another_failure_of_a_recording_ends_the_process(monkeypatch):
    """It is not retried, and no `except Exception` goes on with a broken allocator."""
    events = []

    def raise_value_error(work, place):
        events.append(work)
        int("no")

    def raise_shape_error(work, place):
        events.append(work)
        torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr(graph, "capture", raise_value_error)
    with pytest.raises(graph.CaptureFailed, match="ValueError while recording: invalid literal"):
        graph.record("work", None)
    monkeypatch.setattr(graph, "capture", raise_shape_error)
    with pytest.raises(graph.CaptureFailed, match="size"):
        graph.record("work", None)
    assert events == ["work", "work"]
    assert not issubclass(graph.CaptureFailed, Exception)


def test_a_recording_gets_the_pool_of_the_last_graph_before_that_one_goes(monkeypatch):
    """CUDA refuses a pool that no graph has any more."""
    n_user = Counter()  # of each pool

    class FakeGraph:
        def capture_begin(self, pool, capture_error_mode):
            assert pool is None or n_user[pool] > 0
            self.name = pool or f"pool {len(n_user)}"
            n_user[self.name] += 1

        def capture_end(self):
            pass

        def pool(self):
            return self.name

        def __del__(self):
            n_user[self.name] -= 1

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    for name, result in (
        ("Stream", stream),
        ("current_stream", stream),
        ("stream", nullcontext()),
        ("memory_reserved", 0),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)

    # the graph of each loop goes when the loop ends, as its step does
    place = graph.Place()
    for _ in range(3):
        graph.capture(lambda: "result", place)
        gc.collect()
    assert n_user == {"pool 0": 1}


def test_rows_leave_a_replayed_batch_if_it_is_large_and_half_of_it_is_done():
    def n_left(n_row, n_done, fixed_shape):
        done = torch.arange(n_row) < n_done
        left = graph.unfinished_rows(done, n_done, fixed_shape)
        return None if left is None else len(left)

    # to record a step of 128 rows anew costs more than 64 fewer rows save
    assert n_left(128, 64, fixed_shape=True) is None
    assert n_left(256, 255, fixed_shape=True) is None
    assert n_left(1280, 639, fixed_shape=True) is None
    assert n_left(1280, 640, fixed_shape=True) == 640

    # without a recording they leave at once
    assert n_left(128, 1, fixed_shape=False) == 127


# ---- rollouts and φ ------------------------------------------------------------------------------


def test_replayed_steps_are_the_steps(monkeypatch, tapes):
    """Chains of all lengths, two of a question, and what φ reads in their thoughts; rows leave when
    half of them are done.
    """
    model = ATP(tiny_config(vocab_size=12), c=2, K=2)
    for llama in (model.policy, model.decoder):
        llama.init_weights(torch.Generator().manual_seed(3))
    model.end = END_OF_THINKING
    model.to(DEVICE)
    monkeypatch.setattr(graph, "FEWEST_ROWS", 2)  # this batch counts as a large one

    prompt, prompt_mask = data.left_pad([[5, 6], [7] * 5], model.end, DEVICE)
    noise = Noise.draw(model, 4, 12, 530).to(DEVICE)  # half of the rows end sooner
    z = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(50))[:, :2].to(DEVICE)

    def rollout_and_texts(choice):
        monkeypatch.setenv("MINATP_KERNELS", choice)
        chains = rollout(model, prompt, prompt_mask, max_new=12, noise=noise, group=2)
        return chains, read_thoughts(model.decoder, z, EOS, 12)

    want, want_texts = rollout_and_texts("torch")
    got, got_texts = rollout_and_texts("triton")

    # the case is what the docstring says
    assert want.n_latent.tolist() == [0, 4, 2, 0]
    assert want.n_token.tolist() == [3, 12, 12, 1]
    assert [len(text) for text in want_texts] == [0, 12, 11, 1]
    # thinking, and two loops of writing that are recorded anew when half of the rows have left
    assert len(tapes) == 5

    assert got_texts == want_texts
    for name in ("n_latent", "n_token", "stopped", "token"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("z", "logp_z", "logp_stop", "logp_token"):
        close(getattr(got, name), getattr(want, name), 5 * FP32, name)


def test_the_memory_of_a_cache_is_free_when_its_loop_ends(monkeypatch, tapes):
    """At once, and not when Python next looks for cycles: nothing tells it that a GPU is full."""
    model = ATP(tiny_config(vocab_size=12), c=2, K=2)
    model.end = END_OF_THINKING
    model.to(DEVICE)
    prompt, prompt_mask = data.left_pad([[5, 6], [7] * 5], model.end, DEVICE)

    caches = []
    make = StepCache.__init__

    def remember(self, *args):
        caches.append(weakref.ref(self))
        make(self, *args)

    monkeypatch.setattr(StepCache, "__init__", remember)
    monkeypatch.setenv("MINATP_KERNELS", "triton")
    gc.disable()
    try:
        rollout(model, prompt, prompt_mask, max_new=4)
        assert len(caches) == 1
        assert caches[0]() is None
    finally:
        gc.enable()


# ---- the chain of latents ------------------------------------------------------------------------


class Mixed(ATP):
    """With a user's own module between the hidden state and the latent head: it is trained like the
    others.
    """

    def __init__(self, cfg, **switches):
        super().__init__(cfg, **switches)
        self.mix = torch.nn.Linear(cfg.n_embd, cfg.n_embd)

    def propose(self, h, *args, **kwargs):
        return super().propose(self.mix(h), *args, **kwargs)


def mixed_model(vae, project=False):
    llama = tiny_config(vocab_size=20)
    model = Mixed(llama, c=1, K=3, vae=vae, project=project, decode=False)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.25)
    model.to(DEVICE).end = END_OF_THINKING
    return model


def sft_batch(model, distills=False):
    """Chains of 3 and 1 latents, and one that the model ends. distills: with their teacher's."""

    def problem(n, n_steps, answer_only=False):
        return data.Encoded(
            prompt=[5 + n] * (2 + n),
            lines=[[7, 8]] * n_steps,
            step_texts=[[7, 8, EOS]] * n_steps,
            rest_text=[],
            answer=[6, 5, 9, EOS],
            n_before_answer=1,
            source="",
            answer_only=answer_only,
        )

    problems = [problem(3, 3), problem(1, 1), problem(0, 0, answer_only=True)]
    return data.collate(problems, model.K + 1, model, distills).to(DEVICE)


def rl_chains():
    """Two chains of each of two prompts: 2, 1, 0 and 3 latents."""
    ints = partial(torch.tensor, device=DEVICE)
    logp_z, logp_stop, logp_token = torch.zeros(3, 4, 3, device=DEVICE)
    return Rollout(
        z=normal(4, 3, 16),
        logvar=None,
        n_latent=ints([2, 1, 0, 3]),
        stopped=ints([True, False, True, False]),
        stop_prob=None,
        token=ints([[4, 7, 1], [2, -1, -1]] * 2),
        n_token=ints([3, 1] * 2),
        logp_z=logp_z,
        logp_stop=logp_stop,
        logp_token=logp_token,
        spread=1.5,
    )


@pytest.fixture
def kept(monkeypatch):
    """The chains that are kept: none yet."""
    monkeypatch.setattr(graph, "kept", {})
    return graph.kept


def autograd_node(p):
    return torch.autograd.graph.get_gradient_edge(p).node


def nodes_behind(outputs):
    """All nodes of autograd that lead to some tensors."""
    found, waiting = set(), [x.grad_fn for x in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [previous for previous, _ in node.next_functions]
    return found


@pytest.mark.parametrize(
    "vae, min_elements, autocast, with_rl, distills",
    [
        (True, 300, None, True, False),
        (False, 0, None, False, False),
        (False, 300, None, False, True),
        (True, 10**9, torch.float16, False, False),
    ],
)
def test_a_replayed_chain_has_the_gradients_of_the_plain_one(
    monkeypatch, tapes, kept, vae, min_elements, autocast, with_rl, distills
):
    """SFT's losses: chains of 3 and 1 latents, and one that the model ends, also with a teacher
    that reads on from the same prompts. RL's log-probabilities: two chains of each prompt. Of the
    batches the first runs, the second is recorded and the third
    replays what is kept, each with other prompts, noise and weights.
    """
    monkeypatch.setattr(linear, "MIN_ELEMENTS", min_elements)
    monkeypatch.setattr(linear, "LONG", 3)  # of the prompt, the chain and the text all are
    monkeypatch.setattr(replayed_chain, "PREFIX", 8)
    monkeypatch.setattr(replayed_chain, "LATENTS", 1)
    model = mixed_model(vae, project=distills)
    batch = sft_batch(model, distills)
    chains = rl_chains()
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())

    # no node of the parameters, which belongs to another stream, may be in what is recorded
    parameter_nodes = {autograd_node(p) for p in parameters}
    n_recorded = 0
    real_grad = torch.autograd.grad

    def watched_grad(outputs, inputs, *args, **kwargs):
        nonlocal n_recorded
        if Tape.recording:
            n_recorded += 1
            assert not parameter_nodes & {autograd_node(x) for x in inputs}
            assert not parameter_nodes & nodes_behind(outputs)
        return real_grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched_grad)

    def values_and_gradients(choice, batch, prompts, eps, n_backward=1):
        monkeypatch.setenv("MINATP_KERNELS", choice)
        prompt, prompt_mask = data.left_pad(prompts, model.end, DEVICE)
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            losses = sft_losses(model, batch, eps[:3])
            values = [*losses.values()]
            if with_rl:
                logp = log_probs(model, prompt, prompt_mask, chains, group=2, eps=eps)
                values += [logp.logp_stop, logp.logp_token, logp.mu]
        loss = sum((i + 1) * x.float().pow(2).sum().sqrt() for i, x in enumerate(values))

        for _ in range(n_backward):
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        labels = [f"value {i}" for i in range(len(values))] + names
        return list(zip(labels, [*values, *grads]))

    bound = 10 * FP32 if autocast is None else 4e-2
    all_prompts = [[[5, 6], [7] * 5], [[8] * 7, [9, 5, 5]], [[6] * 3, [9, 8]]]
    for i, prompts in enumerate(all_prompts if with_rl else all_prompts[:2]):
        # SFT's prompts as well get shorter or longer
        prompt, mask = data.left_pad([prompts[0], prompts[1], [5, 6]], model.end, DEVICE)
        batch = replace(batch, prompt=prompt, prompt_mask=mask)

        # a second backward pass of what is recorded must find the same buffers as the first
        n_backward = 2 if i == 1 and not with_rl else 1
        eps = normal(4, batch.thinking.n_candidate, 16)
        want = values_and_gradients("torch", batch, prompts, eps)
        got = values_and_gradients("triton", batch, prompts, eps, n_backward)
        for (name, wanted), (_, x) in zip(want, got, strict=True):
            assert (wanted is None) == (x is None), name
            if wanted is not None:
                close(x, wanted, bound, f"batch {i}, {name}")

        with torch.no_grad():
            for p in parameters:
                p += 0.02 * torch.randn_like(p)

    # each chain forward and backward
    n_chain = 2 if with_rl else 1
    assert len(tapes) == 2 * n_chain
    if DEVICE == "cpu":
        assert n_recorded == n_chain
        assert [tape.replays for tape, _ in tapes] == ([2, 2, 2, 2] if with_rl else [1, 2])


def gsm8k_like_batches(model, n_batch):
    """Batches of 32 whose questions and steps are about as long as GSM8K's."""
    random = Random(1)
    problems = []
    for _ in range(7000):
        n_prompt = min(220, 18 + round(random.gammavariate(3.5, 11)))
        (n_step,) = random.choices(range(1, 9), [5, 29, 29, 19, 11, 4, 2, 1])
        problems.append(
            data.Encoded(
                prompt=[5] * n_prompt,
                lines=[[7, 8]] * n_step,
                step_texts=[[7, 8, EOS]] * n_step,
                rest_text=[],
                answer=[6, EOS],
                n_before_answer=0,
                source="",
            )
        )
    order = data.batches([row.length for row in problems], 32, seed=1)
    for _ in range(n_batch):
        yield data.collate([problems[i] for i in next(order)], model.K + 1, model)


def test_100_batches_of_gsm8k_need_few_recordings():
    model = ATP(tiny_config(vocab_size=20), c=2, K=10, decode=False)
    model.end = END_OF_THINKING

    # the second batch of a size is recorded, forward and backward
    met = Counter()
    for batch in gsm8k_like_batches(model, 100):
        plan = Plan(batch.thinking.n_latent, batch.thinking.L, batch.thinking.n_candidate)
        P, L, n_candidate = replayed_chain.rounded_up(
            SimpleNamespace(P=batch.prompt.shape[1]), plan
        )
        assert n_candidate == L + 1
        met[P, L] += 1
    n_recording = 2 * sum(n > 1 for n in met.values())
    assert 4 <= n_recording <= 12, met.values()


@pytest.mark.parametrize("limit, n_byte", [("MAX_KEPT", 0), ("MAX_BYTES", 5)])
def test_the_chain_that_is_used_least_recently_goes(monkeypatch, kept, limit, n_byte):
    """If there are too many, or if they hold too much."""
    monkeypatch.setattr(replayed_chain, limit, 2)
    a, b = (replayed_chain.kept_chain(size) for size in "ab")
    b.place.last_graph, b.place.n_byte = "a graph", n_byte
    assert replayed_chain.kept_chain("a") is a
    c = replayed_chain.kept_chain("c")
    assert list(kept.values()) == [a, c]

    # on the stream of the graph that has gone, and with memory of its own
    assert c.place is b.place
    assert (c.place.last_graph, c.place.n_byte) == (None, 0)


def test_a_chain_whose_graph_has_another_batch_refuses_its_backward_pass(monkeypatch, tapes, kept):
    monkeypatch.setenv("MINATP_KERNELS", "triton")
    monkeypatch.setattr(replayed_chain, "PREFIX", 8)
    monkeypatch.setattr(replayed_chain, "LATENTS", 1)
    model = mixed_model(vae=True)
    prompt, mask = data.left_pad([[5, 6]], model.end, DEVICE)
    plan = Plan(torch.ones(1, dtype=torch.long, device=DEVICE), L=1, n_candidate=1)

    def walked():
        latent, _ = walk(model, *read_prompt(model.policy, prompt, mask, room=1), plan)
        return latent.z.sum()

    first, second = walked(), walked()
    with pytest.raises(RuntimeError, match="before the next batch"):
        first.backward()
    second.backward()
