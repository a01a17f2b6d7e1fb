"""Small runs for tests: in this process, or in one that can be killed; and what of a run must be the same after any accident."""
import json
import multiprocessing
import os
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

import train
from minatp import checkpoint, config

MODEL = Path(__file__).parent / "fixtures" / "conformance" / "policy"  # of Hugging Face's kind
GOOD = '{"question": "q", "steps": ["<<1+1=2>>"], "answer": "2"}'
TINY = ("--n-layer 1 --n-head 2 --n-kv-head 1 --n-embd 16 --n-inner 24 --decoder-layers 1 --K 2 --labelled 60 --answers 20 --val-size 4 --test-size 6 "
        "--batch-size 4 --epochs .27 --log-every 2 --save-every 1 --device cpu").split()
TAUGHT = [*TINY, *"--lr .02 --warmup 5 --epochs .2,.2,.2,2 --save-every 100".split()]  # writes answers, some in form: RL has a signal
TINY_RL = ("--stage rl --labelled 60 --answers 20 --val-size 4 --test-size 6 --batch-size 4 --G 4 --updates 12 --log-every 5 "
           "--save-every 1 --val-every 4 --lr .003 --anchor 0.5 --kl 0.01 --device cpu").split()


def go(*argv, expect=0):
    """train.py in this process."""
    assert guarded(train.main, [str(a) for a in argv]) == expect


def facts(out):
    """What a run of the same options must end with, to the bit: every file of the model and of AdamW, every number told."""
    timed = ("seconds", "tokens_per_second", "test_seconds")

    def exact(x):
        if isinstance(x, dict):
            return {k: exact(v) for k, v in x.items() if k not in timed}
        return [exact(v) for v in x] if isinstance(x, list) else x.hex() if isinstance(x, float) else x

    read = lambda path: json.loads((out / path).read_text())
    last = checkpoint.checkpoints(out)[-1].name
    files = {(d, name): h for d in ("final", f"checkpoints/{last}") for name, h in read(f"{d}/manifest.json")["sha256"].items()}
    assert (f"checkpoints/{last}", "optimizer.safetensors") in files
    del files[f"checkpoints/{last}", "state.json"]  # it holds seconds
    return {"files": files, "state": exact(read(f"checkpoints/{last}/state.json")), "summary": exact(read("summary.json")),
            "metrics": [exact(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]}


# ---- processes ----------------------------------------------------------------------------------------------------------

def processes():
    """Where processes come from: a server that has imported everything once and forks."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", "torch._dynamo"])
    return context


def into(log):
    """Send what this process writes to a file."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)


def training(argv, log, largest_file=None, pause=0.0):
    """The body of a process: train.py with argv. largest_file: bytes, as a full disk would refuse more; pause: seconds a step."""
    into(log)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    gradients = train.sft_gradients
    train.sft_gradients = lambda *a, **k: (time.sleep(pause), gradients(*a, **k))[1]
    sys.exit(guarded(train.main, [str(a) for a in argv]))


def writing(start, out, log, acknowledge):
    """The body of a process that does nothing but save: step n fills the first parameter with n. It tells (n, seconds it took)."""
    into(log)
    model, tokenizer = load_model(start)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    found = checkpoint.checkpoints(out) and checkpoint.newest_checkpoint(out)
    step = checkpoint.restore(found, model, optimizer)["step"] if found else 0
    p = next(model.parameters())
    while True:
        step += 1
        with torch.no_grad():
            p.fill_(float(step))
        began = time.perf_counter()
        checkpoint.save_checkpoint(out, {"step": step}, model, tokenizer, optimizer)
        acknowledge.send((step, time.perf_counter() - began))


@contextmanager
def process(context, body, *args):
    """A running process; killed at the end, if it still runs."""
    p = context.Process(target=body, args=args)
    p.start()
    try:
        yield p
    finally:
        p.kill()
        p.join()
