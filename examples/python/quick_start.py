# %% [markdown]
# # A federation in ten lines
# Two clients of different ranks teach one network to tell which of the first four numbers of a row is the
# largest.

# %%
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fedhl

torch.manual_seed(0)
X = torch.randn(900, 32)
rows = list(zip(X, X[:, :4].argmax(dim=1), strict=True))

model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
result = fedhl.simulate(
    model,
    {"north": rows[:200], "south": rows[200:600]},
    ranks={"north": 2, "south": 4},
    loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
    metrics=lambda model, batch: {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float()},
    metric="accuracy",
    held_out=rows[600:],
    rounds=5,
    training={"steps": 10, "learning_rate": 2e-2},
)
print(result)

# %% [markdown]
# Every round is a row of numbers, for pandas or any other table; `plot` draws the metric.

# %%
for row in result.rows:
    print(row["round"], f"{row['eval/full/accuracy']:.3f}", row["bytes/down"], "bytes down")
result.plot()

# %% [markdown]
# The model with the full-rank update merged is a plain module; an adapter of any rank is a PEFT folder, which
# `result.export("adapter", rank=4)` writes.

# %%
merged = result.model()
accuracy = (merged(X[600:]).argmax(1) == X[600:, :4].argmax(1)).float().mean()
print(f"held-out accuracy {accuracy:.3f}")
