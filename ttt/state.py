"""The state of a running stream: read it, restore it also in another process, clear it.

    with model.streaming(batch_size):
        ...
        safetensors.torch.save_file(ttt.get_state(model, whole=True), path)

    with model.streaming(batch_size):
        ttt.set_state(model, safetensors.torch.load_file(path))

TTT's own state is what the model has learned from the stream. For a stream to continue exactly,
what stock `moshi` keeps is needed too: attention caches, positions, and with `LMGen` in place of
the model, the delayed tokens.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from types import SimpleNamespace

import torch
from moshi.models.lm import LMGen
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import RingKVCache
from torch import Tensor, nn

from ttt.layers import TTTLayer, TTTState

_NOT_STREAMING = "the model is not streaming: there is no state outside of `streaming()`."


def get_state(model: nn.Module, *, whole: bool = False) -> dict[str, Tensor]:
    """A copy of the streaming state, by module and field: `….gating.change` and so on.

    Args:
        model: a streaming model of `build_model`, or an `LMGen` with one.
        whole: also what stock `moshi` keeps, so that the stream can be continued exactly.

    Returns:
        Contiguous tensors, as safetensors wants them; numbers have no dimension.

    Raises:
        ValueError: the model is not streaming.
    """
    found = {}
    for name, owner, field in _fields(model, whole=whole):
        value = getattr(owner, field)
        found[name] = torch.tensor(value) if isinstance(value, int) else value.detach().clone()
    return found


def set_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restores what `get_state` returned, in place: CUDA graphs stay valid.

    Args:
        model: is streaming, with the same batch size and configuration.
        state: of `get_state`, on any device. If it is whole, all of the stream is restored, else
            what TTT has learned alone.

    Raises:
        ValueError: the model is not streaming, or the state is of another model, type or batch
            size; nothing is changed then.
    """
    fast = {name for name, _, _ in _fields(model, whole=False)}
    fields = list(_fields(model, whole=not state.keys() <= fast))
    own = {name: torch.as_tensor(getattr(owner, field)) for name, owner, field in fields}
    if problem := _explain_difference(state, own):
        raise ValueError(problem)
    for name, owner, field in fields:
        value = getattr(owner, field)
        if isinstance(value, int):
            setattr(owner, field, int(state[name]))
        else:
            value.copy_(state[name])


def reset(model: nn.Module, rows: Tensor | Sequence[int] | None = None) -> None:
    """Makes TTT forget what it has learned from some rows' streams; attention remembers.

    Args:
        model: a streaming model of `build_model`, or an `LMGen` with one.
        rows: a mask [B] of booleans, or a list of row numbers; None: all rows.

    Raises:
        ValueError: the model is not streaming, or has no such rows.
    """
    for _, state in _states(model, whole=False):
        if rows is None:
            mask = torch.ones_like(state.exec_mask)
        elif isinstance(rows, Tensor) or any(isinstance(row, bool) for row in rows):
            # Numbers in a tensor are none of rows: they may be meant as a mask.
            mask = _mask(rows, state)
        else:
            mask = torch.zeros_like(state.exec_mask)
            for row in rows:
                _require_row(row, state.batch_size)
                mask[row] = True
        # A reset also ends a pause, and forgetting does not.
        exec_mask = state.exec_mask.clone()
        state.reset(mask)
        state.exec_mask.copy_(exec_mask)


def use_in_rows(model: nn.Module, rows: Tensor) -> None:
    """Use TTT in some rows of a stream alone: the others compute what they would without it, and
    their fast weights stand still.

    Args:
        model: a streaming model of `build_model`, or an `LMGen` with one.
        rows: a mask [B] of booleans. It holds until the next call or the end of the stream.
            Neither `set_exec_mask` nor a reset changes it, and `get_state` does not contain it.

    Raises:
        ValueError: the model is not streaming or not one of `build_model`, or has other rows.
    """
    # A step may come here. To look through all modules of a Moshi 7B takes milliseconds.
    layers = getattr(getattr(model, "lm_model", model), "ttt_layers", None)
    if layers is None:
        raise ValueError(
            f"{type(model).__name__} has no TTT to use: give a model of `build_model`, or an "
            "`LMGen` with one."
        )
    for module in layers.values():
        state = module._streaming_state
        if state is None:
            raise ValueError(_NOT_STREAMING)
        # In place: a CUDA graph reads them where they are.
        state.rows_on.copy_(_mask(rows, state))


def get_row(module: nn.Module, row: int, *, whole: bool) -> dict[str, Tensor]:
    """A copy of one row's streaming state, without the dimension of the batch.

    Args:
        module: a streaming model of `build_model`, an `LMGen` with one, or a Mimi.
        whole: also what stock `moshi` keeps; see `get_state`.

    Returns:
        Contiguous tensors. They fit any row of any batch of the same model.

    Raises:
        ValueError: the module is not streaming, or has no such row.
    """
    rows = _row_fields(module, row, whole=whole)
    return {name: value.detach().clone().contiguous() for name, value in rows}


def set_row(module: nn.Module, row: int, state: Mapping[str, Tensor], *, whole: bool) -> None:
    """Restores in one row what `get_row` returned, in place; the other rows are not touched.

    Raises:
        ValueError: the module is not streaming or has no such row, or the state is not one of this
            model; nothing is changed then.
    """
    if problem := row_problem(module, row, state, whole=whole):
        raise ValueError(problem)
    for name, value in _row_fields(module, row, whole=whole):
        value.copy_(state[name])


