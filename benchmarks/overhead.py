"""The share of an iteration's wall time that is useful: model, decoding and reward.

    python benchmarks/overhead.py [--quick] [--model PATH]

The profiler's ranges around the calls of the model (forward and backward), of the autoencoder's
decoder and of the rewards are summed and divided by its range around the whole iteration. What is
left is the library's own: branching, draws, log-probabilities, backup, optimizer, logging. The last
line is one JSON object.

Left out: seconds of one method against another (`iteration.py`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from treegrpo.config import load_config
from treegrpo.training.build import build
from treegrpo.training.loop import iterate

USEFUL = ("model forward", "model backward", "decode", "reward")


def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*arguments, **named)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--model", default="miniature")
    parser.add_argument("overrides", nargs="*", help="key.path=value changes to the default job")
    options = parser.parse_args()
    iterations = 2 if options.quick else 6

    with tempfile.TemporaryDirectory() as folder:
        run = build(
            load_config(
                None, [f"model.path={options.model}", f"output={folder}", *options.overrides]
            )
        )
        iterate(run)  # warm-up
        transformer = run.policy.network
        transformer.forward = ranged("model forward", transformer.forward)
        run.engine.backward = ranged("model backward", run.engine.backward)  # type: ignore[method-assign]
        run.policy.decode = ranged("decode", run.policy.decode)  # type: ignore[method-assign]
        for name, reward in run.rewards.items():
            run.rewards[name] = ranged("reward", reward)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(iterations):
                with record_function("iteration"):
                    iterate(run)

    totals = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
    whole = totals["iteration"]
    for name in USEFUL:
        print(f"{name:<16}{totals[name] / iterations:>8.3f} s  {totals[name] / whole:>6.1%}")
    useful = sum(totals[name] for name in USEFUL) / whole
    print(f"{'everything else':<16}{(1 - useful) * whole / iterations:>8.3f} s  {1 - useful:>6.1%}")
    shares = {name.replace(" ", "_"): round(totals[name] / whole, 4) for name in USEFUL}
    print(json.dumps({"useful_fraction": round(useful, 4), **shares, "iterations": iterations}))


if __name__ == "__main__":
    main()
