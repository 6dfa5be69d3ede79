"""The harness behind `make bench`: what a request costs, against whom, measured in one run.

`stub.c` is the model server, `load.c` the callers; both are cheaper than any proxy between them. A *subject*
(`subject`, `peers`, `gateway`) is such a proxy, started fresh for each measurement. A *line* (`lines`) is one load of
the table. `process` reads what the subject's process tree spent, `table` turns rounds into medians and ratios,
`command` runs it all.

Besides: `soaking` runs the service for an hour and `verdict` judges what it saw (`make soak`); `scenarios/` are for
locust, which runs them in an environment of its own (`packages`).
"""
