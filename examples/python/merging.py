# %% [markdown]
# # Adapters that exist already
# Two sites have trained adapters of different ranks and alphas with PEFT. Their weighted sum is exact: it has
# the sum of the ranks, and `rank=` cuts it.

# %%
from pathlib import Path
from tempfile import mkdtemp

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fedhl.export import merge_folders


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


folder = Path(mkdtemp())
for site, rank, alpha in (("a", 2, 8), ("b", 4, 4)):
    trained = get_peft_model(
        base(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0", "2"])
    )
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:  # in place of training
            nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(str(folder / site))

# %%
sites = [str(folder / "a"), str(folder / "b")]
merge = merge_folders(sites, weights=[0.25, 0.75], rank=None, out=folder / "merged")
print(merge)

# %% [markdown]
# A single linear layer shows that the sum is that of the updates.

# %%
X = torch.eye(16)
outputs = {
    name: PeftModel.from_pretrained(base(), folder / name).get_submodule("base_model.model.0")(X)
    for name in ("a", "b", "merged")
}
start = base()[0](X)
expected = 0.25 * (outputs["a"] - start) + 0.75 * (outputs["b"] - start)
difference = (outputs["merged"] - start - expected).abs().max()
print(f"largest difference {difference:.1e}")
assert difference < 1e-5
