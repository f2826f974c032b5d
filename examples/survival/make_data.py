"""Write data/east.csv, north.csv and south.csv: times to an event, with a different baseline hazard per registry."""

import csv
from pathlib import Path

import numpy as np

REGISTRIES = {"east": (400, 0.5), "north": (300, 1.0), "south": (200, 2.0)}  # patients, events per year at zero risk
EFFECTS = {
    "age": 1.0,
    "grade": -1.0,
    "nodes": 0.8,
    "size": 0.0,
    "marker": 0.5,
}  # of one standard deviation, on the log hazard

Path("data").mkdir(exist_ok=True)
rng = np.random.default_rng(0)
for registry, (num_patients, baseline) in REGISTRIES.items():
    x = rng.normal(size=(num_patients, len(EFFECTS)))
    event_years = rng.exponential(1 / (baseline * np.exp(x @ list(EFFECTS.values()))))
    censored_years = rng.exponential(2.0, size=num_patients)  # when a patient leaves the study
    years, event = np.minimum(event_years, censored_years), event_years <= censored_years
    with Path("data", f"{registry}.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*EFFECTS, "years", "event"])
        for row, year, seen in zip(x, years, event, strict=True):
            table.writerow([*row.round(3), round(year, 4), int(seen)])
print("wrote", *(f"data/{name}.csv" for name in REGISTRIES))
