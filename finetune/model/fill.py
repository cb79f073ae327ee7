"""Weights into a model that is on `meta`: part by part, from files or random.

No process ever holds a whole model beside its own: a part (a layer, or what is in no layer) is
made, filled and, if the model is sharded, cut at once. Files are mapped into memory: the processes
of a host share their pages.

Random weights of a module follow from the seed and the module's name alone. So they are the same
for any number of processes, sharded or not, and those that LoRA adds to are the ones without it.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from moshi.models.lm_utils import _init_layer
from moshi.modules.transformer import LayerScale, RMSNorm
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.kept import require_part
from finetune.model.adapters import no_base
from finetune.safety import all_finite
from ttt import TTTLMModel, ttt_parameters
from ttt.layers import TTTLayer
from ttt.layers.frozen import FrozenLinear, frozen_linears

# Attention's projections as they were once stored: those of all steps of the depth transformer one
# above the other. The released Moshi has these names.
_STACKED = re.compile(r"(.*\.self_attn\.)(in_proj_weight|in_proj\.weight|out_proj\.weight)")
_REDRAWN = ("transformer.layers.", "text_linear", "linears.")
"""Where stock `moshi` replaces the modules' own random start; besides all embeddings."""


class _Place(NamedTuple):
    """Place of a weight: the whole tensor `key` of a file, or one of `num_parts` parts of it."""

    path: Path
    key: str
    part: int
    num_parts: int
    shape: tuple[int, ...]


