"""CUDA graphs: a stand-in records and repeats on a CPU; TRITON_INTERPRET=0 runs the same tests with the real thing, on the GPU."""
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.usefixtures("poison"),
              pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # numpy's: exp of −∞, NaN that a mask drops

from floats import DEVICE, FP32, close, normal
from kernels import graph, linear
from minatp import count, data
from minatp.explain import read_thoughts
from minatp.latent import ATP
from minatp.llama import LlamaConfig
from minatp.rollout import Noise, Rollout, rollout, score, sft_losses


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: calls are recorded and undone, and come again on the same memory with the same numbers."""
    recording = False

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made, self.replays = [], {}, {}, 0

    def launch(self, run, *args, **kwargs):
        with _disable_current_modes():  # of Triton's interpreter
            self.note((args, kwargs))
            self.call(lambda: run(*args, **kwargs))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in count.WAITS, func
        self.note((args, kwargs))
        return self.call(lambda: func(*args, **kwargs or {}))

    def note(self, args):
        for x in tree_leaves(args):
            if isinstance(x, torch.Tensor) and x.data_ptr() and (at := x.untyped_storage().data_ptr()) not in self.made:
                self.before.setdefault(at, (x, x.untyped_storage().clone()))

    def call(self, work):
        result = work()
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (at := x.untyped_storage().data_ptr()) not in self.before:
                self.made[at] = x
        self.calls.append((work, result))
        return result

    def stop(self):
        for x, old in self.before.values():
            x.untyped_storage().copy_(old)
        for x in self.made.values():
            x.untyped_storage().fill_(255)  # NaN

    def replay(self):
        self.replays += 1
        for work, result in self.calls:
            for x, new in zip(tree_leaves(result), tree_leaves(work())):
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    x.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Steps are recorded: on a GPU as CUDA graphs, elsewhere on a Tape. The list of recordings."""
    real, made = graph.record, []

    def record(work, device):
        if device.type == "cuda":
            made.append(real(work, device))
            return made[-1]
        from triton.runtime.interpreter import InterpretedFunction
        tape, run = Tape(), InterpretedFunction.run
        with monkeypatch.context() as patch, tape:
            patch.setattr(Tape, "recording", True)
            patch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: tape.launch(run, *args, **kwargs))
            result = work()
        tape.stop()
        made.append((tape, result))
        return tape, result

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "serves", lambda device: True)
    return made


