"""This program measures how far an account of past keys would carry `write: delta`.

`delta` writes a chunk as least squares that starts afresh each time,

    S' = S + Eᵀ K P,   E = (K P Kᵀ + λ I)⁻¹ (V − K Sᵀ),   λ = mean ‖k‖² / β,

with P = I. Recursive least squares keeps P = (I + Σ Kᵀ K / λ)⁻¹, the inverse covariance of all
keys so far, so that directions which hold much are disturbed little. A leak q lets it forget what
it knows, P ← (1 − q) P + q I: q = 0 is recursive least squares, q = 1 is `delta`. A slowness c
lets P learn with c λ in place of λ, so that what was seen once can still be written anew: c = 1 is
recursive least squares, c = ∞ is `delta`. Affordable forms keep of I − P its diagonal, or its r
largest eigenvalues. Weights are those of the arm `delta`, as `moshi-ttt recall --device cpu`
trains it; the rule is replaced when they are evaluated, or from the start (`--train-rule`).

    python research/rls_oracle.py --seed 0 --out results --rules delta,exact:0,rank64:0.0001
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from finetune.kept import write_whole
from finetune.recall import measure
from finetune.recall.experiment import train
from finetune.recall.model import new_model
from finetune.recall.presets import Preset, preset
from finetune.recall.streams import KINDS
from ttt import TTTLMModel
from ttt.layers.frames import delayed
from ttt.layers.in_place import InPlaceGating
from ttt.layers.in_place_state import InPlaceState


class Account:
    """P, [B, h, h]: how little is known of each direction of key space, from I (nothing) to 0.

    Args:
        rule: `delta`, or `exact:q:c`, `diagonal:q:c` or `rank<r>:q:c` with the leak q and the
            slowness c (1 if left out), or `forget:γ`: exact, with old pairs weighing γ less with
            every chunk.
    """

    def __init__(self, rule: str, batch: int, hidden: int):
        name, number, slowness = (rule.split(":") + ["0", "1"][rule.count(":") :])[:3]
        self.kind = name.rstrip("0123456789")
        self.rank = int(name.removeprefix("rank")) if self.kind == "rank" else 0
        self.number, self.slowness = float(number), float(slowness)
        self.dense = torch.eye(hidden, dtype=torch.float64).repeat(batch, 1, 1)
        self.diagonal = torch.ones(batch, 1, hidden, dtype=torch.float64)
        self.known = torch.zeros(batch, 0, hidden, dtype=torch.float64)
        """U of P = I − Uᵀ U."""

    def apply(self, keys: Tensor) -> Tensor:
        """Return K P, [B, C, h]."""
        if self.kind in ("exact", "forget"):
            return keys @ self.dense
        if self.kind == "diagonal":
            return keys * self.diagonal
        if self.kind == "rank":
            return keys - (keys @ self.known.mT) @ self.known
        return keys

    def learn(self, keys: Tensor, gain: Tensor) -> None:
        """P ← P − Gᵀ G with G = L⁻¹ K P [B, C, h], where L Lᵀ = K P Kᵀ + c λ I; then leak."""
        keep = 1 - self.number
        if self.kind == "exact":
            eye = torch.eye(keys.shape[2], dtype=keys.dtype)
            self.dense = keep * (self.dense - gain.mT @ gain) + self.number * eye
        elif self.kind == "forget":
            self.dense = (self.dense - gain.mT @ gain) / self.number
        elif self.kind == "diagonal":
            left = self.diagonal - gain.square().sum(1, keepdim=True)
            self.diagonal = keep * left.clamp(min=0) + self.number
        elif self.kind == "rank":
            known = torch.cat([self.known, gain], dim=1)
            if known.shape[1] > self.rank:
                vectors = torch.linalg.eigh(known @ known.mT).eigenvectors
                known = vectors[:, :, -self.rank :].mT @ known
            self.known = keep**0.5 * known


def write(change: Tensor, keys: Tensor, targets: Tensor, beta: Tensor, account: Account) -> Tensor:
    """Return S [B, d, h] after a chunk of keys [B, C, h] and targets [B, C, d], in float64."""
    counts = (keys != 0).any(2).sum(1).clamp(min=1)
    strengths = keys.square().sum((1, 2)) / counts / beta
    keys_p = account.apply(keys)
    eye = torch.eye(keys.shape[1], dtype=keys.dtype)
    products, ridge = keys_p @ keys.mT, strengths[:, None, None] * eye
    factor = torch.linalg.cholesky(products + ridge)
    errors = torch.cholesky_solve(targets - keys @ change.mT, factor)
    factor = torch.linalg.cholesky(products + account.slowness * ridge)
    account.learn(keys, torch.linalg.solve_triangular(factor, keys_p, upper=False))
    return change + errors.mT @ keys_p


class OracleGating(InPlaceGating):
    """`InPlaceGating` whose rule is that of an `Account`; all rows at the same position."""

    rule: str
    account: Account | None

    def _learn(self, z: Tensor, v: Tensor, written: Tensor | None) -> Tensor:
        account = Account(self.rule, len(z), self.hidden)
        change = z.new_zeros(len(z), self.width, self.hidden, dtype=torch.float64)
        keys, v = delayed(z, self.lag).double(), v.double()
        beta = cast(Tensor, self.write_strength).double()
        outputs = []
        for start in range(0, z.shape[1], self.args.chunk_size):
            here = slice(start, start + self.args.chunk_size)
            outputs.append(z[:, here].double() @ change.mT)
            change = write(change, keys[:, here], v[:, here], beta, account)
        return torch.cat(outputs, dim=1).to(z.dtype)

    def _write_complete_chunks(self, state: InPlaceState) -> None:
        size = self.args.chunk_size
        if not (state.num_pending == size).any():
            return
        assert (state.num_pending == size).all()
        if self.account is None:
            self.account = Account(self.rule, len(state.num_pending), self.hidden)
        targets = self._targets(state.pending_source)[:, self.tail :]
        new = write(
            state.change.double(),
            state.pending_z[:, :size].double(),
            targets.double(),
            cast(Tensor, self.write_strength).double(),
            self.account,
        )
        self._carry_over(slice(0, len(new)), state.change.copy_(new), state)
        state.num_pending.zero_()


def set_rule(model: TTTLMModel, rule: str) -> None:
    """Replace the rule by which a model's layers write, and forget what they wrote."""
    for layer in model.ttt_layers.values():
        layer.__class__ = OracleGating
        oracle = cast(OracleGating, layer)
        oracle.rule, oracle.account = rule, None


