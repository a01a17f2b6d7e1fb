"""What surrounds a training step, so that train.py need not.

Loading, schedules, logs, checkpoints, resuming, validation and ranks.

Run                a training run; `steps` is the generator that its loop iterates over
GuardedOptimizer   takes no step on a loss or gradient that is not finite
Meter              averages and speed between two log lines
"""

import math
import time
from contextlib import contextmanager

import torch

from kernels import ops

from ..data import collate, draw_unseen
from ..optim import build_optimizer
from ..rollout import Noise
from ..sft import total_loss
from . import checkpoint, distributed, evaluate
from .build import build, n_parameters
from .checks import check_problems, check_start, fingerprint, format_sources
from .device import Doing, autocast, memory_guard, pick_dtype, place, solving_guard
from .errors import NotFinite
from .folder import Log
from .huggingface import load_model
from .saved import newest_checkpoint
from .splits import describe_cut_off, encode_problems, encode_prompts
from .terminal import format_duration, print0, stop_request


class Run:
    """A training run. `start` loads it, `steps` drives its loop, `finish` tests the model."""

    def __init__(self, cfg, splits, device, model=None, tokenizer=None):
        self.cfg, self.splits, self.device = cfg, splits, device
        self.model, self.tokenizer = model, tokenizer
        if model is not None:
            self.settle_dtype()

        # Where the loop is. is_log_due stays True in a dry run, so the KL is computed as well
        self.first_step = 0  # of the current stage
        self.step = 0
        self.is_log_due = True

        # What is being computed, for the message when memory runs out
        remedy = "--batch-size or the size of the model"
        self.between_batches = Doing(f"--stage {cfg.stage}", cfg.batch_size, cfg.block_size, remedy)
        self.doing = self.between_batches

    # ---- before the first step -------------------------------------------------------------------

    def start(self):
        """Load or build the model, encode the problems, restore what a resumed run had.

        Raises UserError.
        """
        cfg = self.cfg

        # The model: of the checkpoint, from --init, or untrained
        saved = newest_checkpoint(cfg.out) if cfg.resume else None
        self.model, self.tokenizer = load_model(saved) if saved else build(cfg, self.splits.train)
        place(self.model, self.device).set_recompute(cfg.recompute)
        self.settle_sizes()
        self.settle_dtype()
        self.optimizer = GuardedOptimizer(build_optimizer(cfg, self.model), self.model, cfg.clip)

        # Restore where a resumed run was; refuse other problems or another start than it had
        self.state = {"step": 0, "seconds": 0.0}
        if saved:
            self.state = checkpoint.restore_optimizer(saved, self.model, self.optimizer.optimizer)
        check_problems(cfg, self.splits, self.state)
        if cfg.stage == "rl":
            self.load_start_model()

        # The log, the averages of a log line that a stop has interrupted, and the encoded problems
        self.log = Log(cfg, self.state)
        self.meter = Meter(self.state.get("meter"), self.state.get("silent", 0))
        self.encode()

    def settle_sizes(self):
        """Give cfg the sizes of the model, which --init may have brought: config.json has them."""
        cfg, model = self.cfg, self.model
        cfg.c, cfg.K = model.c, model.K
        for name in "n_layer n_head n_kv_head n_embd n_inner block_size rope_theta".split():
            setattr(cfg, name, getattr(model.policy.cfg, name))

    def settle_dtype(self):
        """Settle --dtype, which can depend on the model. `with run.autocast:` computes in it."""
        cfg = self.cfg

        # A run from before --dtype existed keeps the dtype that it started with
        if cfg.resume and not cfg.dtype:
            cfg.dtype = "bfloat16" if self.device.type == "cuda" else "float32"

        # config.json records the choice, so that a resumed run keeps it. All ranks take rank 0's:
        # the CPUs of several machines can differ
        cfg.dtype = distributed.broadcast(pick_dtype(cfg.dtype, self.device, self.model))
        self.autocast = autocast(self.device, cfg.dtype)

    def load_start_model(self):
        """Load the SFT model that RL starts from and is compared with; its φ stays frozen."""
        self.start_model = load_model(self.cfg.init)[0].to(self.device)

        # A run that starts records which model this is; a resumed one compares
        self.state.setdefault("start", fingerprint(self.start_model))
        check_start(self.cfg, self.start_model, self.state)
        self.model.decoder.requires_grad_(False)

    def encode(self):
        """Encode all problems and check that they fit the model's context. Raises UserError."""
        cfg, splits, model = self.cfg, self.splits, self.model

        # What the run learns from, and what it is judged on
        self.encode_rows()
        self.check_held_out()
        if cfg.stage == "sft":
            # φ must be allowed to write the longest step, or its readings would be cut short
            for row in self.labelled + self.answers_only:
                lengths = map(len, (*row.step_texts, row.rest_text))
                model.longest = max(model.longest, *lengths)
        else:
            self.encode_questions()
            # validation problems that show how well φ still reads the latents (evaluate.diagnose)
            self.reading_rows = self.encode_problems([p for p in splits.val if p.steps][:200])
            self.reading_at_start = evaluate.reading_nll(self, self.start_model)

    def encode_questions(self):
        """Encode the questions that RL explores."""
        # The built-in task keeps a set of its own for RL
        splits = self.splits
        self.questions = [*splits.train, *splits.answers] if self.cfg.data else splits.answers
        self.prompts = self.encode_prompts(self.questions)

    def check_held_out(self):
        """Find a held-out question that is too long here, not after hours. Raises UserError."""
        # At the last stage: a resumed run must be judged as it was at its start
        cfg = self.cfg
        last_stage = cfg.schedule()[-1][0] if cfg.stage == "sft" else self.model.stage
        _, longest = self.longest_answers(last_stage)
        self.encode_prompts(self.splits.held_out, cfg.max_new or longest)

    def encode_rows(self):
        """Encode the problems whose right answers are used, and settle the length of answers."""
        cfg, splits = self.cfg, self.splits
        self.labelled = self.encode_problems(splits.train)
        uses_answers = cfg.answers_share > 0 if cfg.stage == "sft" else not cfg.no_answers
        self.answers_only = []
        if uses_answers:
            self.answers_only = self.encode_problems(splits.answers, answer_only=True)
        self.held_out = {"validation": self.encode_problems(splits.val)}
        for name, problems in splits.tests.items():
            self.held_out[f"test ({name})"] = self.encode_problems(problems)
        self.settle_max_new()
        if cfg.max_new:
            self.note_cut_off()

    def settle_max_new(self):
        """Settle the most tokens of an answer: --max-new, or all that is needed at this stage.

        max_new: in RL's rollouts. It follows from what the run learns from alone, because the words
        that are drawn depend on it. max_new_held_out: in validation and test.
        """
        longest, longest_held_out = self.longest_answers()
        self.max_new = self.cfg.max_new or longest
        self.max_new_held_out = self.cfg.max_new or longest_held_out

    def longest_answers(self, stage=None):
        """Tokens of the longest right answer: (of what the run learns from, of held-out sets too).

        stage: as in answer_length.
        """
        learned = [*self.labelled, *self.answers_only]
        held_out = [row for rows in self.held_out.values() for row in rows]
        longest = max([16, *(self.answer_length(row, stage) for row in learned)])
        return longest, max([longest, *(self.answer_length(row, stage) for row in held_out)])

    def note_cut_off(self):
        """Print how many right answers are longer than --max-new at the last stage, if any are."""
        # RL answers the questions that it learns from as well
        cfg, sets = self.cfg, dict(self.held_out)
        stage = self.model.stage
        if cfg.stage == "rl":
            sets["training"] = [*self.labelled, *self.answers_only]
        else:
            stage, _ = cfg.schedule()[-1]
        lengths = {
            name: [self.answer_length(row, stage) for row in rows] for name, rows in sets.items()
        }
        note = describe_cut_off(cfg.max_new, lengths)
        if note:
            print0(note)

    def answer_length(self, row, stage=None):
        """Tokens of an Encoded row's right answer, with the steps that are written before it.

        stage: of the curriculum; by default the one that is reached.
        """
        K = self.model.K
        stage = self.model.stage if stage is None else stage
        written = row.lines[stage:] if stage <= K and not row.answer_only else []
        return sum(map(len, written)) + len(row.answer)

    def encode_problems(self, problems, answer_only=False):
        return encode_problems(self.cfg, problems, self.tokenizer, self.model, answer_only)

    def encode_prompts(self, problems, max_new=None):
        return encode_prompts(problems, self.tokenizer, self.model, max_new or self.max_new)

    def announce(self, what, work):
        """Say what the run is: its method, size, work, device and folder."""
        cfg = self.cfg
        print0(
            f"{what}: {n_parameters(self.model):,} parameters, {len(self.tokenizer):,} tokens in "
            f"the vocabulary, {work} on {self.device} in {cfg.dtype}; files in {cfg.out}"
        )

    # ---- the loop --------------------------------------------------------------------------------

    def steps(self, batches, n_step, n_total=None, stage=None):
        """Yield (step, batch) for the n_step steps of a stage; `batches` is an iterator.

        A step is one batch: one step of the optimizer, or in RL --updates-per-batch. Those that a
        resumed run has behind it are skipped. Before each step this sets the learning rate; after
        it, it logs, saves, stops on request and validates, whatever is due.
        n_total: steps of the whole run; defaults to n_step.
        """
        cfg, is_rl, n_restored = self.cfg, self.cfg.stage == "rl", self.state["step"]
        self.n_total, self.stage = n_total or n_step, stage
        peak = cfg.peak_lr(stage)
        # the stage decides how many steps are still written in words
        self.settle_max_new()

        # The run may have been stopped between a checkpoint and the validation that follows it
        if is_rl and (n_restored % cfg.val_every == 0 or n_restored == n_step):
            self.validate(n_restored)

        for i in range(n_step):
            step = self.first_step + i
            is_last = i == n_step - 1

            # A batch is drawn even if it is skipped: the order of the later ones depends on it
            batch = next(batches)
            if step < n_restored:
                continue

            # Before the step
            n_done = step + 1
            self.step = self.optimizer.n_done = step
            self.optimizer.lr = peak * rate_at(i, n_step, cfg.warmup, cfg.lr_schedule)
            self.is_log_due = n_done % cfg.log_every == 0 or is_last
            yield step, batch
            self.doing = self.between_batches

            # After the step: log, save, stop, validate. A validation comes after a checkpoint
            if self.is_log_due:
                self.write_log(n_done)
            is_validation_due = is_rl and (n_done % cfg.val_every == 0 or is_last)
            is_save_due = n_done % cfg.save_every == 0 or is_last or is_validation_due

            # Ranks are signalled at different moments: all stop together, after the same step
            any_stop = distributed.all_reduce({"stop": int(stop_request.requested)}, self.device)[
                "stop"
            ]
            if is_save_due or any_stop:
                self.save(n_done)
                stop_request.check(cfg, any_stop)
            if is_validation_due:
                self.validate(n_done)

        # SFT validates after each stage; again unless that was done before the resume
        self.first_step += n_step
        if not is_rl and self.first_step >= n_restored:
            self.validate(self.first_step)

    def micro_batches(self, rows, stage, step):
        """Split Encoded rows over ranks and micro-batches: yield (Batch, eps_keys, counts).

        eps_keys (B, c·K, 2): of the noise of each latent; None without the VAE. counts: what each
        loss is a mean over, in the WHOLE batch, and "position", how many the policy reads. Every
        row has noise and hidden words of its own. So the split changes nothing.
        """
        cfg, model = self.cfg, self.model

        # Sorted by length, so that little of a micro-batch is padding
        rows = sorted(rows, key=lambda row: len(row.prompt))

        # The noise, and which words φ does not see, go by a row's place in the WHOLE batch. This
        # rank takes its share of them, and of the rows
        keys, unseen = None, None
        if model.vae:
            keys = ops.noise_keys(self.seed_at(step), len(rows), model.c * model.K)
            keys = distributed.shard(keys)
        if model.decode and cfg.word_dropout:
            generator = torch.Generator().manual_seed(self.seed_at(step, stream=3))
            unseen = draw_unseen(rows, model.K, cfg.word_dropout, generator)
            unseen = distributed.shard(unseen)
        rows = distributed.shard(rows)

        # Collate all first, since every loss is divided by the counts of all
        size = cfg.micro_batch or len(rows)
        starts = range(0, len(rows), size)
        distills = step % cfg.distill_every == 0 and cfg.distill > 0
        batches = []
        for i in starts:
            batch = collate(rows[i : i + size], stage, model, distills)
            if unseen is not None:
                batch.steps.hide(unseen[i : i + size])
            batches.append(batch)
        counts = {name: sum(b.counts[name] for b in batches) for name in batches[0].counts}
        counts = distributed.all_reduce(counts, self.device)

        # `doing` says what is on the device while the caller computes it
        for i, batch in zip(starts, batches):
            eps_keys = None if keys is None else keys[i : i + size].to(self.device)
            length = batch.prompt.shape[1] + batch.thinking.L + batch.text.ids.shape[1]
            what = f"sft, stage {stage}, step {step + 1}"
            self.doing = Doing(what, len(batch.prompt), length, "--micro-batch or --batch-size")
            yield batch.to(self.device), eps_keys, counts
        self.doing = self.between_batches

    def memory_guard(self):
        """Inside, running out of memory is OutOfMemory, which says what was being computed."""
        return memory_guard(lambda: self.doing)

    def seed_at(self, step, stream=0):
        """The seed of one step's random draws, the same whether or not the run was resumed.

        stream: 0 SFT's latents, 1 rollouts, 2 the placebo, 3 the words that φ does not see; in
        a run they are independent. (torch's CPU generator takes the low 32 bits of a seed.)
        """
        return self.cfg.seed * 1_000_003 + stream * 333_331 + step

    # ---- logs, checkpoints, validation, test -----------------------------------------------------

    def write_log(self, n_done):
        """One line on the terminal and one record in metrics.jsonl: the averages since the last."""
        # A step that was not taken ends the run here, before its NaN is averaged
        self.optimizer.check()
        means, speed, left = self.meter.flush(self.n_total - n_done)
        record, line = {"step": n_done}, []

        # SFT logs the means of its losses, and L made of them (that of a step with a teacher, if
        # only some steps have one); RL its rewards and the metrics of its updates
        if self.cfg.stage == "sft":
            grad_norm = means.pop("grad_norm")
            ones = dict.fromkeys(means, 1)
            loss = total_loss(means, ones, self.cfg.loss_weights)
            record |= {"stage": self.stage, "loss": loss, **means, "grad_norm": grad_norm}
            line += [f"stage {self.stage}", f"step {n_done:5}/{self.n_total}", f"loss {loss:.4f}"]
            line += [f"{name} {value:.3f}" for name, value in means.items()]
            line += [f"|g| {grad_norm:.2f}"]
        else:
            record |= means
            line += ["rl", f"step {n_done:5}/{self.n_total}"]
            line += [f"{name} {value:.3f}" for name, value in means.items()]

        # Both also log the learning rate and the speed
        record |= {
            "lr": self.optimizer.lr,
            "tokens_per_second": speed,
            "seconds": self.log.seconds(),
        }
        self.log.write(record)
        print0("  ".join([*line, f"{speed:,.0f} tok/s", f"{left} left"]))

    def save(self, n_done):
        """Save a checkpoint, from which --resume continues."""
        # Never save after a step that was refused: the run then ends with the checkpoint before it
        self.optimizer.check()
        self.log.check_in_place()
        self.state |= {"step": n_done, "seconds": self.log.seconds(), "meter": self.meter.state()}
        # The warning of Meter.add then comes when it would have come without a resume
        if self.cfg.stage == "rl":
            self.state["silent"] = self.meter.n_silent
        checkpoint.save_checkpoint(
            self.cfg.out, self.state, self.model, self.tokenizer, self.optimizer.optimizer
        )

    def validate(self, n_done):
        """Measure the validation set after n_done steps, unless it has been measured there."""
        cfg = self.cfg
        if n_done <= self.log.validated:
            return

        # Tokens per second are of training alone, so the meter stands still meanwhile
        with self.meter.paused():
            result = evaluate.measure(self.solve(self.splits.val), self.splits.val)
            if cfg.stage == "rl":
                result |= evaluate.diagnose(self)

        # The validation gets a record of its own in metrics.jsonl
        if cfg.stage == "sft":
            self.log.write({"step": n_done, "stage": self.stage, "validation": result})
            print0(f"stage {self.stage}  validation: {evaluate.describe(result)}")
        else:
            self.log.write({"step": n_done, "validation": result})
            diagnosis = evaluate.describe_diagnosis(result)
            print0(f"rl  validation: {evaluate.describe(result)}; {diagnosis}")

    def solve(self, problems, seed=None, model=None):
        """One Chain per problem: by the mean policy, or sampled if a seed is given.

        Raises Stopped between batches.

        model: the run's own by default.
        """
        cfg, model, max_new = self.cfg, model or self.model, self.max_new_held_out

        # With a seed all of a chain is sampled; without, z = μ and the stops and words are greedy
        prompts = self.tokenizer.prompts([p.question for p in problems])
        noise = None
        if seed is not None:
            noise = Noise.draw(model, len(prompts), max_new, seed, cfg.temperature)

        def stop_if_requested():  # several ranks would each stop at a different batch
            stop_request.check(cfg, stop_request.requested and distributed.WORLD_SIZE == 1)

        guard = solving_guard(prompts, model, max_new, cfg.eval_batch, "--eval-batch")
        with guard, self.autocast:
            return evaluate.solve(
                model,
                self.tokenizer,
                prompts,
                max_new,
                cfg.eval_batch,
                noise=noise,
                after_batch=stop_if_requested,
            )

    def finish(self):
        """Save the model, test it once, write summary.json."""
        # Save the model before the tests begin. `seconds` leaves out the time that they take
        seconds = self.log.seconds()
        self.log.check_in_place()
        checkpoint.save_final(self.cfg.out, self.model, self.tokenizer)
        tests = evaluate.test(self)
        self.log.check_in_place()
        n = len(self.labelled if self.cfg.stage == "sft" else self.questions)
        facts = {"training_problems": n, "data": self.state["data"]}
        self.log.summary(self.cfg, tests, seconds, self.device, **facts)
        self.log.close()


