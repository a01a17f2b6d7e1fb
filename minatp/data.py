"""Text to tensors: problem files, the tokenizer, and Batch, one padded piece of the curriculum."""
import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from kernels.cross_entropy import IGNORE

from .config import UserError
from .latent import END, LATENT, START


@dataclass
class Problem:
    question: str
    steps: list
    answer: str
    at: str = field(default="problem:1", compare=False)  # where it stands, "path:line", for messages


# ---- files --------------------------------------------------------------------------------------------------------------

def read_problems(path, answers=True):
    """Problems of a file. Coconut's JSON list or JSONL of {"question", "steps", "answer"}, or iCoT's `question||steps #### answer`.

    answers False: an answer may be empty, and in JSON left away. Raises UserError with file, line and reason.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}:0: cannot be read ({e.strerror}); give a problem file")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}:0: is not UTF-8 text (byte {e.start}); give JSON, JSONL or iCoT text")
    if not text.strip():
        raise UserError(f"{path}:1: is empty; it needs at least one problem")
    if text.lstrip().startswith("["):
        return list(_json_list(path, text, answers))
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]  # U+2028 may stand inside a JSON string
    read = _json_line if lines[0][1].lstrip().startswith("{") else _icot_line
    return [read(f"{path}:{i}", line, answers) for i, line in lines]


def _json_list(path, text, answers):
    """Problems of a JSON list, one record at a time, so that an error knows the line that its record begins on."""
    decoder, blank = json.JSONDecoder(object_pairs_hook=_once), re.compile(r"[ \t\r\n]*")
    line, at = 1, 0

    def skip(to):  # over blanks from `to`
        nonlocal line, at
        end = blank.match(text, to).end()
        line, at = line + text.count("\n", at, end), end
        return text[at:at + 1]

    if skip(text.index("[") + 1) == "]":
        raise UserError(f"{path}:1: the list is empty; it needs at least one problem")
    while True:
        record, end = _json(f"{path}:{line}", lambda: decoder.raw_decode(text, at), "the file may be truncated")
        yield _record(f"{path}:{line}", record, answers)
        after = skip(end)
        if after == "]":
            break
        if after != ",":
            raise UserError(f"{path}:{line}: expected ',' or ']' after a problem; the file may be truncated")
        skip(at + 1)
    if skip(at + 1):
        raise UserError(f"{path}:{line}: text after the end of the list; give one list a file")


def _json_line(where, line, answers):
    return _record(where, _json(where, lambda: json.loads(line, object_pairs_hook=_once), "each line must be one object"), answers)


def _json(where, read, hint):
    """read(), a JSON value. Raises UserError where it is none, or one that Python refuses: nested too deep, a number too long."""
    try:
        return read()
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: is not valid JSON ({getattr(e, 'msg', e)}); {hint}")


def _once(pairs):
    """The object of a JSON object's pairs. Raises ValueError where a key comes twice: which one counts is anyone's guess."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))!r} stands twice in one object")
    return found


def _record(where, r, answers):
    if not isinstance(r, dict):
        raise UserError(f"{where}: a problem must be an object, not {type(r).__name__}; give question, steps and answer")
    if not answers:
        r = {"answer": "", **r}
    for key, kind, name in (("question", str, "a string"), ("steps", list, "a list of strings"), ("answer", str, "a string")):
        if key not in r:
            raise UserError(f'{where}: "{key}" is missing; a problem has question, steps and answer')
        if not isinstance(r[key], kind):
            raise UserError(f'{where}: "{key}" must be {name}, not {type(r[key]).__name__}')
    for step in r["steps"]:
        if not isinstance(step, str) or not step.strip():
            raise UserError(f'{where}: "steps" must hold non-empty strings, not {step!r}')
    for key in ("question", "answer")[: 1 + answers]:
        if not r[key].strip():
            raise UserError(f'{where}: "{key}" is empty; write it or leave the problem out')
    if any("### " in text for text in (*r["steps"], r["answer"])):
        raise UserError(f'{where}: a step or the answer holds "### ", which begins an answer; write it in another way')
    need_text(where, r["question"], *r["steps"], r["answer"])
    return Problem(r["question"].strip(), [s.strip() for s in r["steps"]], r["answer"].strip(), where)


