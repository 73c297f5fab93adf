# %% [markdown]
# # Two methods on the same federations
# Clients have different labels, and ranks from 2 to 6. Each seed draws another partition, and both methods
# get the same: their difference is taken within a seed.

# %%
import statistics

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fedhl

torch.manual_seed(0)
X = torch.randn(1500, 32) @ torch.diag(torch.linspace(2, 0.1, 32))
y = (X @ torch.randn(32, 6)).argmax(1)
rows = list(zip(X, y, strict=True))
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 6))


def accuracy(method: str, seed: int) -> float:
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda k: int(y[k]) + 3 * torch.rand(1).item())  # neighbours have similar labels
    result = fedhl.simulate(
        model,
        [[rows[k] for k in order[start : start + 200]] for start in range(0, 1000, 200)],
        ranks=[2, 2, 4, 4, 6],
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        metrics=lambda model, batch: {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float()},
        held_out=rows[1000:],
        rounds=5,
        method=method,
        seed=seed,
        evaluation={"every": 5},
        training={"steps": 5, "learning_rate": 1e-2},
        watcher=fedhl.watch.SILENT,
    )
    return result.rows[-1]["eval/full/accuracy"]


# %%
differences = []
for seed in range(3):
    torch.manual_seed(seed)
    first = accuracy("fedhl_ef", seed)
    torch.manual_seed(seed)
    second = accuracy("fedhl", seed)
    differences.append(first - second)
    print(f"seed {seed}: fedhl_ef {first:.3f}, fedhl {second:.3f}")
print(f"fedhl_ef - fedhl: {statistics.mean(differences):+.3f}, over {len(differences)} partitions")

# %% [markdown]
# Three partitions of a toy tell nothing about methods. `fedhl compare` runs many, chooses learning rates on
# rows that are not reported, and gives intervals.
