"""How much a training run improves held-out accuracy, over several seeds.

    python benchmarks/learning.py [--seeds N] [--quick] [CONFIG.yaml] [key.path=value ...]

Each seed is a whole run of the given configuration (by default the one of `treegrpo train`) with
its own prompts order, noises and window draws; the held-out prompts and evaluation noises are the
same for all. `--quick` stops one seed after half a minute of training: it shows that the benchmark
works, not what training achieves. The last line is one JSON object.

Left out: a comparison of methods (`treegrpo compare`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from treegrpo.config import load_config
from treegrpo.training.loop import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--keep", type=Path, help="a folder to keep the runs in")
    parser.add_argument("arguments", nargs="*", help="CONFIG.yaml and key.path=value changes")
    options = parser.parse_args()
    files = [Path(argument) for argument in options.arguments if "=" not in argument]
    overrides = [argument for argument in options.arguments if "=" in argument]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    if options.quick:
        short = ("train.time_limit_minutes=0.4", "evaluation.every=0")
        seeds, overrides = seeds[:1], [*overrides, *short, "evaluation.images_per_prompt=1"]

    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for seed in seeds:
            output = f"output={folder / f'seed-{seed}'}"
            config = load_config(
                files[0] if files else None, [*overrides, f"train.seed={seed}", output]
            )
            results.append(train(config, overwrite=True))
            accuracy = config.accuracy or "composition_accuracy"
    before = [result.before[accuracy] for result in results]
    after = [result.after[accuracy] for result in results]
    gains = [end - start for start, end in zip(before, after, strict=True)]
    seconds = [result.seconds for result in results]
    print(f"{'seed':>4}{'before':>9}{'after':>9}{'gain':>9}{'seconds':>9}")
    for row in zip(seeds, before, after, gains, seconds, strict=True):
        print(f"{row[0]:>4}{row[1]:>9.3f}{row[2]:>9.3f}{row[3]:>+9.3f}{row[4]:>9.0f}")
    print(
        json.dumps(
            {
                "accuracy_before": round(statistics.fmean(before), 4),
                "accuracy_after": round(statistics.fmean(after), 4),
                "gain_mean": round(statistics.fmean(gains), 4),
                "gain_min": round(min(gains), 4),
                "gain_std": round(statistics.stdev(gains), 4) if len(gains) > 1 else None,
                "seconds": round(statistics.fmean(seconds), 1),
                "iterations": [result.iterations for result in results],
                "seeds": list(seeds),
            }
        )
    )


if __name__ == "__main__":
    main()