def test_graphs_can_be_switched_off(monkeypatch):
    assert graph.serves(torch.device("cuda")) and not graph.serves(torch.device("cpu"))
    monkeypatch.setenv("MINATP_GRAPHS", "0")
    assert not graph.serves(torch.device("cuda"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDA error: out of memory")])  # PyTorch's and the driver's
@pytest.mark.parametrize("fails", [1, 2])
def test_a_recording_that_lacks_memory_is_tried_once_more(monkeypatch, fails, error):
    done = []

    def capture(work, device):
        done.append(work)
        if done.count(work) <= fails:
            raise error
        return "graph", "result"

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    if fails == 1:
        assert graph.record("work", None) == ("graph", "result")
    else:
        with pytest.raises(type(error)):
            graph.record("work", None)
    assert done == ["work", "emptied", "work"]


def test_another_failure_of_a_recording_is_not_tried_again(monkeypatch):
    done = []
    monkeypatch.setattr(graph, "capture", lambda work, device: done.append(work) or int("no"))
    with pytest.raises(ValueError):
        graph.record("work", None)
    monkeypatch.setattr(graph, "capture", lambda work, device: done.append(work) or torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        graph.record("work", None)
    assert done == ["work", "work"]


def test_a_tape_replays_on_the_same_memory(tapes):
    counter, x = torch.zeros(1, device=DEVICE), torch.tensor([3.0], device=DEVICE)
    step = graph.Replayed()
    work = lambda x: (counter.add_(1), x * counter)[1]
    found = [float(step(work, x * i)) for i in range(1, 6)]
    assert found == [3.0 * i * i for i in range(1, 6)] and len(tapes) == 1 and float(counter) == 5
    if DEVICE == "cpu":
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            graph.record(lambda: x * float(x), x.device)


def test_replayed_steps_are_the_steps(monkeypatch, tapes):
    """Chains of all lengths, two of a question, and what φ reads in their thoughts; rows leave when half of them are done."""
    cfg = LlamaConfig(vocab_size=12, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_inner=24, head_dim=8, bos=0, eos=(1,))
    model, eos = ATP(cfg, c=2, K=2), 1
    for llama in (model.policy, model.decoder):
        llama.init_weights(torch.Generator().manual_seed(3))
    model.end = 3
    model.to(DEVICE)
    prompt, valid = data.left_pad([[5, 6], [7] * 5], model.end, DEVICE)
    noise = Noise.draw(model, 4, 6, 14).at(slice(None), DEVICE)  # half of the rows end sooner
    other = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(10))[:, :2].to(DEVICE)
    found = {}
    for choice in ("torch", "triton"):
        monkeypatch.setenv("MINATP_KERNELS", choice)
        r = rollout(model, prompt, valid, 6, noise, 2)
        found[choice] = r, read_thoughts(model.decoder, other, eos, 5)
    (want, text), (got, told) = found["torch"], found["triton"]
    assert want.n_latent.tolist() == [0, 4, 4, 0] and want.n_token.tolist() == [6, 3, 6, 6] and list(map(len, text)) == [5, 5, 1, 0]
    assert len(tapes) == 4 and told == text  # recorded anew when half of the rows are left
    for name in ("n_latent", "n_token", "stopped", "token"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("z", "logp_z", "logp_stop", "logp_token"):
        close(getattr(got, name), getattr(want, name), 5 * FP32, name)


class Mixed(ATP):
    """With a module of a reader's own between the hidden state and the latent head: it is trained like the others."""
    def __init__(self, cfg, **switches):
        super().__init__(cfg, **switches)
        self.mix = torch.nn.Linear(cfg.n_embd, cfg.n_embd)

    def propose(self, h, *given, **options):
        return super().propose(self.mix(h), *given, **options)


@pytest.mark.parametrize("vae, least, autocast", [(True, 300, None), (False, 0, None), (True, 10**9, torch.float16)])
def test_a_replayed_chain_has_the_gradients_of_the_plain_one(monkeypatch, tapes, vae, least, autocast):
    """SFT's losses and RL's log-probabilities: chains of 3 and 1 latents, one that the model ends, and two of one prompt."""
    monkeypatch.setattr(linear, "LEAST", least)
    outer, recorded, grad, node = set(), [], torch.autograd.grad, lambda p: torch.autograd.graph.get_gradient_edge(p).node

    def watched(found, wanted, *args, **kwargs):
        """No node of the forward pass, which ran on another stream, may be in what is recorded."""
        if Tape.recording:
            recorded.append(len(wanted))
            assert outer and not outer & set(map(node, wanted))
        return grad(found, wanted, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    cfg = LlamaConfig(vocab_size=20, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_inner=24, head_dim=8, bos=0, eos=(1,))
    model = Mixed(cfg, c=1, K=3, vae=vae, decode=False)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.25)
    model.to(DEVICE).end = 3
    row = lambda n, m, free=False: data.Encoded([5 + n] * (2 + n), [[7, 8]] * m, [[7, 8, 1]] * m, [], [6, 5, 9, 1], "", free=free)
    batch = data.collate([row(3, 3), row(1, 1), row(0, 0, True)], model.K + 1, model).to(DEVICE)
    eps = normal(4, batch.n_candidate, 16)
    prompt, valid = data.left_pad([[5, 6], [7] * 5], model.end, DEVICE)
    ints = partial(torch.tensor, device=DEVICE)
    r = Rollout(normal(4, 3, 16), None, ints([2, 1, 0, 3]), ints([True, False, True, False]), None, ints([[4, 7, 1], [2, -1, -1]] * 2),
                ints([3, 1] * 2), *torch.zeros(3, 4, 3, device=DEVICE), 1.5)
    found = {}
    for choice in ("torch", "triton"):
        monkeypatch.setenv("MINATP_KERNELS", choice)
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            sums = sft_losses(model, batch, eps[:3])
            s = score(model, prompt, valid, r, 2, eps)
        told = [*sums.values(), s.logp_stop, s.logp_token, s.mu]
        loss = sum((i + 1) * x.float().pow(2).sum().sqrt() for i, x in enumerate(told))
        wanted = list(model.named_parameters())
        outer = {node(p) for _, p in wanted}
        times = 1 + (choice == "triton" and least == 300)  # the second time from the same buffers
        for _ in range(times):
            grads = torch.autograd.grad(loss, [p for _, p in wanted], retain_graph=True, allow_unused=True)
        found[choice] = [*zip(map(str, range(9)), told), *((n, g) for (n, _), g in zip(wanted, grads))]
    assert len(tapes) == 2 + 2 * times  # forward once, backward every time, of both
    if DEVICE == "cpu":
        assert len(recorded) == 2 * times and all(tape.replays >= 2 for tape, _ in tapes)
    for (name, want), (_, got) in zip(found["torch"], found["triton"]):
        assert (want is None) == (got is None), name
        if want is not None:
            close(got, want, 10 * FP32 if autocast is None else 4e-2, name)
