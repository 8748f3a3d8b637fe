"""Methods, or settings of one, side by side: equal cost, several seeds, each tuned.

`entries.py` is what is compared, `budget.py` what an iteration costs, `study.py` a whole comparison
and its refusals, `running.py` the runs, `outcome.py` what one came to, `summary.py` the figures of
all, `charts.py` and `page.py` what is shown.

Left out: the command (`commands/compare.py`), and a trained model beside its base
(`report/comparison.py`).
"""
