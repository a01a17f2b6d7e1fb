"""Problems as tensors: Encoded, a problem as token ids, and Batch, some problems at one stage.

Stage k of the curriculum replaces the first k written steps of each problem by latents and leaves
the rest as text (docs/method.md, Stage 1). `collate` is where that happens.

`model` is the ATP of latent.py. Here only its settings matter: c, K, the parts that it has, the ids
of its fillers and of <|end-latent|>, and its longest context.
"""

from dataclasses import dataclass, fields, replace

import torch

from kernels.cross_entropy import IGNORE


class Movable:
    """A base class for dataclasses that hold tensors: they can be moved to a device."""

    def to(self, device):
        """A copy on a device."""
        return replace(self, **{f.name: moved(getattr(self, f.name), device) for f in fields(self)})


class Rows(Movable):
    """A Movable whose tensors all have B rows, one for each chain. `at` chooses some of them."""

    def at(self, rows):
        """A copy with these rows of every tensor."""
        chosen = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if torch.is_tensor(value):
                chosen[f.name] = value[rows]
        return replace(self, **chosen)


def moved(x, device):
    """A tensor, a Movable or a tuple of them on a device. Anything else stays as it is."""
    if isinstance(x, tuple):
        return tuple(moved(part, device) for part in x)
    if isinstance(x, Movable):
        return x.to(device)
    if not hasattr(x, "is_cuda"):
        return x
    if torch.device(device).type == "cuda" and not x.is_cuda:
        # from pinned memory the host need not wait for what the GPU still computes
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


@dataclass
class Encoded:
    """A problem as token ids."""

    # bos question "\n" <|start-latent|>
    prompt: list
    # of each step: step "\n", as the policy writes it
    lines: list
    # of each step: step eos, as the decoder LM φ writes it
    step_texts: list
    # the same of the K-th step and all that follow, joined; [] if there are at most K
    rest_text: list
    # "### " answer eos
    answer: list
    # how many of its ids come before the first that covers a character of the answer
    n_before_answer: int
    # where the problem comes from, "path:line"
    source: str
    # its steps are unknown, which is not the same as having none (n = 0: it must stop at once)
    answer_only: bool = False

    @property
    def length(self):
        """Tokens of the whole problem written out in words."""
        return len(self.prompt) + sum(map(len, self.lines)) + len(self.answer)


def encode(problems, tokenizer, model, answer_only=False, takes_all_steps=False):
    """Encode a list of Problem -> a list of Encoded.

    model: an ATP, for K, c and its context length. answer_only: as in Encoded.

    takes_all_steps: in stage k every problem takes k steps of latents, however few steps it has.
    Raises ValueError if a problem does not fit the model's context at some stage of the curriculum.
    """
    eos = tokenizer.eos[0]
    prompts = tokenizer.prompts([p.question for p in problems])
    answers = tokenizer.encode_answers([p.answer for p in problems])
    steps = [step for p in problems for step in p.steps]
    lines = iter(tokenizer.encode_batch([step + "\n" for step in steps]))
    texts = iter(tokenizer.encode_batch(steps))

    rows = []
    for p, prompt, (answer, n_before_answer) in zip(problems, prompts, answers):
        rest_text = []
        if len(p.steps) > model.K:
            rest_text = tokenizer.encode("\n".join(p.steps[model.K - 1 :])) + [eos]
        row = Encoded(
            prompt=prompt,
            lines=[next(lines) for _ in p.steps],
            step_texts=[next(texts) + [eos] for _ in p.steps],
            rest_text=rest_text,
            answer=answer + [eos],
            n_before_answer=n_before_answer,
            source=p.source,
            answer_only=answer_only,
        )
        check_length(row, p, model, takes_all_steps)
        rows.append(row)
    return rows


def check_length(row, problem, model, takes_all_steps):
    """Raise ValueError if an Encoded row is longer than the model's context at any stage."""
    reasoning = 0
    per_step = model.c if model.fillers is None else model.fillers
    for k in range(model.K + 1):
        n_step = k if takes_all_steps else min(k, len(row.lines))
        reasoning = max(reasoning, per_step * n_step + sum(map(len, row.lines[k:])))
    length = len(row.prompt) + reasoning + 1 + len(row.answer)  # 1: <|end-latent|>
    context = model.policy.cfg.block_size
    if length > context:
        raise ValueError(
            f"{row.source}: the problem is {length} tokens long but the model's context is "
            f"{context}; shorten it: {problem.question[:60]!r}"
        )


