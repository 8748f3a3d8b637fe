"""The training loop: draw, sample and score, credit, update, keep.

Read `iterate` first: it is the algorithm. `train` repeats it and keeps what comes of it.

Left out: how each part does its job (`collector.py`, `methods/`, `learner.py`) and making them
(`build.py`).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable

from treegrpo.checkpoint import check_space
from treegrpo.config import Config
from treegrpo.console import Display, Stop, stop_signal
from treegrpo.errors import UserError
from treegrpo.evaluation.results import Evaluation
from treegrpo.finite import NotFiniteError
from treegrpo.report.model_card import write_model_card
from treegrpo.report.run import TrainingResult, show_result, write_report
from treegrpo.rewards import RewardError, closing
from treegrpo.run_folder import MODEL_FOLDER, RunError, prepare_folder
from treegrpo.tracking import Tracker
from treegrpo.training.build import Run, build
from treegrpo.training.held_out import HeldOut
from treegrpo.training.metrics import Stopwatch, is_due


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    finished: Callable[[Evaluation, Evaluation], None] | None = None,
) -> TrainingResult:
    """Train as configured; everything about the run is written to `config.output`.

    The first Ctrl-C ends the run after its iteration, which the result says; the second, at once.

    Args:
        finished: is given the first and the last evaluation, with their pictures, and says in place
            of the closing tables what came of it.

    Raises:
        UserError: a setting, folder, model or prompt list that cannot be used; nothing was done.
        RewardError: a reward failed; the state before the failing iteration was saved.
        NotFiniteError: the model is broken; the last state that was sound is kept.
        KeyboardInterrupt: at the second Ctrl-C; the state before that iteration was saved, unless
            it had begun to update the model.
    """
    # Of several processes, the first one speaks.
    is_first = os.environ.get("RANK", "0") == "0"
    with Display(config.train.iterations, enabled=is_first) as display:
        run = build(config, resume=resume, phase=display.phase)
        engine, progress = run.engine, run.progress
        display.resume(progress.iteration)
        if engine.is_main:
            check_space(config.output, run.bytes_on_disk())
            prepare_folder(
                config,
                resume=resume,
                overwrite=overwrite,
                iteration=progress.iteration,
                dependencies=run.dependencies,
            )
        engine.wait()
        resumed_at = progress.iteration if resume else None
        tracker = Tracker(config, enabled=engine.is_main, resumed_at=resumed_at)
        with stop_signal(display.note) as stop:
            display.warn(run.warnings)
            try:
                held_out, interrupted = _learn(run, tracker, display, stop, resume=resume)
                result = _finish(run, held_out, stop, interrupted=interrupted)
            except KeyboardInterrupt:
                display.note(f"stopped at once; {run.saved()}")
                raise
        tracker.finish()
        # A launcher ends all processes when one ends with the exit code of an interruption.
        engine.wait()
    if finished is None:
        show_result(result, display)
    else:
        finished(held_out.before, held_out.last)
    return result


def _learn(
    run: Run, tracker: Tracker, display: Display, stop: Stop, *, resume: bool
) -> tuple[HeldOut, bool]:
    """Evaluate, train and evaluate; what was found, and whether a stop was asked for."""
    try:
        with closing(run.rewards):
            held_out = HeldOut(run, tracker, display, resume=resume)
            try:
                interrupted = _repeat(run, held_out, tracker, display, stop)
            finally:
                if not isinstance(sys.exception(), NotFiniteError):  # that state is worth nothing
                    with stop.held():
                        run.save()
            held_out.measure()
            run.prove()
            return held_out, interrupted
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}{run.go_back()}") from error
    finally:
        failure = sys.exception()
        if isinstance(failure, RewardError | UserError) and not isinstance(failure, RunError):
            # It is raised on all processes; a launcher ends them all when the first has ended.
            run.engine.wait()


def _finish(run: Run, held_out: HeldOut, stop: Stop, *, interrupted: bool) -> TrainingResult:
    """Write the trained model and what is to be said of it."""
    config, before, last = run.config, held_out.before, held_out.last
    result = TrainingResult.of(
        config.output, before, last, vars(run.progress), interrupted=interrupted
    )
    if run.engine.is_main:
        with stop.held():
            run.export(config.output / MODEL_FOLDER)
        write_report(config, before, last, result)
        write_model_card(config.output / MODEL_FOLDER, config, run.policy, result)
    return result


def _repeat(run: Run, held_out: HeldOut, tracker: Tracker, display: Display, stop: Stop) -> bool:
    """Iterate until the run is done, its time is over or a stop is asked for; whether it was."""
    config, progress = run.config, run.progress
    limit = (config.train.time_limit_minutes or math.inf) * 60
    while True:
        interrupted, late = run.engine.anywhere(stop.requested, progress.seconds >= limit)
        done = progress.iteration >= config.train.iterations
        if done or interrupted or late:
            return interrupted and not done
        record = iterate(run)
        run.prove()
        tracker.metrics(record)
        display.warn(run.warnings)
        display.show(record, run.seconds_left(limit))
        if is_due(config.evaluation.every, progress.iteration):
            held_out.measure()
        if is_due(config.train.save_every, progress.iteration):
            with stop.held():
                run.save()


def iterate(run: Run) -> dict[str, float]:
    """One iteration; returns its record.

    Raises:
        RewardError: a reward failed.
        UserError: training cannot go on.
    """
    progress, watch = run.progress, Stopwatch(run.policy.device, run.phase)
    drawn_before = run.sampler.state_dict()
    try:
        with run.naming_stage():
            prompts = run.sampler.next(run.config.rollout.prompts_per_iteration)  # draw
            plan = run.method.plan(progress.iteration)
            # sample and score
            batch = run.collector.collect(prompts, plan, progress.iteration, watch)
            credit = run.method.credit(run.collector.scores(batch), batch.forest)  # credit
            agreement = run.tail_check(batch, credit, progress.iteration, watch)
            with watch("update"):
                learned = run.learner.update(batch, credit, progress.iteration)  # update
    except BaseException:
        # The iteration did not happen: a resumed run draws these prompts again.
        run.sampler.load_state_dict(drawn_before)
        run.take_reward_states()
        raise
    run.warnings += run.silent_rewards.warnings(batch.everyones)
    times = watch.record()
    record = {  # keep
        "iteration": progress.iteration,
        **run.reward_metrics.record(batch.everyones),
        **learned,
        **agreement,
        **{name: run.engine.mean(value) for name, value in credit.metrics.items()},
        **({"window_start": plan.stochastic_steps[0]} if plan.stochastic_steps else {}),
        "rollout_forwards": batch.forest.forwards * run.engine.processes,
        **run.batches.record(),
        **times,
    }
    run.keep_reward_states()
    progress.iteration += 1
    progress.seconds += times["seconds"]
    progress.rollout_forwards += int(record["rollout_forwards"])
    progress.update_forwards += int(record["update_forwards"])
    return record