def trained_model(chosen: Preset, seed: int, out: Path, rule: str | None) -> TTTLMModel:
    """Return the arm `delta`, trained with its own rule or another; it is kept in `out`."""
    model = new_model(
        chosen.model, chosen.streams, chosen.ttt_args("delta"), context=chosen.context("delta"),
        seed=seed, device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    if rule is not None:
        set_rule(model, rule)
    path = out / f"{'delta' if rule is None else 'delta_' + rule.replace(':', '_')}_seed{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
    else:
        curve = train(model, chosen, seed=seed, lr=chosen.lr, label=f"{rule}, seed {seed}")
        print(f"trained with {rule or 'delta'}: {curve[-1]}", flush=True)
        weights = io.BytesIO()
        torch.save(model.state_dict(), weights)
        write_whole(path, weights.getvalue())
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of weights and results")
    parser.add_argument("--rules", default="delta,exact:0")
    parser.add_argument("--train-rule", help="train with this rule instead of `delta`")
    parser.add_argument("--lengths", default="4,16,64", help="times the trained length")
    parser.add_argument("--sequences", type=int, default=8, help="of each kind")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = preset("cpu")
    model = trained_model(chosen, args.seed, args.out, args.train_rule)
    print(f"rule | seed | times | {' | '.join(KINDS)} | largest ‖S‖/‖W0‖")
    for rule in args.rules.split(","):
        for times in map(int, args.lengths.split(",")):
            set_rule(model, rule)
            found = measure.measure_length(
                model, chosen.streams, times=times, num_sequences=args.sequences,
                update_frames=chosen.chunk_size,
            )  # fmt: skip
            record: dict[str, Any] = {
                "trained_with": args.train_rule or "delta",
                "rule": rule,
                "seed": args.seed,
                "times": times,
                "accuracy": {kind: found[kind]["accuracy"] for kind in KINDS},
                "state_ratio": max(found[kind]["state_ratio"] for kind in KINDS),
            }
            with (args.out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            row = [f"{record['accuracy'][kind][0]:.2f}" for kind in KINDS]
            row.append(f"{record['state_ratio']:.2f}")
            print(f"{rule} | {args.seed} | {times} | {' | '.join(row)}", flush=True)


if __name__ == "__main__":
    main()