# ---- batches -------------------------------------------------------------------------------------


@dataclass
class Text(Movable):
    """What the policy reads after the prompts or the latents of B problems, and writes there.

    It is padded on the right. Fields …_at are indices, a pair of LongTensors (rows, columns). A
    mask would select the same, but the host would wait for a GPU to count its True entries.
    """

    # (B, T) ids to read: <|end-latent|> … answer
    ids: torch.Tensor
    # (B, T) bool, False where padded
    mask: torch.Tensor
    # (B, T) ids to write, IGNORE where padded
    target: torch.Tensor
    # where `target` has an id
    target_at: tuple
    # for distillation: the last position before the answer, of the problems that are distilled
    answer_at: tuple | None = None


@dataclass
class Thinking(Movable):
    """How far B problems think at one stage, and what the two heads are taught there.

    Fields …_at are indices, as in Text.
    """

    # (B,) latents of each row
    n_latent: torch.Tensor
    # (B,) bool: the steps are unknown, so the model decides when to stop; n_latent is the most
    answer_only: torch.Tensor
    # (B,) bool: the candidate after the last latent is labelled "stop"
    has_stop: torch.Tensor
    # most latents of a row
    L: int
    # L, or L + 1 if a row of L latents has a candidate labelled "stop"
    n_candidate: int
    # the used latents, of problems whose steps are known. Without a stop head a problem with fewer
    # steps than min(k, K) has latents past its last step as well
    used_at: tuple
    # the candidates at which the stop head is taught, and (M,) 0 continue, 1 stop
    stop_at: tuple
    stop_label: torch.Tensor


@dataclass
class Steps(Movable):
    """The N steps that must be written from their latents or, in stage 0, from previews."""

    # (N,) the problem of each step
    row: torch.Tensor
    # (N,) which step of that problem it is
    index: torch.Tensor
    # (N, Ts) ids to write, the step's text and eos; IGNORE where padded
    target: torch.Tensor
    # where `target` has an id, indices as in Text
    target_at: tuple
    # of previews: (N,) how many ids of Batch.text π has read when it thinks of the step; else None
    n_before: torch.Tensor | None
    # with --word-dropout: (N, Ts − 1) bool, the words of `target` that are hidden from its writer
    unseen: torch.Tensor | None = None

    def hide(self, unseen):
        """Hide words. unseen: (B, K, ≥ Ts − 1) bool, of these problems, from `draw_unseen`."""
        self.unseen = unseen[self.row, self.index, : self.target.shape[1] - 1]


@dataclass
class Batch(Movable):
    """B problems at one stage. The prompt is padded on the left, so that latents align."""

    # (B, Tq) ids, ending in <|start-latent|>
    prompt: torch.Tensor
    # (B, Tq) bool, False where padded
    prompt_mask: torch.Tensor
    # the latents after the prompts
    thinking: Thinking
    # (B, Tt) what follows the latents
    text: Text
    # what φ learns to write
    steps: Steps
    # for distillation: (B, Tw) the whole problem in words, where its steps are known and some are
    # latent; other rows are masked. None without such a row
    words: Text | None
    # what each loss is a mean over, and "position": how many the policy reads
    counts: dict


def pad(rows, value, left=False):
    """Lists of ids -> (B, T) LongTensor."""
    T = max(map(len, rows), default=0)
    padded = []
    for row in rows:
        padding = [value] * (T - len(row))
        padded.append(padding + row if left else row + padding)
    return torch.tensor(padded, dtype=torch.long).view(len(rows), T)


def left_pad(rows, value, device="cpu"):
    """Prompts -> (ids (B, T), mask (B, T) bool), aligned at their ends."""
    ids = pad(rows, value, left=True)
    T = ids.shape[1]
    length = torch.tensor([len(row) for row in rows])
    mask = torch.arange(T) >= T - length[:, None]
    return ids.to(device), mask.to(device)