def need_text(where, *texts):
    """Raises UserError where one holds half a character: what no tokenizer can read."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: {e.object[e.start]!r} is half of a surrogate pair and no text; write the whole character in UTF-8")


ICOT_STEP = re.compile("<<.*?>>")


def _icot_line(where, line, answers):
    question, bar, rest = line.partition("||")
    steps, hashes, answer = rest.partition("####")
    if not bar or not hashes or ICOT_STEP.sub("", steps).strip():
        raise UserError(f"{where}: is not `question||<<…>> <<…>> #### answer`; see README, Llama-3.2-1B and GSM8k-Aug")
    return _record(where, {"question": question, "steps": ICOT_STEP.findall(steps), "answer": answer}, answers)


# ---- tokens -------------------------------------------------------------------------------------------------------------

class Tokens:
    """A tokenizer with the ids that the method needs. Text of a user never becomes a control token."""
    def __init__(self, tokenizer, bos, eos, files=()):
        """tokenizer: a `tokenizers.Tokenizer`; bos: id; eos: ids, the first of which is written; files: {name: bytes} that came beside it."""
        self.tokenizer, self.bos, self.eos, self.files = tokenizer, bos, tuple(eos), dict(files)
        tokenizer.encode_special_tokens = True  # in text, a special token's name is split like any other word
        tokenizer.add_special_tokens([START, LATENT, END, *map(tokenizer.id_to_token, (bos, *eos))])
        self.start, self.latent, self.end = (tokenizer.token_to_id(t) for t in (START, LATENT, END))

    def __len__(self):
        """Smallest embedding that holds every id."""
        return 1 + max(self.tokenizer.get_vocab().values())

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts):
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self.tokenizer.decode([i for i in ids if i not in self.eos], skip_special_tokens=False)

    def prompt(self, question):
        """bos question "\\n" <|start-latent|>"""
        return self.prompts([question])[0]

    def prompts(self, questions):
        return [[self.bos, *ids, self.start] for ids in self.encode_all([q + "\n" for q in questions])]


def train_tokenizer(problems, vocab_size):
    """Tokens of a byte-level BPE learned from problems, at most vocab_size ids with the control tokens.

    A word takes the spaces around it and a number stands alone, so that frequent words and numbers become one token each.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?\p{L}+ ?|\p{N}+|[^\p{L}\p{N}\s]+\s?|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|bos|>", "<|eos|>", START, LATENT, END)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = ["".join((p.question, "\n", *(s + "\n" for s in p.steps), "### ", p.answer)) for p in problems]
    tokenizer.train_from_iterator(texts, trainer)
    return Tokens(tokenizer, bos=0, eos=(1,))


@dataclass
class Encoded:
    prompt: list   # ids: bos question "\n" <|start-latent|>
    lines: list    # per step, ids of step "\n": as the policy writes it
    texts: list    # per step, ids of the step and eos: as the decoder LM writes it
    rest: list     # as texts, the K-th step joined with all that follow; empty where there are not more than K
    answer: list   # ids: "### " answer eos
    at: str        # of the problem
    free: bool = False  # its steps are not known, which is not the same as having none

    @property
    def length(self):
        """Tokens of the problem in words."""
        return len(self.prompt) + sum(map(len, self.lines)) + len(self.answer)


def encode(problems, tokens, K, block_size, free=False, c=1, always=False):
    """Problems -> list of Encoded. free: as in Encoded. Raises UserError where one is longer than the context of block_size tokens at some
    curriculum stage, when the first k steps take c latents each; always: k of them, however few there are."""
    prompts = tokens.prompts([p.question for p in problems])
    answers = tokens.encode_all(["### " + p.answer for p in problems])
    steps = [s for p in problems for s in p.steps]
    lines, texts = iter(tokens.encode_all([s + "\n" for s in steps])), iter(tokens.encode_all(steps))
    out, eos = [], tokens.eos[0]
    for p, q, a in zip(problems, prompts, answers):
        n_step = len(p.steps)
        e = Encoded(q, [next(lines) for _ in range(n_step)],
                    [next(texts) + [eos] for _ in range(n_step)],
                    tokens.encode("\n".join(p.steps[K - 1:])) + [eos] if n_step > K else [], a + [eos], p.at, free)
        thinking = max(c * (k if always else min(k, n_step)) + sum(map(len, e.lines[k:])) for k in range(K + 1))
        length = len(e.prompt) + thinking + 1 + len(e.answer)
        if length > block_size:
            raise UserError(f"{p.at}: is {length} tokens long and the model's context is {block_size}; shorten it: {p.question[:60]!r}")
        out.append(e)
    return out


