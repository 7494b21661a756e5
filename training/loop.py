"""
One run: learning rate schedule, setup of the method, LLaMA's loss, training loop and log.
"""

import contextlib
import json
import math
import re
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint

import adapter
import baselines
import salora as sl
from data import InputError, need
from data.batching import batch_order, send
from model import DECODER_LINEARS, LETTERS, LINEARS, Decoder
from training import runs
from training.device import PROCESSES, RANK, peak_memory_mb
from training.flags import CUT, NOT_OF_A_RUN, in_words


@contextlib.contextmanager
def noticed_signals():
    """Yields a list that collects SIGINT and SIGTERM by number, so that the step can be finished
    first; a second signal interrupts at once. Only the main thread receives signals."""
    seen = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def schedule(args, lengths, weights, epochs):
    """The plan of a run. lengths: tokens of each training row; weights: of each row in the mean
    loss of a step. warmup and restart are in steps: see lr_factor."""
    rows_per_step = args.batch_size * args.accumulate * PROCESSES
    epoch_steps = math.ceil(len(lengths) / rows_per_step)
    steps = min(math.ceil(epochs * epoch_steps), args.max_steps or math.inf)
    if args.method in CUT and steps == 1:
        raise InputError(f"one step is too few for --method {args.method}: B starts at zero, where "
                         "gates have no gradient")
    end = sl.window_steps(args.window, steps)[1]
    return SimpleNamespace(
        lengths=lengths, weights=weights, epochs=epochs, rows_per_step=rows_per_step,
        epoch_steps=epoch_steps, steps=steps, gated=args.method == "salora",
        budget=args.budget if args.method in CUT and args.price is None else None,
        warmup=math.ceil(args.warmup * steps), restart=end if args.rewarm else steps)


def lr_factor(plan, step):
    """The learning rate as a share of its peak: it rises linearly over the warm-up and falls
    linearly to 0; at restart, when the adapter has been cut, it falls from the peak again."""
    if step >= plan.restart:
        return (plan.steps - step) / (plan.steps - plan.restart)
    fall = (plan.steps - step) / max(plan.steps - plan.warmup, 1)
    return min((step + 1) / max(plan.warmup, 1), fall)


def start_from(args, model, steps):
    """Loads the adapter of --adapter. InputError: the run cannot start from it."""
    load_adapter(model, args.adapter)
    name, ranks = f"--adapter {args.adapter}", set(sl.ranks(model).values()) - {0}
    need(ranks, f"{name}: its target_modules", "empty", "at least one matrix to train")
    need(len(ranks) == 1 or args.method == "lora" or not steps, f"{name}: its rank",
         f"{min(ranks)} to {max(ranks)}",
         "one rank for all matrices, to learn gates; --method lora goes on from it")
    head = [m for part in getattr(model, "head", ()) for m in part.modules()]
    need(not any(isinstance(m, sl.SaLoRALinear) for m in head), f"{name}: its target_modules",
         "one that reaches into the head", "names outside it: the head is trained whole")
    adapted = {id(p) for m in [*head, *sl.adapters(model).values()] for p in m.parameters()}
    others = [path for path, p in model.named_parameters()
              if p.requires_grad and id(p) not in adapted]
    need(not others, f"{name}: its modules_to_save", f"for {', '.join(others)}",
         "only the head")


def install(args, model, steps, seed):
    """Puts the method into the model. Returns its SaLoRA or AdaLoRA object, None if it has none."""
    if args.adapter:
        start_from(args, model, steps)
    letters = args.targets or (DECODER_LINEARS if isinstance(model, Decoder) else LINEARS)
    paths = None if args.adapter else model.target_paths(letters, args.layers)
    for path in args.ranks or ():
        need(path in paths, "--ranks", f"for a matrix {path} too",
             f"the matrices of {args.model}, such as {paths[0]}")
    if args.method == "salora":
        return sl.SaLoRA(
            model, paths, max(steps, 1), r=args.r, alpha=args.alpha, budget=args.budget,
            beta=args.beta, window=args.window if steps else None, seed=seed, gate_lr=args.gate_lr,
            lora_dropout=args.lora_dropout, turn=args.turn, orth_reduction=args.orth_reduction,
            selection=args.selection, fold_gates=args.fold_gates, price=args.price)
    return baselines.install(
        model, args.method, paths, steps, args.r, args.alpha, args.budget, args.beta, args.window,
        getattr(args, "bottleneck", None), getattr(args, "virtual_tokens", None),
        args.lora_dropout, args.ranks)