def collate(rows, stage, model, distills=False):
    """Encoded rows -> a Batch at a curriculum stage, 0 … K + 1.

    model: an ATP, for c, K and its switches. distills: whether the batch also holds the problems in
    words, from which the latents are taught (in stage 0 there are none).
    """
    # How many of each row's n steps are latent: the first min(n, k)
    n_latent_step = [min(len(row.lines), stage, model.K) for row in rows]
    thinking = thinking_of(rows, n_latent_step, stage, model)

    # What stays text: the later steps and the answer; in the last stage the answer alone
    fillers = model.fillers_at(stage)
    lines = [[] if stage > model.K else row.lines[n:] for row, n in zip(rows, n_latent_step)]
    texts = [fillers + text_of(row, of_row, model) for row, of_row in zip(rows, lines)]
    text = read_and_write(texts, model.end, len(fillers))

    # How many steps of each row φ must write: those that are latent or, with previews, in words
    has_previews = model.previews and stage == 0
    n_written = n_latent_step
    if has_previews:
        n_written = [min(len(row.lines), model.K) for row in rows]
    elif not model.decode:
        n_written = [0] * len(rows)
    steps = steps_of(rows, n_written, stage, model.K, has_previews)

    # The same problems in words, if their steps are known. Without latents there is nothing to
    # teach: the text is the same
    words, distilled = None, []
    if distills and thinking.n_candidate:
        has_teacher = (thinking.n_latent > 0) & ~thinking.answer_only
        distilled = has_teacher.nonzero()[:, 0].tolist()
    if distilled:
        words = in_words(rows, distilled, model)
        text.answer_at = before_answer(rows, texts, distilled)
    n_word = len(words.target_at[0]) if words else 0

    # (Padding is masked, so that any id would do)
    prompt, prompt_mask = left_pad([row.prompt for row in rows], model.end)
    n_position = int(prompt_mask.sum() + thinking.n_latent.sum() + text.mask.sum())
    counts = {
        "enc": len(text.target_at[0]),
        # In stage 0 ids: a mean over ids, like "enc", which it must not outweigh. Later: steps
        "dec": len(steps.target_at[0]) if has_previews else len(steps.target),
        "kl": len(thinking.used_at[0]),
        "stop": len(thinking.stop_at[0]),
        "answer_only": int(thinking.answer_only.sum()),
        "teacher": n_word,
        "distill": len(distilled),
        "position": n_position + n_word,
    }
    return Batch(prompt, prompt_mask, thinking, text, steps, words, counts)


def thinking_of(rows, n_latent_step, stage, model):
    """The Thinking of B Encoded rows; of row b the first n_latent_step[b] steps are latent."""
    c, most_steps = model.c, min(stage, model.K)
    n_latent_step = torch.tensor(n_latent_step)

    # How many latents the steps make. The full length of the stage, if they are not known or there
    # is no stop head that could end the thinking earlier. Fillers are words, in place of latents
    answer_only = torch.tensor([row.answer_only and most_steps > 0 for row in rows])
    takes_all = answer_only | (not model.stop)
    n_latent = c * torch.where(takes_all, most_steps, n_latent_step)
    if model.fillers is not None:
        n_latent.zero_()
    L = int(n_latent.max())

    # A row with fewer steps than min(k, K) is shown one more candidate, and must stop there. That
    # candidate is in column n_latent: of the longest rows alone it needs a column more than L
    has_stop = (n_latent_step < most_steps) & ~takes_all
    n_candidate = L + int((has_stop & (n_latent == L)).any())

    # Which candidates are used and which dropped, of problems whose steps are known (the others
    # have no labels here). The stop head is asked at the first latent of each step
    column = torch.arange(n_candidate)
    used = (column < n_latent[:, None]) & ~answer_only[:, None]  # (B, n_candidate)
    dropped = (column == n_latent[:, None]) & has_stop[:, None]
    stop_at = ((used | dropped) & (column % c == 0)).nonzero(as_tuple=True)
    return Thinking(
        n_latent=n_latent,
        answer_only=answer_only,
        has_stop=has_stop,
        L=L,
        n_candidate=n_candidate,
        used_at=used.nonzero(as_tuple=True),
        stop_at=stop_at,
        stop_label=dropped[stop_at].long(),
    )


