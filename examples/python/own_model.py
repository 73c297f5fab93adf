# %% [markdown]
# # A model, a loss and a metric of one's own
# A small transformer reads sequences of numbers and predicts the number of peaks: a regression, which no kind
# of task of `fedhl run` knows. The new output layer is trained whole, beside the adapters.

# %%
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fedhl


class Reader(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[..., None])
        attention = (self.query(h) @ self.key(h).mT / h.shape[-1] ** 0.5).softmax(-1)
        return self.output((h + attention @ self.value(h)).relu().mean(1)).squeeze(-1)


def peaks(x: Tensor) -> Tensor:
    middle = x[..., 1:-1]
    return ((middle > x[..., :-2]) & (middle > x[..., 2:])).sum(-1).float()


# %% [markdown]
# Rows may be dictionaries; torch's usual collation makes a batch of them. Each client holds out rows of its
# own.


# %%
def rows(count: int, noise: float) -> list[dict[str, Tensor]]:
    x = noise * torch.randn(count, 12).cumsum(-1)
    return [{"x": a, "y": b} for a, b in zip(x, peaks(x), strict=True)]


torch.manual_seed(0)
model = Reader()
result = fedhl.simulate(
    model,
    {"calm": rows(150, 0.3), "wild": rows(300, 1.0)},
    ranks={"calm": 2, "wild": 8},
    head=["output"],
    loss=lambda model, batch: mse_loss(model(batch["x"]), batch["y"]),
    metrics=lambda model, batch: {"error": (model(batch["x"]) - batch["y"]).abs()},
    metric="error",
    greater_is_better=False,
    client_held_out={"calm": rows(60, 0.3), "wild": rows(60, 1.0)},
    rounds=6,
    lora={"targets": ["query", "key", "value"]},
    training={"steps": 20, "learning_rate": 1e-2},
)

# %%
own = result.metrics[-1]["evaluation"]["clients"]["by_client"]
print({client: round(measured["error"], 3) for client, measured in own.items()})
