"""Write data/leiden.csv, turin.csv and york.csv: synthetic patients, of a different mean age in each hospital."""

import csv
from pathlib import Path

import numpy as np

HOSPITALS = {"leiden": (400, 55.0), "turin": (250, 65.0), "york": (150, 75.0)}  # patients, mean age in years
LEVELS = ("never", "former", "current")

Path("data").mkdir(exist_ok=True)
rng = np.random.default_rng(0)
for hospital, (num_patients, mean_age) in HOSPITALS.items():
    with Path("data", f"{hospital}.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["age", "sex", "smoker", "systolic", "creatinine", "outcome"])
        for _ in range(num_patients):
            age, systolic, creatinine = rng.normal([mean_age, 130.0, 1.0], [10.0, 15.0, 0.3])
            male, smoker = int(rng.integers(2)), int(rng.integers(3))
            risk = (age - 65) / 6 + male + 1.5 * (smoker - 1) + 4 * (creatinine - 1)
            outcome = "dead" if rng.random() < 1 / (1 + np.exp(-risk)) else "alive"
            row = [round(age), "fm"[male], LEVELS[smoker], round(systolic), round(creatinine, 2), outcome]
            table.writerow(row)
print("wrote", *(f"data/{hospital}.csv" for hospital in HOSPITALS))