def draw_unseen(rows, K, share, generator):
    """Which words of the first K steps of each row are hidden: (B, K, T) bool.

    rows: the WHOLE batch, since T depends on all of them. share: the probability of each word.
    """
    T = max(len(text) for row in rows for text in (*row.step_texts, row.rest_text))
    return torch.rand(len(rows), K, T, generator=generator) < share


def steps_of(rows, n_written, stage, K, has_previews):
    """The Steps of B Encoded rows: of row b the first n_written[b].

    In the last stage the K-th step stands for all that are left.
    """
    pairs = [(b, s) for b, n in enumerate(n_written) for s in range(n)]
    texts = []
    for b, s in pairs:
        stands_for_rest = stage > K and s == K - 1 and rows[b].rest_text
        texts.append(rows[b].rest_text if stands_for_rest else rows[b].step_texts[s])
    target = pad(texts, IGNORE)

    # A preview of the first step is thought right after the prompt, before <|end-latent|>; one of a
    # later step after <|end-latent|> and the steps before it
    n_before = None
    if has_previews and pairs:
        n_ids = [1 + sum(map(len, rows[b].lines[:s])) if s > 0 else 0 for b, s in pairs]
        n_before = torch.tensor(n_ids)

    row, index = torch.tensor(pairs, dtype=torch.long).view(-1, 2).t().contiguous()
    return Steps(row, index, target, (target != IGNORE).nonzero(as_tuple=True), n_before)


def in_words(rows, chosen, model):
    """The chosen ones of some Encoded rows, all of it in words -> a Text; other rows are masked."""
    texts = [[] for _ in rows]
    for b in chosen:
        texts[b] = text_of(rows[b], rows[b].lines, model)
    words = read_and_write(texts, model.end)
    words.answer_at = before_answer(rows, texts, chosen)
    return words


def text_of(row, lines, model):
    """What follows the latents: <|end-latent|>, some lines of an Encoded row, and its answer."""
    return [model.end, *(i for line in lines for i in line), *row.answer]


def read_and_write(texts, padding, n_unlabelled=0):
    """Texts, lists of ids -> a Text.

    padding: the id to read where there is nothing. The first n_unlabelled of each are given to the
    model: nothing is written there (IGNORE).
    """
    ids = pad([text[:-1] for text in texts], padding)  # the last id is written, not read
    n_read = torch.tensor([max(0, len(text) - 1) for text in texts])
    mask = torch.arange(ids.shape[1]) < n_read[:, None]
    target = pad([[IGNORE] * n_unlabelled + text[1 + n_unlabelled :] for text in texts], IGNORE)
    return Text(ids, mask, target, (target != IGNORE).nonzero(as_tuple=True))


def before_answer(rows, texts, chosen):
    """Where a text is about to give the answer: (rows, columns) of the chosen rows.

    It is the last position before the first id that covers a character of the answer.
    """
    columns = []
    for b in chosen:
        first = len(texts[b]) - len(rows[b].answer) + rows[b].n_before_answer
        columns.append(first - 1)
    return torch.tensor(chosen, dtype=torch.long), torch.tensor(columns, dtype=torch.long)


def batches(lengths, batch_size, seed):
    """Yield lists of batch_size indices of problems, without end. lengths: of all problems.

    Each epoch is a new permutation, and the next follows without a gap. The order is taken 16
    batches at a time (fewer, if there are too few problems), and within these, problems of like
    length share a batch, so that little is padding. Where they reach into the next epoch, a batch
    can hold a problem twice. The same seed gives the same order. Without problems, or with a
    batch_size of 0, the lists are empty.
    """
    if not batch_size or not lengths:
        while True:
            yield []

    generator = torch.Generator().manual_seed(seed)
    n_batch = max(1, min(16, len(lengths) // batch_size))
    queue = []
    while True:
        while len(queue) < n_batch * batch_size:
            queue += torch.randperm(len(lengths), generator=generator).tolist()
        pool, queue = queue[: n_batch * batch_size], queue[n_batch * batch_size :]
        pool.sort(key=lambda i: lengths[i])
        for i in torch.randperm(n_batch, generator=generator).tolist():
            yield pool[i * batch_size : (i + 1) * batch_size]
