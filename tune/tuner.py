"""Trials on Ray Tune: the only file that imports it. Tune decides which trial runs when, and which goes on; it trains none.

A trial is an actor beside the sweep's driver that drives its run (`trial.py`); the run's workers are placed by Ray Train, as
those of any run. So many trials at once have room for all their workers, and a trial keeps its turn until its workers are
gone: no two can wait for each other. Tune's own state is a pickle and is never read again: what a sweep knows is in its
directory, and earlier measurements are told to the scheduler and the search anew.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import ray.tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from service.errors import NotFoundError, StorageError
from service.runs import Run
from service.status import ENDS
from service.sweep_config import AshaBlock, Dimension, PbtBlock
from tune import space as spaces
from tune.directory import Sweep, TrialRecord
from tune.sweep_file import ResolvedSweep, live
from tune.trial import LEFT, LOOK_EVERY_S, Report, TrialJob, TrialThread
from tune.trials import EARLY, Trial, TrialState

STOPS_WITHIN_S = 120.0  # a run that was left, with its checkpoint; then its actor is killed
ACTOR_FAILURES = 2  # a trial's actor may be killed so often and the trial goes on
POINTER = "checkpoint.json"
_JUST_BELOW = 1 - 1e-9  # shares of steps are no exact numbers: 0.3 - 0.2 < 0.1, and 0.1 * 3 > 0.3
_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the sweep's driver has its own
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no metric
    "TUNE_FORCE_TRIAL_CLEANUP_S": str(int(STOPS_WITHIN_S)),
    "TUNE_WARN_THRESHOLD_S": "600",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Queue:
    """What is to be tried: `waiting` trials, then those of the `new` numbers, drawn as the search suggests."""

    waiting: tuple[TrialRecord, ...]
    new: range


def run_trials(
    sweep: Sweep,
    resolved: ResolvedSweep,
    job: TrialJob,
    queue: Queue,
    before: Sequence[Trial],
    parallel: int,
    tick: Callable[[], None],
) -> None:
    """Run the queue to its end, `parallel` trials at a time. `before`: trials that have ended and are only remembered.

    `tick` is called several times a second from this thread.
    """
    os.environ.update(_ENVIRONMENT)
    # Tune would put credentials of this process's environment where everybody on the cluster can read them.
    class_cache.ENV_VARS_TO_PROPAGATE = {n for n in class_cache.ENV_VARS_TO_PROPAGATE if not n.startswith("AWS_")}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    random.seed(resolved.config.search.seed)  # what Tune's population-based training draws from
    search = _search(sweep, resolved, queue, before)
    draws = [{"number": record.number, "draw": record.newest_draw} for record in queue.waiting]
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(
            ray.tune.with_parameters(TuneTrial, job=asdict(job), replay=isinstance(resolved.config.stop, AshaBlock)),
            ray.tune.PlacementGroupFactory([{_this_node(): 0.001}]),
        ),
        param_space={} if search else {"trial": ray.tune.grid_search(draws)},
        tune_config=ray.tune.TuneConfig(
            scheduler=scheduler(sweep, resolved, before),
            search_alg=search,
            num_samples=len(queue.waiting) + len(queue.new) if search else 1,
            max_concurrent_trials=parallel,
            reuse_actors=True,
            trial_name_creator=lambda trial: str(trial.config["trial"]["number"]),
            trial_dirname_creator=lambda trial: f"{trial.config['trial']['number']}-{trial.trial_id}",
        ),
        run_config=ray.tune.RunConfig(
            name=f"{sweep.id}-{int(time.time())}",
            storage_path=str(Path(job.cache) / "ray_tune"),
            callbacks=[_Ticks(tick)],
            failure_config=ray.tune.FailureConfig(max_failures=ACTOR_FAILURES),
            verbose=0,
        ),
    )
    tuner.fit()


class TuneTrial(ray.tune.Trainable):
    """A trial as Tune sees it. An actor drives one trial after the other; the first `step` of each begins its run."""

    def setup(self, config: dict[str, Any], job: dict[str, Any], replay: bool) -> None:
        from service.training.trainer import Crew

        self._job, self._replay = TrialJob(**job), replay
        self._crew = Crew()  # an actor's trials, one after the other, share its workers
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self._draw: dict[str, Any] = dict(config["trial"]["draw"])
        self._donor: tuple[str, int] | None = None
        self._thread: TrialThread | None = None
        self._reports: list[Report] = []
        self._last: Report | None = None

    def step(self) -> dict[str, Any]:
        """The next measurement; with `done` when the run has ended."""
        with suppress(StorageError):  # asked again, by the run that begins
            if self._thread is None and Sweep(self._job.home, self._job.sweep).stop_requested():
                return {"done": True}
        if self._thread is None:
            self._thread = TrialThread(
                self._job, int(self.trial_name), self._draw, self._donor, self._crew, replay=self._replay
            )  # fmt: skip
        while not self._reports and self._thread.alive:
            time.sleep(LOOK_EVERY_S)
            self._reports += self._thread.new_reports()
        if not self._reports:
            self._reports += self._thread.new_reports()
        if self._reports:
            self._last = self._reports.pop(0)
            return as_result(self._last)
        if self._thread.failure:
            return {"done": True, "failed": True}
        return {"done": True, **(as_result(self._last) if self._last else {})}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Make room for another trial, or for other values of this one."""
        if not self._leave():
            return False
        self._begin(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Where the run's newest checkpoint is: it lies in the run's own directory."""
        from service.training.checkpoint import newest_step

        run = self._thread.run if self._thread else None
        pointer = {"run": run.id, "step": newest_step(run.uri) or 0} if run else {}
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on from there when the run begins."""
        pointer = json.loads((Path(checkpoint_dir) / POINTER).read_text())
        self._donor = (pointer["run"], pointer["step"]) if pointer else None

    def cleanup(self) -> None:
        if self._leave():
            self._crew.leave()

    def _leave(self) -> bool:
        return self._thread is None or self._thread.stop(LEFT, STOPS_WITHIN_S)


def as_result(report: Report) -> dict[str, Any]:
    """A measurement as a scheduler takes it."""
    return {"progress": report.progress, "value": report.value, "replayed": report.replayed}


class _Asha(ASHAScheduler):
    """Tune's successive halving, which asks the run to stop instead of killing its driver: it ends with a checkpoint, keeps
    its turn until then, and says why. What an earlier driver decided is not decided again."""

    def __init__(self, sweep: Sweep, resolved: ResolvedSweep, rule: AshaBlock) -> None:
        super().__init__(
            time_attr="progress", metric="value", mode=resolved.config.search.mode, max_t=1.0,
            grace_period=rule.grace * _JUST_BELOW, reduction_factor=rule.factor, stop_last_trials=False,
        )  # fmt: skip
        self._sweep, self._search, self._rule = sweep, resolved.config.search, rule
        self._asked: dict[int, str] = {}  # trials that are to stop and may not have heard of it

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP and not result["replayed"] and result["progress"] < 1.0:
            share = f"the best 1/{self._rule.factor:g} of the trials that got there before"
            reason = f"{self._search.metric} {result['value']:.4g} after {result['progress']:.0%} is not among {share}"
            self._asked[int(str(trial))] = EARLY + reason
        self._ask()
        return str(TrialScheduler.CONTINUE)

    def _ask(self) -> None:
        """Again with every measurement: storage may be away, and a run may have had another reason to make room just then."""
        for number, reason in list(self._asked.items()):
            with suppress(StorageError, NotFoundError):
                run = Run(self._sweep.home, str(self._sweep.record(number).run))
                if run.status().state in ENDS:
                    del self._asked[number]
                else:
                    run.propose_stop(reason)

    def remember(self, before: Sequence[Trial]) -> None:
        """The measurements of trials that have ended."""
        for trial in before:
            stand_in = SimpleNamespace(trial_id=f"before-{trial.number}")
            self.on_trial_add(None, stand_in)
            for progress, value in trial.curve:
                self.on_trial_result(None, stand_in, {"progress": progress, "value": value, "replayed": True})


class _Pbt(PopulationBasedTraining):
    """Tune's population-based training, in which all trials have a turn: nobody pauses for another."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["progress"] >= 1.0:  # it has nothing left to learn, and is not taken from its gate
            return str(TrialScheduler.CONTINUE)
        decision = super().on_trial_result(tune_controller, trial, result)
        return str(TrialScheduler.CONTINUE if decision == TrialScheduler.PAUSE else decision)


def scheduler(sweep: Sweep, resolved: ResolvedSweep, before: Sequence[Trial]) -> TrialScheduler:
    """The sweep's stopping rule, which knows what ended trials have measured."""
    rule = resolved.config.stop
    if isinstance(rule, AshaBlock):
        asha = _Asha(sweep, resolved, rule)
        asha.remember(before)
        return asha
    if isinstance(rule, PbtBlock):
        space = resolved.space
        return _Pbt(
            time_attr="progress", metric="value", mode=resolved.config.search.mode,
            perturbation_interval=rule.every * _JUST_BELOW, quantile_fraction=rule.quantile,
            hyperparam_mutations={"trial": {"draw": {key: _domain(space[key], key) for key in live(space)}}},
            resample_probability=0.0, perturbation_factors=rule.factors,
            custom_explore_fn=lambda config: {
                **config, "trial": {**config["trial"], "draw": spaces.clipped(space, config["trial"]["draw"])}
            },
            log_config=False,
        )  # fmt: skip
    return FIFOScheduler()


def _search(sweep: Sweep, resolved: ResolvedSweep, queue: Queue, before: Sequence[Trial]) -> _Suggested | None:
    """The search that draws from how earlier trials went; None where all values are known."""
    if resolved.known_draws is not None:
        return None
    from ray.tune.search.optuna import OptunaSearch

    search = resolved.config.search
    domains = {key: _domain(dimension, key) for key, dimension in resolved.space.items()}
    logging.getLogger("optuna").setLevel(logging.ERROR)
    draws = {record.number: record.newest_draw for record in sweep.records()}
    # A sampler that began anew would suggest what it has suggested before.
    seed = random.Random(f"{search.seed}, {len(draws)}").getrandbits(32)
    inner = OptunaSearch(OptunaSearch.convert_search_space(domains), metric="value", mode=search.mode, seed=seed)
    for trial in before:
        if trial.value is not None and trial.state is not TrialState.FAILED:
            inner.add_evaluated_point(draws[trial.number], trial.value)
    return _Suggested(sweep, queue, inner)


class _Suggested(Searcher):
    """Trials of an earlier driver first, then those that Optuna suggests, numbered and kept in the sweep's directory."""

    def __init__(self, sweep: Sweep, queue: Queue, inner: Any) -> None:
        super().__init__(metric="value", mode=inner.mode)
        self._sweep, self._inner = sweep, inner
        self._waiting = list(queue.waiting)
        self._numbers = iter(queue.new)
        self._resumed: dict[str, TrialRecord] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if self._sweep.insist(self._sweep.stop_requested):
            return str(Searcher.FINISHED)
        if self._waiting:
            record = self._resumed[trial_id] = self._waiting.pop(0)
        elif number := next(self._numbers, None):
            record = TrialRecord(number=number, draw=self._inner.suggest(trial_id))
            self._sweep.insist(partial(self._sweep.write_record, record))
        else:
            return str(Searcher.FINISHED)
        return {"trial": {"number": record.number, "draw": record.newest_draw}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        value = (result or {}).get("value")
        if trial_id not in self._resumed:
            self._inner.on_trial_complete(trial_id, result if value is not None else None, error=value is None)
        elif value is not None:
            self._inner.add_evaluated_point(self._resumed[trial_id].newest_draw, value)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its directory."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""


class _Ticks(ray.tune.Callback):
    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks, for a restoration that is never asked for."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._tick()


def _domain(dimension: Dimension, key: str) -> Any:
    if dimension.choose is not None:
        return ray.tune.choice(list(dimension.choose))
    if dimension.integer:
        return ray.tune.randint(dimension.integer[0], dimension.integer[1] + 1)
    whole = spaces.takes_integers_only(key) and not dimension.ratio_of
    low, high = dimension.ends or (0.0, 0.0)
    if dimension.log:
        return ray.tune.lograndint(round(low), round(high) + 1) if whole else ray.tune.loguniform(low, high)
    return ray.tune.randint(round(low), round(high) + 1) if whole else ray.tune.uniform(low, high)


def _this_node() -> str:
    """Ray's own resource of this node: where the sweep's driver is, its data and its directory are."""
    here = ray.get_runtime_context().get_node_id()
    resources: Mapping[str, float] = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return next(name for name in resources if name.startswith("node:") and name != "node:__internal_head__")
