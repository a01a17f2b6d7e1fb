"""A run's models on disk: final/, and the checkpoints that a stopped run resumes from.

    OUT/final                    the trained model, as huggingface.save_model writes it
    OUT/checkpoints/00000500     the same after 500 steps, and also
        optimizer.safetensors      the optimizer's moments
        state.json                 the step, the seconds so far, the unfinished averages of the log

A checkpoint is a model too: --init and sample.py accept it. Only rank 0 writes, and saved.py makes
each folder appear all at once.
"""

import json
import re
import shutil
from pathlib import Path

from safetensors.torch import save_file

from . import distributed
from .errors import UserError
from .huggingface import read_json, read_tensors, save_model
from .saved import checkpoints, write_folder

# The newest, and the one before it in case the newest turns out to be broken
KEEP = 2  # checkpoints


def save_final(out, model, tokenizer):
    """Write out/final. Raises NotWritten."""
    if distributed.RANK > 0:
        return

    def write(folder):
        save_model(folder, model, tokenizer)

    write_folder(Path(out) / "final", write, bytes_on_disk(model))


def save_checkpoint(out, state, model, tokenizer, optimizer):
    """Write out/checkpoints/{step} and remove all but the last KEEP checkpoints.

    state: what else a resumed run needs, as JSON: "step" and more. Raises NotWritten.
    """
    if distributed.RANK > 0:
        return

    def write(folder):
        save_model(folder, model, tokenizer)
        save_file(named_moments(model, optimizer), folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps(state) + "\n")

    # Zero-padded, so that names sort by step. Older ones go once this one is on disk
    new = Path(out) / "checkpoints" / f"{state['step']:08d}"
    write_folder(new, write, bytes_on_disk(model, optimizer))
    remove_other_checkpoints(new)


def named_moments(model, optimizer):
    """Return {"parameter/moment": tensor on the CPU} of the optimizer's state."""
    # A parameter that has had no gradient has no moments, as those of φ in RL
    moments = {}
    for name, p in model.named_parameters():
        for moment, value in optimizer.state.get(p, {}).items():
            moments[f"{name}/{moment}"] = value.cpu().contiguous()
    return moments


def bytes_on_disk(model, optimizer=None):
    """Estimate the size of a saved model, with the optimizer's moments if there is one."""
    # AdamW keeps two moments of each parameter, Muon one
    tensors = list(model.parameters())
    if optimizer:
        for state in optimizer.state.values():
            tensors += state.values()
    rest = 2**20  # the tokenizer, JSON and partly filled blocks
    return sum(t.numel() * t.element_size() for t in tensors) + rest


def remove_other_checkpoints(new):
    """Remove all but the last KEEP checkpoints up to `new`, and the remains of interrupted writes.

    Newer checkpoints are removed as well: they are broken, or the run would have resumed from them.
    """
    # A user's own folders and files are neither counted nor removed
    kept = [folder for folder in checkpoints(new.parents[1]) if folder <= new][-KEEP:]
    others = []
    for folder in new.parent.iterdir():
        is_ours = re.fullmatch(r"\d{8}(\.tmp|\.old)?", folder.name) and folder.is_dir()
        if is_ours and folder not in kept:
            others.append(folder)

    # Rename before removing, so that after a kill no half-removed folder has a checkpoint's name.
    # NAME.old and NAME.tmp come before NAME, which then takes the free name NAME.old
    for folder in sorted(others, reverse=True):
        if not folder.suffix:
            folder = folder.rename(folder.with_suffix(".old"))
        shutil.rmtree(folder, ignore_errors=True)  # what is left is tried again after the next one


def restore_optimizer(folder, model, optimizer):
    """Load a checkpoint's moments into the optimizer; return its state.json. Raises UserError."""
    # step, exp_avg and exp_avg_sq are AdamW's, momentum is Muon's (optim.py)
    moments, file = read_tensors(folder, "optimizer")
    for name, p in model.named_parameters():
        state = {}
        for moment in ("step", "exp_avg", "exp_avg_sq", "momentum"):
            key = f"{name}/{moment}"
            if key in moments:
                # also AdamW's step, which the fused version counts on the device
                state[moment] = moments.pop(key).to(p.device)
        if state:
            optimizer.state[p] = state

    # A moment that no parameter has taken shows that the checkpoint is of another model
    if moments:
        raise UserError(
            f"{file}:0: tensor {min(moments)} belongs to no parameter of this model; the "
            "checkpoint is from another run"
        )
    return read_json(Path(folder) / "state.json")