class WeightFiles:
    """Weights by the names that they have in the model, in files that are read when asked for."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._open: dict[tuple[Path, str], Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def add_base(self, path: Path, model: TTTLMModel, key: str) -> None:
        """Stock weights, for a model with or without LoRA.

        Args:
            key: what has named the file, for messages.

        Raises:
            UserError: the file cannot be read, or does not fit.
        """
        own = ttt_parameters(model)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for name, layer in frozen_linears(model):
            shapes[f"{name}.weight"] = layer.frozen_weight.shape
        expected = {
            name.replace(".frozen_W.", "."): shape
            for name, shape in shapes.items()
            if name not in own and ".lora_" not in name
        }
        frozen = {name.replace(".frozen_W.", "."): name for name in shapes}
        found = _unstacked(_places(path, key), expected)
        if any(".lora_" in name for name in found):
            raise no_base(f"{key}: {path} holds LoRA adapters", path.parent)
        require_shapes(path, expected, found, key)
        self._places |= {frozen[name]: place for name, place in found.items()}

    def add_exactly(self, path: Path, names: Iterable[str], model: TTTLMModel) -> None:
        """Add all weights of a file, which must be those of `names`, or more of the model's.

        Raises:
            UserError: the file is missing or damaged, or of another model.
        """
        require_part(path)
        found = _places(path, "moshi_paths.init_from")
        expected = {name: parameter.shape for name, parameter in model.named_parameters()}
        wrong = sorted(set(names) - found.keys()) + [
            name for name, place in found.items() if expected.get(name) != place.shape
        ]
        if wrong:
            raise UserError(
                f"moshi_paths.init_from: {path} does not fit this model, though their "
                f"configurations agree: see {wrong[0]}. Was the file replaced?"
            )
        self._places |= found

    def read(self, name: str, device: torch.device) -> Tensor:
        """Return a weight as it is in its file.

        Raises:
            UserError: it is NaN or infinite somewhere, so nothing computed with it is a number.
        """
        weight = self._read(name, device)
        if not all_finite(weight):
            raise UserError(
                f"{self._places[name].path}: its {name} holds NaN or infinity. Use another "
                f"checkpoint: of a run that diverged, an earlier one."
            )
        return weight

    def _read(self, name: str, device: torch.device) -> Tensor:
        path, key, part, num_parts, _ = self._places[name]
        file = self._opened(path, device)
        if num_parts == 1:
            return file.get_tensor(key)
        rows = file.get_slice(key).get_shape()[0] // num_parts
        return file.get_slice(key)[part * rows : (part + 1) * rows]

    def _opened(self, path: Path, device: torch.device) -> Any:
        if (path, str(device)) not in self._open:
            self._open[path, str(device)] = safe_open(path, "pt", device=str(device))
        return self._open[path, str(device)]

    def fingerprint(self, model: TTTLMModel, seed: int) -> str | None:
        """Return what tells a model's frozen weights from others, wherever their files lie and
        however few bits they are kept in; None: all weights train.

        Of each weight three rows are read: weights that were trained further differ in all.

        Args:
            seed: of those that no file has.
        """
        frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
        frozen += [f"{name}.weight" for name, _ in frozen_linears(model)]
        digest = hashlib.sha256()
        for name in sorted(frozen):
            digest.update(f"{name.replace('.frozen_W.', '.')} ".encode())
            digest.update(self._some_rows(name) if name in self else f"random {seed}".encode())
        return digest.hexdigest()[:16] if frozen else None

    def _some_rows(self, name: str) -> bytes:
        path, key, part, num_parts, shape = self._places[name]
        rows = self._opened(path, torch.device("cpu")).get_slice(key)
        count = shape[0]
        assert rows.get_shape()[0] == count * num_parts
        chosen = [part * count + row for row in sorted({0, count // 2, count - 1})]
        content = torch.cat([rows[row : row + 1].flatten() for row in chosen])
        return content.view(torch.uint8).numpy().tobytes()


def require_shapes(
    path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, _Place], key: str
) -> None:
    """
    Args:
        key: what has named the file, for messages.

    Raises:
        UserError: the file's weights are not those of the model.
    """
    wrong = {
        "missing": [key for key in expected if key not in found],
        "unknown": [key for key in found if key not in expected],
        "of another shape": [
            key for key, place in found.items() if expected.get(key, place.shape) != place.shape
        ],
    }
    if any(wrong.values()):
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in wrong.items() if keys
        ]
        raise UserError(
            f"{key}: {path} does not fit the model that its config.json (or "
            f"moshi_paths.config_path) describes. Of its weights are {', '.join(parts)}."
        )


def _places(path: Path, key: str) -> dict[str, _Place]:
    try:
        with safe_open(path, "pt") as file:
            return {
                name: _Place(path, name, 0, 1, tuple(file.get_slice(name).get_shape()))
                for name in file.keys()  # noqa: SIM118
            }
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{key}: cannot read {path}: {error}. The checkpoint is damaged: copy it again, or use "
            "another one."
        ) from error


def _unstacked(
    found: Mapping[str, _Place], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, _Place]:
    """`found` with today's names in place of those in which projections are stacked."""
    result = {}
    for name, place in found.items():
        match = _STACKED.fullmatch(name)
        kind = match and f"{match[1]}{match[2][: -len('_weight')]}s."
        count = sum(key.startswith(kind) for key in expected) if kind else 0
        if not count or place.shape[0] % count:
            result[name] = place
            continue
        shape = (place.shape[0] // count, *place.shape[1:])
        for index in range(count):
            result[f"{kind}{index}.weight"] = place._replace(
                part=index, num_parts=count, shape=shape
            )
    return result


# --- into the model -------------------------------------------------------------------------------


class Sharder(Protocol):
    """Interface that cuts a model as it is filled part by part; see
    `finetune.distributed.sharding`."""

    def parts(self, model: TTTLMModel) -> Iterable[tuple[str, nn.Module]]: ...

    def cut(self, part: nn.Module) -> None: ...


@torch.no_grad()
def fill(
    model: TTTLMModel,
    files: WeightFiles,
    device: torch.device,
    *,
    seed: int,
    layer_scales: Mapping[str, float | None],
    sharder: Sharder | None = None,
) -> None:
    """Give a model on `meta` its weights, on `device`: those in `files`, and random ones.

    With a `sharder`, parameters that train are float32: the optimizer steps these very tensors.

    Args:
        layer_scales: where the scales of `transformer` and `depformer` start.
    """
    for prefix, part in sharder.parts(model) if sharder else [("", model)]:
        for name, module in part.named_modules(prefix=prefix):
            if isinstance(module, FrozenLinear):
                if not module.is_filled:
                    module.set_weight(_weight_of(module, name, files, device, seed))
                continue
            own = dict(module.named_parameters(recurse=False))
            if not own or not all(parameter.is_meta for parameter in own.values()):
                continue  # nothing to fill, or done with a part before
            if _fill_module(module, name, files, device):
                _set_seed(seed, name.removesuffix(".frozen_W"), device)
                _start(module, name, layer_scales)
            if sharder:
                _widen(module)
        if sharder:
            sharder.cut(part)
    torch.manual_seed(seed)


def _weight_of(
    module: FrozenLinear, name: str, files: WeightFiles, device: torch.device, seed: int
) -> Tensor:
    """The weight that a layer is to keep in fewer bits: that of the layer which it replaces. One at
    a time, it is all that is ever held in full."""
    linear = module.unfrozen()
    if _fill_module(linear, name, files, device):
        _set_seed(seed, name.removesuffix(".frozen_W"), device)
        _start(linear, name, {})
    return linear.weight


def _fill_module(module: nn.Module, prefix: str, files: WeightFiles, device: torch.device) -> bool:
    """The module's own parameters, not those of the modules in it; whether they are still to get a
    start, because no file has them."""
    in_files = set()
    for name, parameter in list(module.named_parameters(recurse=False)):
        full_name = f"{prefix}.{name}"
        in_files.add(full_name in files)
        if full_name in files:
            value = files.read(full_name, device).to(parameter.dtype)
        else:
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    assert len(in_files) < 2, f"some of {prefix} is in the files, and some is not"
    return False in in_files


def _set_seed(seed: int, name: str, device: torch.device) -> None:
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6], "big")
    if device.type == "cpu":
        # Until a GPU is used, `torch.manual_seed` takes 2 ms and keeps a stack at every call.
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)


def _widen(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.requires_grad:
            setattr(module, name, nn.Parameter(parameter.float()))


def _start(module: nn.Module, name: str, layer_scales: Mapping[str, float | None]) -> None:
    """Random weights, as stock `moshi` draws them; TTT's and LoRA's leave the model as it is."""
    if isinstance(module, TTTLayer | nn.Linear | nn.Embedding | nn.LayerNorm):
        module.reset_parameters()
    elif isinstance(module, RMSNorm):
        module.alpha.fill_(1.0)
    else:
        assert isinstance(module, LayerScale), f"{name}: no start is known for {type(module)}"
        module.scale.fill_(layer_scales[name.split(".")[0]])
    is_adapter = ".lora_" in name
    if isinstance(module, nn.Embedding) or (name.startswith(_REDRAWN) and not is_adapter):
        _init_layer(module)
    if name.endswith(".lora_B"):
        module.weight.zero_()
