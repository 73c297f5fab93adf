"""What came of a federation, for Python and notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fedhl import server
from fedhl.errors import UserError
from fedhl.export.folders import publish
from fedhl.federation.federation import Federation
from fedhl.federation.personal import Personal, client_named, personal_change
from fedhl.federation.scores import truncation, truncations
from fedhl.lora import LoRA, dense
from fedhl.model import peft
from fedhl.model.adapters import save_adapter
from fedhl.model.targets import is_conv1d
from fedhl.record import better
from fedhl.run.personal import read_model
from fedhl.run.tracking import numbers, with_totals
from fedhl.server import ServerState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A federation after its rounds.

    `federation`: its clients and their rows; `state`: the server's state after the last round; `metrics`: a
    line for each round, as in metrics.jsonl, from round 0, before any training; `folder`: the run folder, or
    None if nothing was written. `personal`: how the personal models score, as in summary.json, None without
    such models; `models`: those that are in no run folder, by client.
    """

    federation: Federation
    state: ServerState
    metrics: Sequence[Json]
    folder: Path | None = None
    personal: Json | None = None
    models: Mapping[str, Personal] = field(default_factory=dict)

    def __repr__(self) -> str:
        best = self.best
        judged = f"{self.metric} {best['value']:.4g} in round {best['round']}" if best else ""
        return f"<Result: {self.state.round} rounds, {judged or 'not evaluated'}>"

    @property
    def metric(self) -> str:
        """The metric by which rounds are judged."""
        return self.federation.objective.metric

    @property
    def best(self) -> Json | None:
        """The best round and its value of the metric: `{"round": ..., "value": ...}`; None if no round was
        evaluated."""
        best = None
        for line in self.metrics:
            if line["evaluation"]:
                best = better(best, line["evaluation"], line["round"])
        return best

    @property
    def rows(self) -> list[dict[str, float]]:
        """The numbers of each round by names such as `eval/full/accuracy`, which docs/trackers.md explains,
        for `pandas.DataFrame(result.rows)`."""
        return [numbers(line) for line in with_totals(self.metrics, Counter())]

    def updates(self) -> dict[str, Tensor]:
        """The global update W (m, n) of each layer, at full rank. Raises UserError if the method has no
        global model."""
        found = server.deltas(self.federation.method, self.state)
        if not found:
            name = self.federation.config.method.name
            raise UserError(f"method {name!r} has no global model: each client keeps its own")
        return {layer: dense(delta) for layer, delta in found.items()}

    def adapter(self, rank: int | None = None) -> dict[str, LoRA]:
        """`T_rank(W)` of each layer; the rank is at first the largest of the clients'."""
        self.updates()
        return truncation(self.federation, self.state, rank or self.federation.top_rank)

    def changed(self, client: str | None) -> tuple[dict[str, LoRA | Tensor], Mapping[str, Tensor]]:
        """What the global model, or the personal model of this client, adds to each layer of the base model,
        and its head. Raises UserError if there is no such model."""
        if client is None:
            self.updates()
            return server.deltas(self.federation.method, self.state), self.state.head
        known = client_named(self.federation, client)
        if self.personal is None:
            raise UserError("there are no personal models; ask for them with personal={}")
        if self.folder is not None:
            personal = read_model(self.folder, known, self.state)
        else:
            personal = self.models[client]
        return personal_change(self.federation, self.state, known, personal), personal.head

    def model(self, client: str | None = None) -> nn.Module:
        """A copy of the base model with W and the head merged into its weights, without adapters; or the
        personal model of this client."""
        slots = self.federation.slots
        change, head = self.changed(client)
        model = deepcopy(slots.model)
        for name, delta in change.items():
            base = deepcopy(slots.modules[name].get_base_layer())
            base.weight = nn.Parameter(peft.shifted(base, dense(delta)), requires_grad=False)
            model.set_submodule(name, base)
        for name, value in head.items():
            model.get_parameter(name).data.copy_(value)
        return model.eval()

    def export(self, out: str | Path, rank: int | None = None, client: str | None = None) -> Path:
        """Write a PEFT adapter of `rank`, at first the largest of the clients', into a new folder, which
        `PeftModel.from_pretrained(model, folder)` reads; of the personal model of this client, if one is
        named. Raises UserError if the folder is not empty."""
        out, slots = Path(out), self.federation.slots
        rank = rank or self.federation.top_rank
        if self.folder is not None:
            from fedhl.run.delivery import export_run

            export_run(self.folder, out, rank, "last", client=client)
            return out
        change, head = self.changed(client)
        refuse_ambiguous(head)
        base = slots.model
        with publish(out) as staging:
            save_adapter(
                staging,
                truncations(change, rank),
                head,
                base=getattr(base, "name_or_path", ""),
                task_type=None,
                fan_in_fan_out=is_conv1d(base, list(change)),
            )
        return out

    def plot(self) -> Figure:
        """The metric over the rounds: of the full W, of its truncation to the largest rank, and of the
        clients' mean and worst, as far as each was measured."""
        from fedhl.report.curves import curves

        return curves(self.metrics, self.metric)


def refuse_ambiguous(head: Iterable[str]) -> None:
    """Raises UserError for a module of the head that PEFT, which looks for the ends of names, would take for
    a part of its own layers."""
    own = ("lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B", "base_layer")
    for module in sorted({name.rpartition(".")[0] for name in head}):
        if alike := next((name for name in own if name.endswith(module)), None):
            raise UserError(
                f"PEFT finds the head by the end of its name, and {module!r} is also the end of {alike!r}; "
                "give this module of the model another name"
            )
