"""The decoder LM φ."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minatp.decoder import read_thoughts
from minatp.llama import Llama, LlamaConfig


class WatchCasts(TorchDispatchMode):
    """Inside, notes the address of every tensor that is cast."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.addresses.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


def test_a_frozen_decoder_is_cast_once():
    """autocast keeps its copies of only those weights that require a gradient: without `cast_once`
    a frozen φ would be cast anew for every word.
    """
    cfg = LlamaConfig(
        vocab_size=11,
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        n_embd=8,
        n_inner=12,
        head_dim=4,
        rope_scaling=None,
        bos=0,
        eos=(1,),
    )
    decoder = Llama(cfg).init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), WatchCasts() as casts:
        texts = read_thoughts(decoder, torch.randn(3, 2, 8), eos=-1, max_new=5)
    assert [len(text) for text in texts] == [5, 5, 5]

    matrices = [p.data_ptr() for p in decoder.parameters() if p.dim() == 2]
    assert sorted(a for a in casts.addresses if a in matrices) == sorted(matrices)
    assert not any(p.requires_grad for p in decoder.parameters())
