"""Checkpoints."""

import json
import re
import shutil
from pathlib import Path

from safetensors.torch import save_file

from . import distributed
from .errors import UserError
from .huggingface import read_json, read_tensors, save_model
from .saved import checkpoints, write_folder


def n_bytes(model, optimizer=None):
    """Bytes on disk of a model's parameters and of the optimizer's moments, with a MiB for the tokenizer, JSON and half-filled blocks."""
    moments = (v for state in optimizer.state.values() for v in state.values()) if optimizer else ()
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *moments)) + 2**20


def save_final(out, model, tokenizer):
    """out/final: the directory that `save` writes, by rank 0 alone. Raises NotWritten."""
    if distributed.RANK:
        return
    write_folder(Path(out) / "final", lambda tmp: save_model(tmp, model, tokenizer), n_bytes(model))


def save_checkpoint(out, state, model, tokenizer, optimizer, keep=2):
    """out/checkpoints/{step}: the directory that `save` writes, the optimizer's moments and `state` (JSON: step, seconds …).

    The last `keep` are kept; older ones are removed, and newer ones, which a resume has found broken; what has another name, say a
    copy that a user made, stays. A checkpoint serves --init and sample.py as well as --resume. Rank 0 alone writes. Raises NotWritten.
    """
    if distributed.RANK:
        return

    def write(tmp):
        save_model(tmp, model, tokenizer)
        save_file(
            {
                f"{n}/{k}": v.cpu().contiguous()
                for n, p in model.named_parameters()
                for k, v in optimizer.state.get(p, {}).items()
            },
            tmp / "optimizer.safetensors",
        )
        (tmp / "state.json").write_text(json.dumps(state) + "\n")

    new = Path(out) / "checkpoints" / f"{state['step']:08d}"
    write_folder(new, write, n_bytes(model, optimizer))
    kept = [c for c in checkpoints(out) if c <= new][-keep:]
    ours = {
        c
        for c in new.parent.iterdir()
        if re.fullmatch(r"\d{8}(\.tmp|\.old)?", c.name) and c.is_dir()
    }
    for other in sorted(
        ours - set(kept), reverse=True
    ):  # what a crash left of a name, then the name
        shutil.rmtree(
            other if other.suffix else other.rename(other.with_suffix(".old"))
        )  # never half a checkpoint


def restore(folder, model, optimizer):
    """Put the moments of a checkpoint's folder into optimizer; returns the checkpoint's state. Raises UserError."""
    moments, file = read_tensors(folder, "optimizer")
    for n, p in model.named_parameters():
        mine = {
            k: moments.pop(f"{n}/{k}")
            for k in ("step", "exp_avg", "exp_avg_sq", "momentum")
            if f"{n}/{k}" in moments
        }
        if mine:
            optimizer.state[p] = {
                k: v.to(p.device) for k, v in mine.items()
            }  # the step as well: fused AdamW counts on the device
    if moments:
        raise UserError(
            f"{file}:0: tensor {min(moments)} belongs to no parameter of this model; the checkpoint is of another run"
        )
    return read_json(Path(folder) / "state.json")