def settings_of(args, seed, plan, lowrank):
    """All flags of a run with their final values, for result.json and the check of --resume."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_OF_A_RUN}
    settings |= dict(seed=seed, epochs=plan.epochs, processes=PROCESSES)
    if args.method == "salora":
        settings |= dict(selection=lowrank.selection, gate_lr=lowrank.gate_lr)
    if args.adapter:
        settings["r"] = max(m.r for m in lowrank.layers)
    return settings


def announce(args, settings, line):
    """Prints the settings and the line."""
    print("settings: " + " ".join(f"{k}={in_words(v)}" for k, v in settings.items()))
    if args.idle:
        print(f"without effect with --method {args.method}: {', '.join(args.idle)}")
    if settings["tf32"]:
        print("float32 matrices are multiplied in TensorFloat-32 (--no-tf32: full precision)")
    print(line)


def token_losses(model, x, targets, chunk=1024):
    """Cross-entropy in float32 at the n positions of x (b, t, d) with a target other than -100:
    (n,). The vocabulary is large, so only the logits of `chunk` positions are in memory at a time;
    the backward pass computes them again."""
    targets = targets.flatten()
    index = (targets != -100).nonzero().squeeze(1)  # (n,)
    targets = send(targets[index], x.device)  # (n,)
    x = x.flatten(0, 1).index_select(0, send(index, x.device))  # (n, d)

    def losses(x, targets):
        return F.cross_entropy(model.lm_head(x).float(), targets, reduction="none")

    parts = zip(x.split(chunk), targets.split(chunk))
    if not torch.is_grad_enabled():
        return torch.cat([losses(*part) for part in parts])
    return torch.cat([torch.utils.checkpoint.checkpoint(losses, *part, use_reentrant=False)
                      for part in parts])


class Log:
    """Writes log.jsonl, with means over the steps since its last line, the same on the screen, and
    gates.jsonl."""

    def __init__(self, out, plan, device):
        self.file, self.gates, self.plan = out / "log.jsonl", out / "gates.jsonl", plan
        self.sums = torch.zeros(2, device=device)  # loss, task loss since the last line
        self.tokens = self.steps = 0  # since the last line
        self.seconds = 0.0  # of the whole run
        self.restart_clock()

    def restart_clock(self):
        """After an evaluation or a checkpoint, which are not training time."""
        self.start = time.time()

    def state(self):
        """The sums so far of the next line, for a checkpoint."""
        return [*self.sums.tolist(), self.tokens, self.steps]

    def resume(self, step, seconds, state):
        """Continues at `step`; removes the lines of later steps."""
        self.seconds = seconds
        self.sums = torch.tensor(state[:2], device=self.sums.device)
        self.tokens, self.steps = state[2:]
        if RANK:
            return
        for file in (self.file, self.gates):
            kept, text = [], file.read_text() if file.exists() else ""
            for number, line in enumerate(text.splitlines(keepends=True), 1):
                try:
                    if line.endswith("\n") and json.loads(line)["step"] < step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    raise InputError(f"{file}: line {number} is damaged: remove it") from None
            if text:
                runs.write_text(file, "".join(kept))

    @torch.no_grad()
    def write_gates(self, step, salora):
        """About 50 times in the window: P(g > 0) of each triplet, (K, r). The first line is from
        when the window opens, the last from when it closes, with the triplets that stay."""
        now = step + 1  # salora.step
        every, closed = math.ceil((salora.last - salora.first) / 50), now == salora.last
        due = salora.first <= now <= salora.last and (now - salora.first) % every == 0
        if RANK or not (due or closed):
            return

        def rows(values):  # of all matrices: one that --adapter left at rank 0 has zeros
            own = dict(zip(salora.layers, values.tolist()))
            return [own.get(m, [0] * values.shape[1]) for m in sl.adapters(salora.model).values()]

        probability = rows(sl.open_probability(salora.log_theta))
        entry = {"step": step,
                 "density": salora.final_density if closed else salora.density().item(),
                 "open": [[round(p, 3) for p in row] for row in probability]}
        if closed:
            entry["kept"] = rows(salora.select().int())
        with self.gates.open("a") as f:
            f.write(json.dumps(entry) + "\n")

    def write(self, step, lr, lowrank):
        plan = self.plan
        if PROCESSES > 1:
            dist.all_reduce(self.sums)
        loss, task_loss = (self.sums / self.steps).tolist()
        now = time.time()  # tolist() above waits for the device
        speed = self.tokens / (now - self.start)
        self.seconds += now - self.start
        entry = {"step": step, "epoch": round((step + 1) / plan.epoch_steps, 4), "loss": loss,
                 "task_loss": task_loss, "lr": lr, "density": None, "lambda": None, "orth_a": None,
                 "orth_b": None, "tokens_per_second": round(speed, 1)}
        if lowrank:
            with torch.no_grad():
                entry["density"] = lowrank.density().item()
                entry["orth_a"], entry["orth_b"] = (x.item() for x in lowrank.orthogonality())
                if isinstance(lowrank, sl.SaLoRA):
                    entry["lambda"] = lowrank.lam.item()
        for name in ("loss", "density", "lambda", "orth_a", "orth_b"):
            if not math.isfinite(entry[name] or 0):
                if step == 0 and name == "loss":
                    raise InputError(f"the loss is {loss} before any training: --model, --adapter "
                                     "or the data is damaged")
                raise runs.Diverged(
                    f"training diverged: {name} is {entry[name]} at step {step} or in the "
                    f"{self.steps - 1} steps before, with a learning rate of {lr:.3g}. Try a "
                    f"smaller --lr; checkpoints in {self.file.parent} are from before that")
        if RANK == 0:
            with self.file.open("a") as f:
                f.write(json.dumps(entry) + "\n")

        line = f"step {step + 1}/{plan.steps} loss {task_loss:.4f}"
        if plan.gated:
            goal = "" if plan.budget is None else f" (budget {plan.budget:g})"
            line += f" density {entry['density']:.3f}{goal} lambda {entry['lambda']:.3f}"
        left = int(self.seconds / (step + 1) * (plan.steps - step - 1))
        line += f" {speed:.0f} tokens/s, {left // 60}:{left % 60:02d} left"
        if sys.stdout.isatty():
            print(f"\r{line:<100}", end="", flush=True)
        elif step * 20 // plan.steps != (step - self.steps) * 20 // plan.steps:  # 20 lines in all
            print(line, flush=True)
        self.sums.zero_()
        self.tokens = self.steps = 0
        self.restart_clock()


def fit(args, plan, settings, out, model, lowrank, loss_of, evaluate):
    """The training loop. Writes log.jsonl, gates.jsonl and its checkpoint into `out`.
    loss_of(rows): the summed loss of rows, given by number; evaluate(): a list of output arrays on
    the dev rows, and {metric: value}. Returns the trained model's outputs and scores, the scores
    after each epoch, and the seconds it took."""
    device, seed = next(model.parameters()).device, settings["seed"]
    steps, epoch_steps = plan.steps, plan.epoch_steps
    params = [p for p in model.parameters() if p.requires_grad]
    if plan.gated:
        params = lowrank.param_groups(args.lr, args.weight_decay)
    optimizer = torch.optim.AdamW(params, args.lr, weight_decay=args.weight_decay, fused=True)

    # ---- resume, or start over
    log, step, history = Log(out, plan, device), 0, []
    matrices = {path: [m.r, m.scale] for path, m in sl.adapters(model).items()}
    source = runs.source_of(plan, model)
    file = out / runs.CHECKPOINT
    if args.resume and file.exists():
        progress = runs.load_checkpoint(file, optimizer, lowrank, settings, matrices, source)
        step, history = progress["step"], progress["history"]
        log.resume(step, progress["seconds"], progress["open_line"])
        print(f"resumed at step {step} of {steps}")
    else:
        if args.resume:
            print(f"{out}: no checkpoint to resume from, starting at step 0")
        if RANK == 0:
            runs.clear_folder(out)
            log.file.write_text("")

    def checkpoint():
        if RANK == 0:
            runs.save_checkpoint(file, optimizer, lowrank, dict(
                step=step, history=history, seconds=log.seconds, settings=settings,
                matrices=matrices, source=source, open_line=log.state()))
        log.restart_clock()

    # ---- the loop
    log.restart_clock()
    batches, outputs, scores = None, None, None
    model.train()
    with noticed_signals() as stop:
        while step < steps:
            if batches is None or step % epoch_steps == 0:  # the same after a resume
                rng = np.random.default_rng([seed, step // epoch_steps])
                batches = batch_order(plan.lengths, plan.rows_per_step, rng)
            batch = batches[step % epoch_steps]
            # the other groups, log theta and lambda, keep their rate
            optimizer.param_groups[0]["lr"] = args.lr * lr_factor(plan, step)

            torch.manual_seed((seed * steps + step) * PROCESSES + RANK)  # dropout, resumed or not
            total = sum(plan.weights[j] for j in batch)
            # a last batch may have too few rows: the other processes take one that does not count
            share = batch[RANK::PROCESSES] or batch[:1]
            for i in range(0, len(share), args.batch_size):
                if lowrank:
                    lowrank.begin_step()  # draws the step's gates
                part = share[i:i + args.batch_size]
                loss = loss_of(part) * ((RANK < len(batch)) / total)
                log.sums += loss.detach()
                loss = loss * PROCESSES  # average_gradients takes a mean
                if lowrank and i + args.batch_size >= len(share):
                    penalty = lowrank.penalty()  # beta R_orth + lambda (C - b)^2, once a step
                    log.sums[0] += penalty.detach() / PROCESSES
                    loss = loss + penalty
                loss.backward()
            sl.average_gradients(optimizer)
            optimizer.step()
            if lowrank:
                lowrank.end_step(optimizer)  # may turn or cut A and B
            optimizer.zero_grad()
            if plan.gated:
                log.write_gates(step, lowrank)

            log.steps += 1
            log.tokens += sum(plan.lengths[j] for j in batch)
            epoch_end = (step + 1) % epoch_steps == 0 or step + 1 == steps
            save = args.save_every and (step + 1) % args.save_every == 0
            if step % args.log_every == 0 or epoch_end or save:
                log.write(step, optimizer.param_groups[0]["lr"], lowrank)
            step += 1

            # ---- scores after each epoch, and a checkpoint
            if epoch_end:
                outputs, scores = finite(evaluate(), step)
                model.train()
                history.append(dict(step=step, epoch=round(step / epoch_steps, 4), **scores))
                values = ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
                line = f"epoch {step / epoch_steps:.4g}: {values}"
                print(f"\r{line:<100}" if sys.stdout.isatty() else line, flush=True)
            if epoch_end or save:
                checkpoint()
            if stop and step < steps:
                if PROCESSES == 1:
                    log.seconds += time.time() - log.start
                    checkpoint()
                break

        # resumed after the last step, or there are no steps
        if outputs is None and not stop:
            outputs, scores = finite(evaluate(), step)
            history = history or [dict(step=0, epoch=0.0, **scores)]
        if stop:
            raise runs.Stopped(f"stopped at step {step} of {steps}; the same command with --resume "
                               f"--out {args.out} goes on from the last checkpoint", stop[0])
    return outputs, scores, history, log.seconds


def finite(evaluated, step):
    """Returns what evaluate() gave. InputError: an output is not finite."""
    if not all(np.isfinite(values).all() for values in evaluated[0]):
        words = "the model's outputs on the dev rows are not all finite numbers"
        if step:
            raise runs.Diverged(f"{words} after {step} steps: try a smaller --lr")
        raise InputError(f"{words} before any training: --model or --adapter is damaged")
    return evaluated


def count_trainable(model, head_params=0):
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - head_params


def common_result(
        args, plan, settings, model, lowrank, trainable_params, head_params, history, seconds):
    """What every result.json holds besides task and scores. trainable_params: at the start."""
    kept_params = count_trainable(model, head_params)
    rows = len(plan.lengths) * plan.steps / plan.epoch_steps
    return dict(
        trainable_params=trainable_params, kept_params=kept_params, head_params=head_params,
        budget=plan.budget, density=lowrank.final_density if lowrank else None,
        kept_density=kept_params / max(trainable_params, 1), ranks=sl.ranks(model),
        steps=plan.steps, seconds=round(seconds, 2),
        examples_per_second=round(rows / seconds, 1) if seconds else None,
        peak_memory_mb=round(peak_memory_mb(next(model.parameters()).device), 1),
        history=history, command=args.command, settings=settings)


def load_adapter(model, folder):
    """adapter.load, with InputError for whatever is wrong."""
    try:
        return adapter.load(model, folder)
    except (OSError, ValueError) as e:
        raise InputError(f"--adapter {folder}: {str(e).removeprefix(f'{folder}: ')}") from None


def report_ranks(args, result):
    """Prints the budget and the rank map."""
    if args.method in ("salora", "lora-svd") and result["steps"]:
        goal = f"budget {args.budget:.4g}" if args.price is None else f"price {args.price:.4g}"
        gates = ""
        if args.method == "salora":
            gates = f"the gates came to a density of {result['density']:.3f}; "
        print(f"{goal}: {gates}kept {result['kept_params']:,} of {result['trainable_params']:,} "
              f"adapter parameters ({100 * result['kept_density']:.2f} %)")
    if result["ranks"]:
        table = {re.sub(r".*?(\d+\.)(.*)", lambda m: f"{m[1]}W^{LETTERS[m[2]]}", path): rank
                 for path, rank in result["ranks"].items()}  # an lm_head has no layer
        r = result["settings"]["r"]
        origin = "as given by --ranks" if args.ranks else f"from {r} at the start"
        print(f"\nrank of each matrix, {origin}: layers left to right\n\n"
              f"{sl.rank_map(table, r)}")