def rate_at(i, n_step, warmup, schedule):
    """The learning rate of step i of a stage of n_step steps, as a share of the peak.

    After a linear warm-up over at most a tenth of the stage, it follows the schedule:

    wsd      the peak for half of the remaining steps, then linearly down to a twentieth (warm-up,
             stable, decay: Hu et al. 2024, arXiv 2404.06395)
    cosine   half a period of a cosine, down to a tenth
    """
    warmup = min(warmup, n_step // 10)
    if i < warmup:
        return (i + 1) / (warmup + 1)
    done = (i - warmup) / max(1, n_step - warmup)
    if schedule == "wsd":
        return 0.05 + 0.95 * min(1, 2 * (1 - done))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


class GuardedOptimizer:
    """An optimizer (optim.py) that takes no step on a loss or a gradient that is not finite.

    Looking at the gradient's norm would make the host wait for the device at every step. So the
    device decides: the optimizer leaves parameters and moments alone where `found_inf` is 1, and
    from the first bad step on it stays 1. `check`, called before every log line and checkpoint,
    where the host waits anyway, then ends the run.
    """

    def __init__(self, optimizer, model, clip):
        self.optimizer, self.model, self.clip = optimizer, model, clip
        self.lr, self.n_done = 0.0, 0  # learning rate of the next step; how many came before it
        self.unchecked = []  # of each step since the last check: (loss and norm, n_done, problems)

        # On a GPU the optimizer's own kernel scales the gradients as it reads them, and clipping
        # needs no pass over all of them
        self.clips_in_step = ops.use_triton(model.device)
        optimizer.found_inf = torch.zeros((), device=model.device)

    def step(self, loss, problems):
        """One step on the gradients in the parameters, summed over ranks and clipped.

        loss: a scalar of all ranks. problems: what it is of; anything with a `source`.
        Returns the gradient's norm, before clipping.
        """
        # Sum over the ranks first: clipping is by the norm of the whole batch's gradient
        distributed.all_reduce_gradients(self.model)
        with_gradient = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient])

        # Clip
        if self.clips_in_step:
            self.optimizer.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1)
        else:
            torch.nn.utils.clip_grads_with_norm_(with_gradient, self.clip, norm)

        # Mark a bad step on the device; once marked, found_inf stays 1
        loss_and_norm = torch.stack((loss.detach().float(), norm))
        is_bad = 1 - loss_and_norm.isfinite().all().float()
        self.optimizer.found_inf = torch.maximum(self.optimizer.found_inf, is_bad)

        # Take the step, with the learning rate that Run.steps has set
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.unchecked.append((loss_and_norm, self.n_done, problems))
        return norm

    def check(self):
        """Raise NotFinite if a step since the last check was not taken, with its problems."""
        steps, self.unchecked = self.unchecked, []
        if not steps:
            return

        # One transfer for all steps since the last check
        values = torch.stack([loss_and_norm for loss_and_norm, _, _ in steps]).tolist()
        for (loss, norm), (_, n_done, problems) in zip(values, steps):
            if not math.isfinite(loss + norm):
                raise NotFinite(
                    f"step {n_done + 1}: loss {loss:g}, gradient norm {norm:g}, so the step was "
                    "not taken; check --lr, --init and the step's problems "
                    f"{format_sources(problems)}"
                )