# ---- batches ------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """One batch at one curriculum stage. The prompt is left-padded, so that latents align; what follows is right-padded."""
    prompt: torch.Tensor        # (B, Tq) ids, ending in <|start-latent|>
    prompt_valid: torch.Tensor  # (B, Tq) bool
    n_latent: torch.Tensor      # (B,) latents used
    asks: torch.Tensor          # (B,) bool: a candidate after the last one, labelled "stop"
    free: torch.Tensor          # (B,) bool: no steps are known, so the model decides when to stop; n_latent is the most
    tail: torch.Tensor          # (B, Tt) ids read after the latents: <|end-latent|> … answer
    target: torch.Tensor        # (B, Tt) ids to write there, IGNORE where padded
    thought_row: torch.Tensor   # (N,) problem of each latent step that has a text
    thought_step: torch.Tensor  # (N,) which step of it
    thought: torch.Tensor       # (N, Ts) the step's text and eos, IGNORE where padded
    L: int                      # most latents of a row
    n_candidate: int            # L, and one more where a row of L latents asks
    counts: dict                # what each loss is a mean over

    def to(self, device):
        return Batch(**{f.name: v.to(device) if torch.is_tensor(v := getattr(self, f.name)) else v for f in fields(self)})


def pad(rows, value, left=False):
    """Lists of ids -> (B, T) LongTensor."""
    T = max(map(len, rows), default=0)
    return torch.tensor([[value] * (T - len(r)) + r if left else r + [value] * (T - len(r)) for r in rows],
                        dtype=torch.long).view(len(rows), T)


def left_pad(rows, value, device="cpu"):
    """Prompts -> (ids (B, T), valid (B, T) bool), aligned at their ends."""
    ids = pad(rows, value, left=True)
    n = torch.tensor([len(r) for r in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) >= ids.shape[1] - n[:, None]).to(device)


def collate(rows, stage, model):
    """Batch of Encoded `rows` at a curriculum stage (0 … K+1). model: ATP, for c, K, its switches and <|end-latent|>."""
    c, K = model.c, model.K
    cap = min(stage, K)
    n_step = [min(len(r.lines), cap) for r in rows]
    free = torch.tensor([r.free and cap > 0 for r in rows])
    n_latent = torch.tensor([c * (cap if f or not model.stop else n) for n, f in zip(n_step, free.tolist())])
    asks = torch.tensor([model.stop and n < cap for n in n_step]) & ~free
    last = stage > K  # the last stage: nothing stays text, the K-th step stands for all that are left
    tails = [[model.end, *(i for line in ([] if last else r.lines[n:]) for i in line), *r.answer] for r, n in zip(rows, n_step)]
    thoughts = [(b, s, r.rest if last and s == K - 1 and r.rest else r.texts[s])
                for b, (r, n) in enumerate(zip(rows, n_step)) for s in range(n)] if model.decode else []
    tail = pad(tails, model.end)
    target = pad([t[1:] for t in tails], IGNORE)
    prompt, prompt_valid = left_pad([r.prompt for r in rows], model.end)
    L = int(n_latent.max())
    counts = {"enc": sum(len(t) - 1 for t in tails), "dec": len(thoughts), "kl": int(n_latent[~free].sum()),
              "stop": int(sum(n_step) + asks.sum()), "free": int(free.sum())}
    return Batch(prompt, prompt_valid, n_latent, asks, free,
                 tail[:, :-1], target, torch.tensor([b for b, _, _ in thoughts], dtype=torch.long),
                 torch.tensor([s for _, s, _ in thoughts], dtype=torch.long), pad([t for _, _, t in thoughts], IGNORE),
                 L, L + int((asks & (n_latent == L)).any()), counts)


def batches(lengths, batch_size, seed):
    """Endless index lists of batch_size problems (empty ones where there is none), lengths being theirs: a new order each epoch,
    nothing repeated within one, the same for the same seed. The last, short batch of an epoch is filled from the next.

    Among every 16 batches' worth, problems of like length go together, so that little is padding.
    """
    g = torch.Generator().manual_seed(seed)
    queue, n_pool = [], max(1, min(16, len(lengths) // max(1, batch_size)))
    if not batch_size or not lengths:
        while True:
            yield []
    while True:
        while len(queue) < n_pool * batch_size:
            queue += torch.randperm(len(lengths), generator=g).tolist()
        pool, queue = sorted(queue[:n_pool * batch_size], key=lambda i: lengths[i]), queue[n_pool * batch_size:]
        for i in torch.randperm(n_pool, generator=g).tolist():
            yield pool[i * batch_size:(i + 1) * batch_size]
