"""A conversation's state is kept as one file, to go on with it another day."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

import ttt
from finetune.data import Codec
from finetune.errors import UserError
from finetune.safety import all_finite
from finetune.serve.engine import Engine, Row
from finetune.serve.options import Part
from finetune.serve.session_file import FORMAT, metadata_of, num_frames_of, part_of
from ttt import TTTLMModel

_SAMPLED = 4096
_MAX_POSITION = 2**40


@dataclass(frozen=True)
class Identity:
    """The checkpoint that a session belongs to."""

    name: str
    fingerprint: str


def identify(model: TTTLMModel, codec: Codec, checkpoint: Path) -> Identity:
    """The identity of a model with its Mimi: of every weight, its name, type, shape and up to 4096
    of its values, spread evenly. To read all 7 billion would take longer than to load them."""
    digest = hashlib.blake2b(codec.fingerprint, digest_size=16)
    digest.update(repr(model.ttt_args).encode())
    for name, weight in model.state_dict().items():
        digest.update(repr((name, weight.dtype, tuple(weight.shape))).encode())
        flat = weight.flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous()
        digest.update(memoryview(sample.view(torch.uint8).numpy()))
    folder = checkpoint.absolute()
    run = folder.parent.parent.name if folder.parent.name == "checkpoints" else ""
    return Identity(f"{run}/{folder.name}" if run else folder.name, digest.hexdigest())


@dataclass(frozen=True)
class Session:
    """A session is a copy of a row's state on the host."""

    part: Part
    num_frames: int
    tensors: dict[str, Tensor]
    """By module and field."""


def copy_row(engine: Engine, row: Row, identity: Identity, part: Part) -> Session:
    """Return a copy of a row's state.

    Args:
        part: all, so that the conversation continues exactly; or the memory, what TTT has learned.

    Raises:
        UserError: the memory is asked for of a model without TTT.
    """
    if part == "memory" and not engine.model.ttt_layers:
        raise UserError(f"{identity.name} has no TTT, so there is no memory to save; save all.")
    engine.begin(row)
    tensors = {
        f"{prefix}.{name}": value.cpu()
        for prefix, module in _modules(engine, part)
        for name, value in ttt.get_row(module, row.index, whole=part == "all").items()
    }
    return Session(part, row.num_frames, tensors)


def encode(session: Session, identity: Identity) -> bytes:
    """Return a session as the contents of a safetensors file.

    Raises:
        UserError: the conversation has become NaN or infinity; `decode` would refuse it.
    """
    for name, value in session.tensors.items():
        if value.is_floating_point() and not all_finite(value):
            raise UserError(
                f"the conversation's state has become NaN or infinity ({name}) and is not kept; "
                "begin anew, with an earlier checkpoint if it comes again."
            )
    metadata = {
        "format": FORMAT,
        "part": session.part,
        "checkpoint": identity.name,
        "fingerprint": identity.fingerprint,
        "num_frames": str(session.num_frames),
    }
    return bytes(save_safetensors(session.tensors, metadata))


def decode(engine: Engine, identity: Identity, content: bytes, source: str) -> Session:
    """Return the session that `encode` wrote; of the engine it reads shapes alone, so
    that it may be in use meanwhile.

    Args:
        source: where the content is from, for messages.

    Raises:
        UserError: it is no session, or one of another checkpoint.
    """
    metadata = metadata_of(content, source)
    if metadata.get("fingerprint") != identity.fingerprint:
        raise UserError(
            f"{source} is a session of the checkpoint {str(metadata.get('checkpoint'))[:200]!r} "
            f"(fingerprint {str(metadata.get('fingerprint'))[:8]}), and this is "
            f"{identity.name!r} ({identity.fingerprint[:8]}); load the checkpoint it was made with."
        )
    part = part_of(metadata)
    try:
        tensors = load_safetensors(content)
        _check_shapes(engine, tensors, part)
        _check_values(engine, tensors)
        return Session(part, num_frames_of(metadata), tensors)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{source} is a damaged session ({error}); use another copy.") from None


def place(engine: Engine, row: Row, session: Session) -> None:
    """Continue a session of this engine's model in a row, whose own conversation ends, or with a
    memory alone, goes on with it."""
    whole = session.part == "all"
    engine.begin(row)
    for prefix, module in _modules(engine, session.part):
        ttt.set_row(module, row.index, _below(prefix, session.tensors), whole=whole)
    if whole:
        row.num_steps = int(session.tensors["moshi.offsets"])
        row.num_frames = session.num_frames


def pack(engine: Engine, row: Row, identity: Identity, part: Part) -> bytes:
    """Return a row's state as the contents of a file: see `copy_row` and `encode`."""
    return encode(copy_row(engine, row, identity, part), identity)


def unpack(engine: Engine, row: Row, identity: Identity, content: bytes, source: str) -> Part:
    """Continue in a row what `pack` returned: see `decode` and `place`."""
    session = decode(engine, identity, content, source)
    place(engine, row, session)
    return session.part


def _check_shapes(engine: Engine, tensors: dict[str, Tensor], part: Part) -> None:
    """Check that a state is of this engine's model.

    Raises:
        ValueError: it is not.
    """
    by_module = {prefix: _below(prefix, tensors) for prefix, _ in _modules(engine, part)}
    if sum(map(len, by_module.values())) != len(tensors):
        raise ValueError("it has entries of no module")
    for prefix, module in _modules(engine, part):
        # Rows are alike.
        if problem := ttt.row_problem(module, 0, by_module[prefix], whole=part == "all"):
            raise ValueError(problem)


def _check_values(engine: Engine, tensors: dict[str, Tensor]) -> None:
    """Check what a state holds: numbers that are used as indices above all, since one beyond what
    it indexes ends the process on a GPU, and with it all calls.

    Raises:
        ValueError: an index is out of range, or a number is not finite.
    """
    model = engine.model
    for name, value in tensors.items():
        if value.is_floating_point() and not all_finite(value):
            raise ValueError(f"{name} holds NaN or infinity")
        if value.is_floating_point() or value.dtype == torch.bool:
            continue
        low, high = 0, _MAX_POSITION
        if name == "moshi.cache":
            # Places that are yet to be filled hold -2; nothing reads them before they are.
            value.clamp_(min=-1)
            # `card` and `text_card`, the initial tokens, are read in place of it, and never kept.
            low, high = -1, model.card - 1
            if int(value[0].max()) >= model.text_card:
                raise ValueError(f"{name} holds no tokens")
            value = value[1:]
        elif name.endswith(".num_pending"):
            high = model.ttt_args.update_frames - 1
        if not low <= int(value.min()) <= int(value.max()) <= high:
            raise ValueError(f"{name} is out of range")


def load_session(path: Path, engine: Engine, row: Row, identity: Identity) -> Part:
    """Continue in a row the session that a file holds.

    Raises:
        UserError: the file cannot be read; see `unpack`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--session: {path} cannot be read ({error.strerror}).") from None
    return unpack(engine, row, identity, content, f"--session: {path}")


def _modules(engine: Engine, part: Part) -> list[tuple[str, torch.nn.Module]]:
    moshi: list[tuple[str, torch.nn.Module]] = [("moshi", engine.generator)]
    return [*moshi, ("mimi", engine.codec.mimi)] if part == "all" else moshi


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