class Meter:
    """Averages since the last log line, and the speed."""

    def __init__(self, state=None, n_silent=0):
        """state: from `state`, so that the next line after a resume is what it would have been.

        n_silent: how many batches in a row have had next to no signal.
        """
        self.n_silent = n_silent
        self.reset()

        # Go on with a log line that began before the resume; its seconds count as passed
        if state:
            self.total = {name: torch.tensor(value) for name, value in state["total"].items()}
            self.count = state["count"]
            self.n_token, self.n_step = state["n_token"], state["n_step"]
            self.start -= state["seconds"]

    def state(self):
        return {
            "total": {name: float(value) for name, value in self.total.items()},
            "count": self.count,
            "n_token": self.n_token,
            "n_step": self.n_step,
            "seconds": time.perf_counter() - self.start,
        }

    def reset(self):
        self.total, self.count = {}, {}
        self.n_token = self.n_step = 0
        self.start = time.perf_counter()

    @contextmanager
    def paused(self):
        """What runs inside does not count as training time."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def add(self, sums, counts, n_token):
        """Add one step. sums: scalar tensors, left on their device, so that nobody waits for them.

        counts: what each is a mean over; 1 if missing.
        """
        for name, value in sums.items():
            self.total[name] = self.total.get(name, 0) + value.detach()
            self.count[name] = self.count.get(name, 0) + counts.get(name, 1)
        self.n_token += n_token
        self.n_step += 1

        # RL: the share of groups whose rewards differ
        if "signal" in sums:
            self.n_silent = self.n_silent + 1 if sums["signal"] < 0.05 else 0
            if self.n_silent == 50:
                print0(
                    "warning: for 50 batches fewer than 5 % of the groups had rewards that differ, "
                    "so there is little to learn from: look at acc (all right or all wrong?), fmt "
                    "(0: answers do not end), sigma and --spread (do the thoughts differ at all?)"
                )

    def flush(self, n_left):
        """(means, tokens per second, time left for n_left more steps), and start afresh."""
        # Sums over steps by sums of counts: a batch with more words weighs more
        means = {
            name: float(total) / max(1, self.count[name]) for name, total in self.total.items()
        }
        seconds = time.perf_counter() - self.start
        speed = self.n_token / seconds
        left = format_duration(seconds / self.n_step * n_left)
        self.reset()
        return means, speed, left
