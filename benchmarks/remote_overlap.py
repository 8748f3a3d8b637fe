"""Seconds per iteration with a slow reward server: what scoring one batch while the next is sampled
saves.

    python benchmarks/remote_overlap.py [--quick] [--model PATH] [--rounds N] [--prompts N]

Servers in other processes (`treegrpo serve-reward`) sleep for every request, which holds the images
of a quarter of the iteration's prompts, and compute nothing: they stand for reward models on other
machines. The slower one takes longer for a request than sampling its images does, the other one
less. Three ways of asking for the same images' scores take turns, iteration by iteration, so that a
machine whose speed drifts slows all of them alike:

    overlapped    a quarter of the prompts is sampled while the quarter before is scored
    one batch     all prompts are sampled, then all are scored
    waiting       as overlapped, but nothing is sampled while a quarter is scored

At best overlapping hides all sampling but the first quarter's, or all scoring but the last
quarter's, whichever is less: nothing is left to be sampled while the last images are scored. The
last line is one JSON object.

Left out: networks: servers and trainer share one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treegrpo.config import load_config
from treegrpo.rewards import Reward, load_reward

if TYPE_CHECKING:  # the servers import this file, too, and train nothing
    from treegrpo.training.build import Run

BATCHES = 4  # an iteration's, and its requests
LEAVES = 27
SECONDS = (1.0, 0.25)  # per request
PROMPTS_PER_BATCH = {"overlapped": 1 / BATCHES, "one_batch": 1.0, "waiting": 1 / BATCHES}
SAMPLING = ("seconds_rollout", "seconds_decode")


class Sleeper:
    """A server's reward: the brightness of the images, after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, images: Tensor, prompts: list[str], metadata: object) -> Tensor:
        time.sleep(self.seconds)
        return images.mean((1, 2, 3))


class Waiting:
    """A reward that is waited for: without `concurrent`, it is called in the main thread."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def __call__(self, images: Tensor, prompts: list[str], metadata: Any) -> Any:
        return self.reward(images, prompts, metadata)


@contextmanager
def serving(seconds: float) -> Iterator[str]:
    """The address of a server that sleeps so long."""
    command = [sys.executable, "-m", "treegrpo", "serve-reward", f"{Path(__file__).stem}:Sleeper"]
    with subprocess.Popen(
        [*command, "--option", f"seconds={seconds}", "--port", "0", "--device", "cpu"],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[3]  # serving NAME at ADDRESS
        finally:
            process.kill()


def measure(
    runs: dict[str, Run], url: str, request: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """The metrics of each round's iteration, by way of asking."""
    from treegrpo.training.loop import iterate

    remote = load_reward(url, {"batch_size": request})
    records: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run.rewards["sleeper"] = Waiting(remote) if name == "waiting" else remote
            records[name].append(iterate(run))
    return records


def median(records: list[dict[str, float]], *stages: str) -> float:
    return statistics.median(sum(record[stage] for stage in stages) for record in records)


def main() -> None:
    from treegrpo.training.build import build

    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=16, help="prompts per iteration")
    options = parser.parse_args()
    rounds, prompts = (1, 4) if options.quick else (options.rounds, options.prompts)
    if prompts % BATCHES:
        parser.error(f"--prompts: got {prompts}; must be a multiple of {BATCHES}")
    os.environ["NO_PROXY"] = "127.0.0.1"
    load = [round(os.getloadavg()[0], 1)]

    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        urls = [servers.enter_context(serving(seconds)) for seconds in SECONDS]
        runs = {
            name: build(
                load_config(
                    None,
                    [
                        f"model.path={options.model}",
                        f"output={Path(folder) / name}",
                        f"rewards=[{{name: '{urls[0]}', label: sleeper}}]",
                        "rollout.window_schedule=fixed",
                        f"rollout.prompts_per_iteration={prompts}",
                        f"rollout.prompts_per_batch={round(prompts * share)}",
                        "train.learning_rate=1e-6",
                    ],
                )
            )
            for name, share in PROMPTS_PER_BATCH.items()
        }
        request = prompts // BATCHES * LEAVES
        measure(runs, urls[-1], request, 1)  # caches of embeddings and allocators
        results = [measure(runs, url, request, rounds) for url in urls]
    load.append(round(os.getloadavg()[0], 1))

    print(f"{rounds} rounds, {prompts} prompts x {LEAVES} leaves in {BATCHES} requests, medians")
    print(f"{'':<24}{'iteration':>10}{'sampling':>10}{'scores':>10}{'update':>10}")
    scorers = []
    for seconds, result in zip(SECONDS, results, strict=True):
        print(f"{seconds:g} s per request")
        figures: dict[str, float] = {"seconds_per_request": seconds}
        for name, records in result.items():
            whole, scores = median(records, "seconds"), median(records, "seconds_reward")
            print(
                f"  {name:<22}{whole:>10.2f}{median(records, *SAMPLING):>10.2f}{scores:>10.2f}"
                f"{median(records, 'seconds_update'):>10.2f}"
            )
            figures[f"{name}_seconds"] = round(whole, 3)
            figures[f"{name}_seconds_for_scores"] = round(scores, 3)
        # Of neighbors in time, so that a machine's drift cancels.
        saved = statistics.median(
            waiting["seconds"] - overlapped["seconds"]
            for waiting, overlapped in zip(result["waiting"], result["overlapped"], strict=True)
        )
        sampling, scoring = (median(result["waiting"], *s) for s in (SAMPLING, ["seconds_reward"]))
        most = (BATCHES - 1) / BATCHES * min(sampling, scoring)
        print(f"  overlapping saves {saved:.2f} of at most {most:.2f} s")
        figures["saved_seconds"], figures["most_seconds"] = round(saved, 3), round(most, 3)
        scorers.append(figures)
    everything = {
        "scorers": scorers,
        "rounds": rounds,
        "prompts": prompts,
        "batches": BATCHES,
        "nproc": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average_before_and_after": load,
    }
    print(json.dumps(everything))


if __name__ == "__main__":
    main()
