"""What happens after each step's updates: metrics, evaluation, log, checkpoint, an end if need be.

Also where a run begins: at its first step, or after a checkpoint.
"""
from __future__ import annotations

import os
import time

from evaluate import evaluate_held_out
from model import save_model
from support import parallel, runlog
from support.checkpoint import State, load_checkpoint, newest_checkpoint, save_checkpoint
from support.common import InputError
from support.cpu import give_back_freed_memory
from support.lora import whole_model
from support.memory import peak_bytes
from support.options import learning_rate
from support.policy import refresh_policy


class Record:
    """The steps of a run, and what is kept of them. train.train calls `measure`, `evaluate_if_due`,
    `write`, `save_if_due` and `end_if_need_be` once a step, in this order.

    run: a train.Run. log(kind, record) writes a line of metrics.jsonl or samples.jsonl. stopping()
    says whether somebody has asked to stop. `state` is where the run stands."""
    def __init__(self, run, log, checkpoint: str | None, stopping):
        self.run = run
        self.log = log
        self.stopping = stopping
        self.warned = False    # of responses that never end
        self.tokenizer_files = os.path.join(run.config.out, "tokenizer")
        self.bf16_change = runlog.Bf16Change(run.master)    # before `resume`: the start's weights
        self.state = State()
        if checkpoint:
            self.resume(checkpoint)
        else:
            metrics = evaluate_held_out(run, 0)
            log("metrics", {"step": 0, **metrics})
            self.state.before = self.state.after = metrics.get("eval/mean")

    def resume(self, checkpoint: str) -> None:
        """Weights, moments and state as they were."""
        run = self.run
        self.state = load_checkpoint(checkpoint, run.master, run.optimizer)
        refresh_policy(run.policy, run.master)
        if self.state.step > run.config.steps:
            raise InputError(f"--steps {run.config.steps}: the run in {run.config.out} is at step "
                             f"{self.state.step} already")
        if self.last:    # nothing is left to do, but the model may be gone, or of other --steps
            self.save_model()
            self.refuse_bad_gradients()

    @property
    def last(self) -> bool:
        return self.state.step == self.run.config.steps

    def due(self, every: int) -> bool:
        return self.last or (every > 0 and self.state.step % every == 0)

    def steps(self):
        """The number of each step, from 0, with a progress bar and a clock for each."""
        self.bar = runlog.progress_bar(self.run, self.state.step)
        for step in self.bar:
            self.times = {"begin": time.perf_counter()}
            yield step

    def tick(self, what: str) -> None:
        """The step's "sample", or its "update", is done."""
        self.times[what] = time.perf_counter()

    def measure(self, rollouts: list, items: list, learned) -> None:
        """The step's metrics, over all processes. From here on state.step counts this step too."""
        config = self.run.config
        self.state.step += 1
        self.report = runlog.gather_step(
            self.run, self.state.step, rollouts, items, learned, self.stopping())
        began, sampled, updated = (self.times[key] for key in ("begin", "sample", "update"))
        self.metrics = self.report.metrics | {
            "update/lr": learning_rate(self.state.step - 1, config),
            "update/bf16_changed": self.bf16_change.share(),
            "time/sample": sampled - began,
            "time/update": updated - sampled,
            "time/tokens_per_second": self.report.tokens / (updated - began),
            "memory/peak_gib": peak_bytes(self.run.master.device) / 2**30,
        }
        bad = self.metrics["update/not_finite"] > 0
        self.state.bad_steps = self.state.bad_steps + 1 if bad else 0

    def evaluate_if_due(self) -> None:
        """After the last step the model is saved first: an evaluation may fail."""
        if self.last:
            self.save_model()
        if self.due(self.run.config.eval_every):
            self.refuse_lost()
            self.metrics |= evaluate_held_out(self.run, self.state.step)
            self.state.note_evaluation(self.metrics.get("eval/mean"))

    def write(self) -> None:
        """The step's lines. Before the checkpoint: --resume cuts off extra lines of the log, but
        it could not write missing ones."""
        self.log("metrics", self.metrics)
        self.log("samples", self.report.sample)
        self.warned = self.warned or runlog.warn_of_cut_off(self.run, self.metrics)
        runlog.show_on(self.bar, self.metrics)

    def save_if_due(self) -> None:
        config, state = self.run.config, self.state
        best = state.best_step == state.step
        if self.due(config.save_every) or best or self.report.stop or self.give_up:
            self.refuse_lost()
            save_checkpoint(config.out, self.run.master, self.run.optimizer, state,
                            self.tokenizer_files, config.keep)
        parallel.from_first(None)    # the others wait until it is written
        give_back_freed_memory()

    def end_if_need_be(self) -> None:
        """Raises InputError as refuse_bad_gradients does; KeyboardInterrupt if asked to stop."""
        self.refuse_bad_gradients()
        if self.report.stop and not self.last:
            raise KeyboardInterrupt

    def refuse_bad_gradients(self) -> None:
        """Raises InputError after too many bad gradients, or if there were no others."""
        state, out = self.state, self.run.config.out
        if self.give_up:
            raise InputError(
                f"step {state.step}: gradients were not finite in {state.bad_steps} steps in a row "
                "(samples.jsonl shows groups); the weights as of the last finite update are in "
                f"{out}/checkpoints; try a lower --lr or --dtype float32")

    @property
    def give_up(self) -> bool:
        only_bad = self.last and self.state.bad_steps == self.state.step
        return only_bad or self.state.bad_steps >= self.run.config.max_bad_steps

    def save_model(self) -> None:
        """OUT/model. All processes must call this, as each may have a shard of the model."""
        self.refuse_lost()
        folder = os.path.join(self.run.config.out, "model")
        model = whole_model(self.run.master)
        save_model(model, folder, self.tokenizer_files, write=parallel.rank() == 0)

    def refuse_lost(self) -> None:
        """Raises InputError where nothing of use could be saved: the folder has gone, or the
        weights are not finite."""
        out = self.run.config.out
        needed = ("run.json", os.path.join("tokenizer", "tokenizer.json"))
        gone = [name for name in needed if not os.path.isfile(os.path.join(out, name))]
        if gone and parallel.rank() == 0:
            raise InputError(f"{os.path.join(out, gone[0])} has gone while the run went on; what "
                             "was trained since the last checkpoint is lost")
        weights = (parallel.my_shard(p) for p in self.run.master.parameters())
        finite = all(bool(p.isfinite().all()) for p in weights)
        [bad] = parallel.all_sum(int(not finite))
        if bad:
            saved = newest_checkpoint(out)
            good = f"; the last good ones are in {saved}" if saved else ""
            raise InputError(f"step {self.state.step}: weights are not finite, so they are not "
                             f"saved; try a lower --lr{good}")
