"""Training as a loop in Python: look at every round, stop when accuracy no longer improves, use the model.

Shows a configuration made in Python, records, the silos' own figures, and the trained torch module after the run.
In this folder:
    mpirun -n 2 python python_rounds.py
It reaches accuracy > 0.90 (0.1 is a guess) before its 100 rounds are over.
"""

import fedmpi

PATIENCE = 5  # rounds without a better accuracy
config = fedmpi.Config(
    rounds=100,
    data={"name": "digits", "silos": 4, "partition": {"name": "dirichlet", "alpha": 0.5}},
    model={"name": "mlp", "hidden": [32]},
    local={"name": "sgd", "lr": 0.2, "epochs": 1, "batch_size": 32},
    out="runs/python_rounds",
)
best, since = 0.0, 0
with fedmpi.Run(config) as run:  # every rank executes the same lines
    for record in run:
        accuracy = record["accuracy"]
        best, since = max(best, accuracy), 0 if accuracy > best else since + 1
        if run.comm.rank == 0:
            silo, row = min(record["silos"].items(), key=lambda item: item[1]["accuracy"])
            print(f"round {record['round']:3}  accuracy {accuracy:.3f}  worst {silo} {row['accuracy']:.3f}")
        if since == PATIENCE:  # a record is the same on every rank, so all of them leave here
            break
if run.comm.rank == 0:
    num_params = sum(p.numel() for p in run.model.parameters())
    print(f"best accuracy {best:.3f}; run.model is a torch module of {num_params:,} parameters, saved in {run.out}")