def row_problem(
    module: nn.Module, row: int, state: Mapping[str, Tensor], *, whole: bool
) -> str | None:
    """Return why `set_row` would refuse a state; None: it would not.

    Raises:
        ValueError: the module is not streaming, or has no such row.
    """
    return _explain_difference(state, dict(_row_fields(module, row, whole=whole)))


def row_bytes(module: nn.Module) -> int:
    """Return the bytes that one row of a stream takes.

    Raises:
        ValueError: the module is not streaming.
    """
    return sum(value.nbytes for _, value in _row_fields(module, 0, whole=True))


def clear_rows(module: nn.Module, rows: Tensor) -> None:
    """Restart some rows of a stream, and erase what a reset alone would leave: attention's caches,
    where a mask hides it as long as it is finite, and the codes that an `LMGen` keeps.

    Args:
        module: streams; an `LMGen` or a Mimi.
        rows: a mask [B] of booleans.

    Raises:
        ValueError: the module is not streaming, or has other rows.
    """
    own = module._streaming_state if isinstance(module, StreamingModule) else None
    if own is None:
        raise ValueError(_NOT_STREAMING)
    mask = _mask(rows, own)
    module.reset_streaming(mask)  # type: ignore[operator]
    for _, state in _states(module, whole=True):
        cache = getattr(state, "kv_cache", None)
        if isinstance(cache, RingKVCache) and cache.respect_exec_mask:
            cache.cache.masked_fill_(mask.view(1, -1, 1, 1, 1), 0.0)
    if isinstance(module, LMGen):
        # Nothing reads codes before they are written again, but `get_row` copies them.
        own.cache.masked_fill_(mask.view(-1, 1, 1), module.lm_model.ungenerated_token_id)


def _mask(rows: Tensor | Sequence[int], state: State) -> Tensor:
    """Return a caller's mask of rows on the state's device. One of another length would be
    broadcast: one boolean would mean all rows."""
    rows = torch.as_tensor(rows)
    if rows.dtype != torch.bool or rows.shape != (state.batch_size,):
        raise ValueError(
            f"rows must be a mask of booleans with {state.batch_size} entries, as many as the "
            f"stream has rows, and is {_kind(rows)}."
        )
    return rows.to(state.device)


def _require_row(row: int, num_rows: int) -> None:
    if not 0 <= row < num_rows:
        raise ValueError(f"there is no row {row}: the stream has {num_rows}, from 0 on.")


def _row_fields(module: nn.Module, row: int, *, whole: bool) -> Iterator[tuple[str, Tensor]]:
    """Views of all that belongs to one row's stream."""
    for name, owner, field in _fields(module, whole=whole):
        value = getattr(owner, field)
        if isinstance(value, int) or name.split(".")[-1] in ("exec_mask", "initial"):
            # Counters that only the depth transformer reads, a pause, and what all rows share.
            continue
        dim = 1 if name.endswith("kv_cache.cache") else 0
        _require_row(row, value.shape[dim])
        yield name, value.select(dim, row)


def _explain_difference(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Return why a state cannot take the place of a stream's own; None: it can."""
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or unknown:
        named = [("it lacks", missing), ("it has unknown", unknown)]
        parts = [f"{what} {_listed(names)}" for what, names in named if names]
        return f"the state is not of this model: {'; '.join(parts)}."
    for name, value in own.items():
        if (theirs := _kind(state[name])) != _kind(value):
            return (
                f"the state does not fit this stream: {name} is {theirs}, and the stream's is "
                f"{_kind(value)}."
            )
    return None


def _listed(names: Set[str]) -> str:
    first = sorted(names)[:3]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _states(model: nn.Module, *, whole: bool) -> Iterator[tuple[str, State]]:
    """The modules' streaming states by the modules' names; without `whole`, TTT's alone.

    The depth transformer has a state within a step alone, and may be in one, in another thread.
    """
    is_streaming = False
    for name, module in model.named_modules():
        if "depformer" in name.split("."):
            continue
        if isinstance(module, StreamingModule) and module._streaming_state is not None:
            is_streaming = True
            if whole or isinstance(module, TTTLayer):
                yield name, module._streaming_state
    if not is_streaming:
        raise ValueError(_NOT_STREAMING)


def _fields(model: nn.Module, *, whole: bool) -> Iterator[tuple[str, object, str]]:
    """Yield all that changes while streaming: a name, the object that holds it, and its field."""
    for module_name, state in _states(model, whole=whole):
        prefix = f"{module_name}." if module_name else ""
        if isinstance(state, TTTState):
            owner = SimpleNamespace(exec_mask=state.exec_mask, **state.tensors())
            yield from ((f"{prefix}{name}", owner, name) for name in vars(owner))
            continue
        names = [field.name for field in dataclasses.fields(state) if field.name != "batch_size"]
        for name in [*names, "exec_mask"]:
            value = getattr(state, name)
            if isinstance(value, RingKVCache):
                yield f"{prefix}{name}.cache", value, "cache"
                yield f"{prefix}{name}.end_offset", value, "end_offset"
            elif isinstance(value, Tensor | int):
                yield f"{prefix}{name}", state, name
